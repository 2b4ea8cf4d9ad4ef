"""Files in S3, Google Cloud Storage and HDFS, through pyarrow's filesystems: listed, read and written, again and again
where that fails.

Such a file is named by a `Path` whose first part is a scheme: `Path("s3://bucket/tokens")`, of which pathlib keeps one
slash, which means the same here. Everything else is a local path, and no function here is needed for it.

Stores of objects have no renames. What is written appears whole or not at all, and what consists of several objects
has one, written last, that names the others with their checksums. Who reads looks there first.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from videoclip.errors import InputError

SCHEMES = ("s3", "gs", "hdfs")
ATTEMPTS = 6  # at one request, half a minute in all where each is refused at once
FIRST_WAIT = 0.5  # seconds, before the second attempt; then twice as long each time, with half of it by chance
SECONDS = 60.0  # that one request may take: a connection that says nothing is given up and made anew
BLOCK = 8 << 20  # bytes of one request, small enough for SECONDS on a slow line
FINAL = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")  # AWS says so

T = TypeVar("T")


class StorageError(OSError):
    """A store did not answer as it should, ATTEMPTS times; what was asked may succeed later."""


@dataclass(frozen=True)
class RemoteFile:
    """One file in a store: its path, size, and by the store's clock when it was written."""

    path: Path
    bytes: int
    written: datetime


def is_remote(path: Path | str) -> bool:
    """Whether this names a file or folder in a store, and not on this machine."""
    return Path(path).parts[:1] in {(f"{scheme}:",) for scheme in SCHEMES}


def uri(path: Path | str) -> str:
    """`s3://bucket/key` of a remote path.

    Raises InputError if it has options behind a question mark: where a store is, the environment says.
    """
    scheme, *rest = Path(path).parts
    if not rest or "?" in str(path):
        raise InputError(
            f"{path}: expected {scheme}//bucket/path without options; an endpoint is set by AWS_ENDPOINT_URL"
        )
    return f"{scheme}//{'/'.join(rest)}"


def absolute(path: Path) -> Path:
    """A local path made absolute; a remote one is."""
    return path if is_remote(path) else path.resolve()


# --- One request --------------------------------------------------------------------------------------------------


def _store(path: Path) -> tuple[Any, str]:
    """The filesystem of a remote path, and its name there."""
    scheme, host, *rest = Path(uri(path).replace("://", "/", 1)).parts
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    filesystem = _connected(scheme, host, os.getpid(), endpoint)
    return filesystem, "/" + "/".join(rest) if scheme == "hdfs" else "/".join((host, *rest))


@functools.lru_cache(maxsize=16)
def _connected(scheme: str, host: str, process: int, endpoint: str) -> Any:
    """A filesystem; every process has its own, because connections do not survive a fork."""
    from pyarrow import fs

    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=SECONDS))
    if scheme == "hdfs":
        name, _, port = host.partition(":")
        return fs.HadoopFileSystem(name, int(port) if port else 8020)
    protocol, _, server = endpoint.rpartition("://")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region and not endpoint:
        region = fs.resolve_s3_region(host)
    return fs.S3FileSystem(
        region=region or "us-east-1",
        endpoint_override=server or None,
        scheme=protocol or "https",
        allow_delayed_open=True,  # a small object is one request
        connect_timeout=10,
    )


def _persistently(request: Callable[[], T], path: Path, limited: bool = True) -> T:
    """What `request()` returns, asked again after errors of the store; `limited`: also where none comes within SECONDS.

    Raises InputError if there is no such file or access, and StorageError after ATTEMPTS.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1) * (0.5 + random.random() / 2))
        try:
            return _within(SECONDS, request) if limited else request()
        except FileNotFoundError:
            raise InputError(f"{uri(path)}: no such file") from None
        except OSError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if any(word in reason for word in FINAL):
                raise InputError(f"{uri(path)}: {reason}") from None
    raise StorageError(f"{uri(path)}: {reason} ({ATTEMPTS} attempts)")


def _within(seconds: float, request: Callable[[], T]) -> T:
    """`request()`, given up after `seconds`. A thread that waits for a dead connection is left to itself."""
    done: list[T] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            done.append(request())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return done[0]


# --- Looking and reading ------------------------------------------------------------------------------------------


def list_files(folder: Path) -> list[RemoteFile]:
    """All files below a folder, by name; none if there is no such folder."""
    from pyarrow import fs

    filesystem, name = _store(folder)
    selector = fs.FileSelector(name, recursive=True, allow_not_found=True)
    found = _persistently(lambda: filesystem.get_file_info(selector), folder)
    files = [
        RemoteFile(folder / os.path.relpath(info.path, name), info.size, info.mtime)
        for info in found
        if info.type == fs.FileType.File
    ]
    return sorted(files, key=lambda file: str(file.path))


def look(path: Path) -> RemoteFile | None:
    """What there is to say of a file; None where there is none."""
    from pyarrow import fs

    filesystem, name = _store(path)
    info = _persistently(lambda: filesystem.get_file_info(name), path)
    return RemoteFile(path, info.size, info.mtime) if info.type == fs.FileType.File else None


def read_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a BLOCK at a time.

    Raises InputError if there is no such file; StorageError if it cannot be read, or changes its length meanwhile.
    """
    reader = RemoteReader(path, blocks=1)
    while block := reader.read(BLOCK):
        yield block


