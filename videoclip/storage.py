"""Folders in stores of objects as programs here use them: a cache of what is read, and copies of what is written.

The cache is a folder of this machine, `VIDEOCLIP_CACHE` (`~/.cache/videoclip`), that holds up to `VIDEOCLIP_CACHE_GB`
(100) of files of shards. They are kept by checksum, so nothing is taken from it, or put into it, that is not what a
manifest names. What was used longest ago goes first. Any number of processes share it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from videoclip import remote
from videoclip.errors import InputError
from videoclip.files import atomic_path
from videoclip.remote import RemoteFile, StorageError, is_remote

ATTEMPTS = 3  # at a file whose bytes are not those that were written; each in itself is patient
GIGABYTE = 10**9


def cache_folder() -> Path:
    """Where this machine keeps copies of what is in stores."""
    return Path(os.environ.get("VIDEOCLIP_CACHE") or Path.home() / ".cache" / "videoclip")


def cache_limit() -> int:
    """Bytes that files of shards may have there together. Raises InputError if the environment gives no number."""
    text = os.environ.get("VIDEOCLIP_CACHE_GB", "100")
    try:
        limit = float(text) * GIGABYTE
    except ValueError:
        limit = 0
    if not 0 < limit < 1e18:
        raise InputError(f"VIDEOCLIP_CACHE_GB={text}: expected a number of gigabytes")
    return int(limit)


# --- Files of shards ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fetched(path: Path, size: int, digest: str) -> Iterator[Path]:
    """A file to open: `path` itself, or of a remote one the copy in the cache, fetched if it is not there.

    `size` and `digest`, its SHA-256, say what it must be. While the block runs nobody evicts it; what was opened or
    mapped then stays readable. Raises InputError if the file is missing, is another, or larger than the cache.
    """
    if not is_remote(path):
        yield path
        return
    folder = cache_folder() / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / digest
    with _lock(folder / f".{digest}.lock", fcntl.LOCK_SH):
        if _is_kept(kept, size):
            os.utime(kept)  # when it was last used
            yield kept
            return
    with _lock(folder / f".{digest}.lock", fcntl.LOCK_EX):
        if not _is_kept(kept, size):  # another process may have fetched it meanwhile
            _make_room(folder, size, digest)
            _fetch(path, kept, size, digest)
        os.utime(kept)
        yield kept


def _is_kept(kept: Path, size: int) -> bool:
    try:
        return kept.stat().st_size == size
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _lock(path: Path, kind: int) -> Iterator[None]:
    """Hold a file's lock; `kind` as of flock. Lock files are never removed: who waits for one must wait for the same.

    Raises BlockingIOError if `kind` says not to wait and another holds it.
    """
    with open(path, "a") as file:
        fcntl.flock(file, kind)
        yield


class _OtherBytes(Exception):
    """What came is not what was asked for."""


def _fetch(path: Path, to: Path, size: int, digest: str) -> None:
    """Bring a file here; it appears under its name when its checksum is right."""
    for _ in range(ATTEMPTS):
        with contextlib.suppress(_OtherBytes), atomic_path(to) as temporary:
            got, count = hashlib.sha256(), 0
            with open(temporary, "wb") as file:
                for block in remote.read_blocks(path):
                    got.update(block)
                    count += file.write(block)
                    if count > size:
                        break
            if got.hexdigest() != digest:
                raise _OtherBytes
            return
    raise InputError(f"{remote.uri(path)}: its checksum is not the manifest's; the file is damaged")


def _make_room(folder: Path, size: int, keep: str) -> None:
    """Evict what was used longest ago until `size` bytes more fit the limit. What is being opened stays."""
    limit = cache_limit()
    if size > limit:
        raise InputError(f"VIDEOCLIP_CACHE_GB: the cache of {limit / GIGABYTE:g} GB is smaller than one file of shards")
    with _lock(folder / ".evicting.lock", fcntl.LOCK_EX):
        files = [(entry.stat(), entry.name) for entry in os.scandir(folder) if not entry.name.startswith(".")]
        files.sort(key=lambda file: file[0].st_mtime_ns)
        total = sum(stat.st_size for stat, _ in files)
        for stat, name in files:
            if total + size <= limit:
                return
            if name == keep:
                continue
            with contextlib.suppress(BlockingIOError), _lock(folder / f".{name}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
                (folder / name).unlink(missing_ok=True)
                total -= stat.st_size


def sizes_in(folder: Path, total: int) -> dict[str, int] | None:
    """Bytes of every file of a remote folder of shards, by name, with one request; None of a local one.

    It is said where files of `total` bytes do not fit the cache together.
    """
    if not is_remote(folder):
        return None
    if total > cache_limit():
        logging.getLogger("videoclip").warning(
            f"{remote.uri(folder)}: {total / GIGABYTE:.1f} GB of shards do not fit the cache of "
            f"{cache_limit() / GIGABYTE:g} GB (VIDEOCLIP_CACHE_GB): files will be fetched again and again"
        )
    return {file.path.name: file.bytes for file in remote.list_files(folder) if file.path.parent == folder}


# --- Other files --------------------------------------------------------------------------------------------------


def local_copy(path: Path) -> Path:
    """A local path with the same file, or the same folder but for parts of shards; local ones are returned as they are.

    Copies lie in the cache and are fetched again when the store has others. Raises InputError if there is nothing.
    """
    if not is_remote(path):
        return path
    name = hashlib.sha256(remote.uri(path).encode()).hexdigest()[:16]
    home = cache_folder() / "copies" / name
    home.mkdir(parents=True, exist_ok=True)
    with _lock(home / ".lock", fcntl.LOCK_EX):
        single = remote.look(path)
        files = [single] if single else [file for file in remote.list_files(path) if file.path.suffix != ".arrow"]
        if not files:
            raise InputError(f"{remote.uri(path)}: no such file or folder")
        for file in files:
            _copy(file, home / path.name if single else home / path.name / inside(file.path, path))
    return home / path.name


def inside(path: Path, folder: Path) -> str:
    """The name of a file below a folder. Raises InputError if it would lead out of it: names are a stranger's."""
    name = os.path.relpath(path, folder)
    if name.startswith("..") or any(part in ("", ".", "..") for part in Path(name).parts):
        raise InputError(f"{path}: not a file name below {folder}")
    return name


def _copy(file: RemoteFile, to: Path) -> None:
    """Fetch a file unless the copy there is of the same size and time."""
    stamp = file.written.timestamp()
    with contextlib.suppress(FileNotFoundError):
        there = to.stat()
        if there.st_size == file.bytes and abs(there.st_mtime - stamp) < 1e-3:
            return
    with atomic_path(to) as temporary:
        with open(temporary, "wb") as target:
            for block in remote.read_blocks(file.path):
                target.write(block)
        if temporary.stat().st_size != file.bytes:
            raise StorageError(f"{remote.uri(file.path)}: was changed while it was read; try again")
        os.utime(temporary, (stamp, stamp))
