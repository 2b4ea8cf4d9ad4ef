"""`videoclip serve`: a page to search and watch an archive, and the HTTP API beneath it; needs the extra `serve`.

It reads, and never writes but to its cache of remuxed files. It listens on this machine alone unless a token is
given. Only files of the index are served, by their number there; no request carries a path.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from videoclip.errors import InputError
from videoclip.search.archive import Archive
from videoclip.search.media import picture
from videoclip.search.request import Request

MIN_TOKEN = 16


@dataclass(frozen=True)
class ServeConfig:
    """Serve a page to search and watch an archive; stop it with Ctrl-C."""

    model: Path
    """Folder of the model that made the index."""
    index: Path = Path("runs/index")
    """Folder that `videoclip index` wrote, with --videos, so that there is something to watch."""
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own needs --token."""
    port: int = 8000
    token: str = ""
    """What visitors must know, 16 characters or more: http://host:port/?token=..."""


def serve(config: ServeConfig) -> None:
    """Serve until stopped.

    Raises InputError if the archive cannot be searched, the port is taken, or the address needs a token.
    """
    from pipelines.search import open_archive

    try:
        import uvicorn

        from pipelines.serve_app import make_app
    except ImportError:
        raise InputError("the server is not installed; run: pip install 'videoclip[serve]'") from None

    check_address(config)
    listening = listen(config.host, config.port)
    try:
        import torch

        torch.set_num_threads(1)  # queries are short; threads of several would fight
        archive = open_archive(config.model, config.index)
        warm_up(archive)
        port = listening.getsockname()[1]
        app = make_app(archive, is_loopback(config.host), config.token)
        print(f"open http://{_shown(config.host)}:{port}/{'?token=...' if config.token else ''}", flush=True)
        options = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
        uvicorn.Server(options).run(sockets=[listening])
    finally:
        listening.close()


def warm_up(archive: Archive) -> None:
    """Answer one query and draw one picture, so that the first visitor does not wait for what loads lazily."""
    archive.search([Request("warm")])
    playable = next((video for video in archive.videos() if not video.state()), None)
    if playable is not None:
        with contextlib.suppress(InputError):  # whoever asks for this picture is told what is wrong with it
            picture(Path(playable.path), 0.0)


def check_address(config: ServeConfig) -> None:
    """Raises InputError if an address that others can reach has no token, or the token is short."""
    if config.token and not re.fullmatch(rf"[\w-]{{{MIN_TOKEN},200}}", config.token, re.ASCII):
        raise InputError(f"a token has at least {MIN_TOKEN} letters, digits, - and _")
    if not is_loopback(config.host) and not config.token:
        raise InputError(f"{config.host} can be reached by others: give --token, or leave --host as it is")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises InputError if the port is taken or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host.strip("[]"), port))
        made.listen(256)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} is taken, perhaps by another server; choose another --port") from None
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    except OverflowError:
        made.close()
        raise InputError(f"a port lies between 0 and 65535, not at {port}") from None
    return made


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