def read_bytes(path: Path) -> bytes:
    """All of a file, for small ones. Raises as `read_blocks`."""
    return b"".join(read_blocks(path))


class RemoteReader(io.RawIOBase):
    """A file in a store as a stream that can be read anywhere, for instance by a decoder of videos.

    It fetches BLOCK bytes at a time, or `block`, and keeps the `blocks` used last: a decoder jumps between a table at
    one end of a file and pictures all over it. A block that comes short is fetched again.
    """

    def __init__(self, path: Path, block: int = BLOCK, blocks: int = 4) -> None:
        super().__init__()
        self.path, self._block, self._limit = path, block, blocks
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._file = _persistently(self._open, path)
        self.bytes = int(_persistently(lambda: self._file.size(), path))
        self._place = 0

    def _open(self) -> Any:
        filesystem, name = _store(self.path)
        return filesystem.open_input_file(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.bytes}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the present place; at the end of the file with less."""
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view) and self._place < self.bytes:
            number, offset = divmod(self._place, self._block)
            piece = memoryview(self._fetched(number))[offset : offset + len(view) - filled]
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._place += len(piece)
        return filled

    def _fetched(self, number: int) -> bytes:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        first = number * self._block
        count = min(self._block, self.bytes - first)
        block = _persistently(lambda: self._fetch(first, count), self.path)
        self._kept[number] = block
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return block

    def _fetch(self, first: int, count: int) -> bytes:
        try:
            block: bytes = self._file.read_at(count, first)
        except OSError:
            self._file = self._open()  # the connection may be what is broken
            raise
        if len(block) != count:
            raise OSError(f"{len(block)} bytes where {count} were asked for at {first}")
        return block


# --- Writing ------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all. Raises StorageError if it cannot be written."""
    _write(path, lambda: iter((data,)), len(data))


def upload(local: Path, path: Path) -> tuple[int, str]:
    """Write a local file to `path`, where it appears whole or not at all; of one that grows, what it has now.

    Returns the number of its bytes and their SHA-256. Raises StorageError if it cannot be written.
    """
    size, digest = local.stat().st_size, hashlib.sha256()

    def blocks() -> Iterator[bytes]:
        nonlocal digest
        digest, left = hashlib.sha256(), size
        with open(local, "rb") as file:
            while left and (block := file.read(min(BLOCK, left))):
                digest.update(block)
                left -= len(block)
                yield block

    _write(path, blocks, size)
    return size, digest.hexdigest()


def _write(path: Path, blocks: Callable[[], Iterator[bytes]], size: int) -> None:
    filesystem, name = _store(path)
    has_renames = uri(path).startswith("hdfs:")

    def attempt() -> None:
        target = f"{name}.{random.randrange(16**12):012x}.tmp" if has_renames else name
        if has_renames:
            filesystem.create_dir(os.path.dirname(name), recursive=True)
        stream = filesystem.open_output_stream(target)
        try:
            for block in blocks():
                _within(SECONDS, functools.partial(stream.write, block))
        finally:
            _within(SECONDS, stream.close)
        written = filesystem.get_file_info(target).size
        if written != size:
            raise OSError(f"{written} bytes are there where {size} were written")
        if has_renames:
            filesystem.move(target, name)

    _persistently(attempt, path, limited=False)  # every block has SECONDS of its own, the whole as long as it needs


def delete(path: Path) -> None:
    """Delete a file, if it is there."""
    filesystem, name = _store(path)

    def attempt() -> None:
        try:
            filesystem.delete_file(name)
        except FileNotFoundError:
            return

    _persistently(attempt, path)
