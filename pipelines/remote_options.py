"""Options that name files in a store: what a stage reads whole is fetched first, and what it writes is copied there.

`at_hand` replaces such options by local paths for the time that a stage runs:

- `shards` stay what they are, and so do the `videos` of a stage that `streams_videos`: parts go through the cache of
  shards, videos are read as they are decoded.
- `output` becomes a folder of this machine, a `Mirror` of the one in the store: what is there is fetched first, so that
  a run goes on on another machine; what is new is copied every minute and at the end, however the run ends.
- any other option that names a file or folder becomes a copy in the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from videoclip import remote
from videoclip.errors import InputError
from videoclip.files import atomic_path, read_json, sha256, write_json, write_text
from videoclip.remote import SCHEMES, StorageError, is_remote
from videoclip.storage import cache_folder, inside, local_copy

READ_AS_NEEDED = ("shards", "videos_in")
RESULTS = (".json", ".jsonl", ".csv", ".html")  # an output that is a file; any other is a folder, whatever its name
REGISTRY = "files.json"  # in the store: every file of a run folder with size and SHA-256, written last
CLAIMS = ".running"  # in the store: who writes there now
EVERY = 60.0  # seconds between two copies; a claim that is five times as old is a dead run's
SMALL = 64 << 20  # bytes; larger files are never changed once they have their name

Config = TypeVar("Config")


@contextlib.contextmanager
def at_hand(config: Config) -> Iterator[Config]:
    """The options of a stage with local paths for what is in a store; the same object where nothing is.

    Raises InputError if an input is not there, another machine writes to the output, or several would here.
    """
    changes: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for item in dataclasses.fields(config):  # type: ignore[arg-type]  # a dataclass, which a TypeVar cannot say
            value = getattr(config, item.name)
            if item.name in READ_AS_NEEDED or not _names_remote(value):
                continue
            if item.name == "videos" and getattr(config, "streams_videos", False):
                continue
            if item.name == "videos" and not remote.look(Path(value)):
                raise InputError(f"{remote.uri(value)}: `extract` alone streams videos; mount or copy them for this")
            if item.name != "output":
                changes[item.name] = type(value)(local_copy(Path(value)))
            elif getattr(config, "address", None) and not os.environ.get("VIDEOCLIP_RUNS"):
                raise InputError(
                    f"--output {remote.uri(value)} with --address: the workers of all machines write to one folder; "
                    "set VIDEOCLIP_RUNS to one that they share, from where it is copied"
                )
            elif value.suffix in RESULTS:  # one file of results; others may come to lie beside it
                changes[item.name] = stack.enter_context(mirrored(value.parent)) / value.name
            else:
                changes[item.name] = stack.enter_context(mirrored(value))
        yield dataclasses.replace(config, **changes) if changes else config  # type: ignore[type-var]


def _names_remote(value: object) -> bool:
    if isinstance(value, Path):
        return is_remote(value)
    return isinstance(value, str) and value.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


@contextlib.contextmanager
def mirrored(target: Path) -> Iterator[Path]:
    """A local folder that holds what the remote folder `target` does, and whose new files are copied there.

    Raises InputError if another run writes there, StorageError if what was written could not be copied in the end.
    """
    from pipelines.runs import locked  # which brings Ray: not for verbs that have nothing in a store

    runs = Path(os.environ.get("VIDEOCLIP_RUNS") or cache_folder() / "runs")
    place = runs / hashlib.sha256(remote.uri(target).encode()).hexdigest()[:16]
    with locked(place, "a run"):
        mirror = Mirror(target, place / target.name)
        mirror.claim()
        try:
            mirror.pull()
            with mirror.pushing():
                yield mirror.home
            print(f"{mirror.home} is copied to {remote.uri(target)}")
        finally:
            mirror.give_up_claim()


class Mirror:
    """A run folder here, `home`, and its copy in a store, `target`, whose registry names every file of it."""

    def __init__(self, target: Path, home: Path) -> None:
        self.target, self.home = target, home
        self._claim = target / CLAIMS / _name_of(home.parent)
        self._local_registry = home.with_name(f"{home.name}.{REGISTRY}")  # as it was when both were the same
        self._registered: dict[str, list[Any]] = {}  # name -> bytes, SHA-256
        self._seen: dict[str, tuple[int, int]] = {}  # name -> size and time of what is registered

    def claim(self) -> None:
        """Say that this run writes there. Raises InputError if another does, by the store's clock."""
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        remote.write_bytes(self._claim, holder.encode())
        claims = remote.list_files(self.target / CLAIMS)
        own = next(claim for claim in claims if claim.path == self._claim)
        for other in claims:
            if other.path == self._claim:
                continue
            if (own.written - other.written).total_seconds() > 5 * EVERY:
                remote.delete(other.path)
                continue
            whose = remote.read_bytes(other.path)[:200].decode("utf-8", "replace")
            self.give_up_claim()
            raise InputError(
                f"{remote.uri(self.target)}: another run is writing here ({whose}); wait for it, or choose another "
                f"--output. If it was killed, try again in {5 * EVERY / 60:g} minutes"
            )

    def give_up_claim(self) -> None:
        """Let others write."""
        with contextlib.suppress(StorageError):
            remote.delete(self._claim)

    def pull(self) -> None:
        """Make `home` what the store has, unless it is what came from there and has only gone further since."""
        path = self.target / REGISTRY
        self._registered = _files_of(path) if remote.look(path) else {}
        is_known = self.home.exists() and self._local_registry.exists()
        if is_known and _files_of(self._local_registry) == self._registered:
            return
        for name, (size, digest) in self._registered.items():
            local = self.home / inside(self.home / name, self.home)
            if not (local.is_file() and local.stat().st_size == size and sha256(local) == digest):
                self._fetch(name, digest)
        for name in self._names() - self._registered.keys():  # of a run here that another has overtaken elsewhere
            (self.home / name).unlink()
        write_json(self._local_registry, {"files": self._registered})

    def _fetch(self, name: str, digest: str) -> None:
        with atomic_path(self.home / name) as temporary:
            with open(temporary, "wb") as file:
                for block in remote.read_blocks(self.target / name):
                    file.write(block)
            if sha256(temporary) != digest:
                raise InputError(f"{remote.uri(self.target / name)}: not what {REGISTRY} names; the file is damaged")

    def _names(self) -> set[str]:
        """Every finished file below `home`; hidden ones are of the run itself or not finished."""
        paths = (Path(folder) / name for folder, _, names in os.walk(self.home) for name in names)
        inner = (path.relative_to(self.home) for path in paths)
        return {str(name) for name in inner if not any(part.startswith(".") for part in name.parts)}

    def push(self) -> None:
        """Copy what is new or has changed, and then the registry; files that are no longer here go last.

        Json files, which name others, are read first and written after those.
        """
        names = sorted(self._names(), key=lambda name: (name.endswith(".json"), name))
        naming = {name: data for name in names if name.endswith(".json") and (data := self._read(name)) is not None}
        now = dict(self._registered)
        for name in sorted(self._names() - naming.keys()):
            self._copy(name, now)
        for name, data in naming.items():
            self._write(name, data, now)
        gone = now.keys() - self._names()
        for name in gone:
            del now[name]
        if now != self._registered:
            remote.write_bytes(self.target / REGISTRY, json.dumps({"files": now}, indent=1).encode())
            self._registered = now
            write_json(self._local_registry, {"files": now})
        for name in gone:
            remote.delete(self.target / name)

    def _read(self, name: str) -> bytes | None:
        """A small file's bytes; None where it has gone meanwhile, or is large."""
        try:
            path = self.home / name
            return path.read_bytes() if path.stat().st_size <= SMALL else None
        except FileNotFoundError:
            return None

    def _copy(self, name: str, now: dict[str, list[Any]]) -> None:
        """Copy one file, if it has changed, and note it in `now`."""
        path = self.home / name
        try:
            stat = path.stat()
            stamp = stat.st_size, stat.st_mtime_ns
            if self._seen.get(name) == stamp and name in now:
                return
            data = self._read(name)
            if data is not None:
                self._write(name, data, now)
                self._seen[name] = stamp
                return
            if name not in now or now[name] != [stat.st_size, sha256(path)]:
                now[name] = list(remote.upload(path, self.target / name))
            self._seen[name] = stamp
        except FileNotFoundError:
            return  # cleared away by the run meanwhile

    def _write(self, name: str, data: bytes, now: dict[str, list[Any]]) -> None:
        of_file = [len(data), hashlib.sha256(data).hexdigest()]
        if now.get(name) != of_file:
            remote.write_bytes(self.target / name, data)
        now[name] = of_file

    @contextlib.contextmanager
    def pushing(self) -> Iterator[None]:
        """Push every minute while the block runs, and when it ends, also by an error."""
        done = threading.Event()

        def keep_pushing() -> None:
            while not done.wait(EVERY):
                try:
                    self.push()
                    remote.write_bytes(self._claim, remote.read_bytes(self._claim))  # still alive
                except (OSError, InputError) as error:  # the next time may succeed; the last one must
                    print(f"{remote.uri(self.target)}: not up to date: {error}", file=sys.stderr)

        thread = threading.Thread(target=keep_pushing, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if self.home.exists():
                self.push()


def _name_of(place: Path) -> str:
    """A name that this folder keeps: whoever holds its lock may take over the claim of a run here that was killed."""
    path = place / "name"
    if not path.exists():
        write_text(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8")


def _files_of(registry: Path) -> dict[str, list[Any]]:
    """Raises InputError if this is no registry of files."""
    values = read_json(registry)
    files = values.get("files") if isinstance(values, dict) else None
    if not isinstance(files, dict) or any(not isinstance(of, list) or len(of) != 2 for of in files.values()):
        raise InputError(f"{registry}: not a registry of files")
    return files
