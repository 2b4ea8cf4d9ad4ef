"""HowTo100M's captions as a table on disk: read once as a stream, then every video's lines are found without the rest.

`raw_caption.json` has 9 GB and 1.2 million videos; as Python objects it would need some 30. It is parsed video by
video, and what each says goes into a mapped Arrow file, a batch of videos at a time. In memory stay a checksum and
a place for each video. A second file of the same size, time and name is taken for the first, and read no more.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from videoclip.errors import InputError
from videoclip.files import atomic_path

VIDEOS_AT_ONCE = 512  # in one record batch
READ_AT_ONCE = 1 << 20  # characters
LONGEST = 64 << 20  # characters of one video's captions as json: a stranger's file must not fill the memory


class CaptionTable(Mapping[str, Any]):
    """Captions by video id, each in the form that the file has it, not yet checked. In memory are 16 bytes a video.

    Where an id stands in the file twice, its last lines count, as in any reader of json.
    """

    def __init__(self, path: Path) -> None:
        """Open a table that `make` wrote. Raises InputError if it is none."""
        import pyarrow as pa

        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
            columns = [self._file.get_batch(n).column("digest") for n in range(self._file.num_record_batches)]
        except (pa.ArrowInvalid, KeyError, OSError) as error:
            raise InputError(f"{path}: {str(error).splitlines()[0]}; delete this file, it is made again") from None
        digests = np.concatenate([np.zeros(0, np.uint64), *(column.to_numpy() for column in columns)])
        self._order = np.argsort(digests, kind="stable").astype(np.int64)
        self._sorted = digests[self._order]

    @classmethod
    def make(cls, captions: Path, folder: Path) -> CaptionTable:
        """The table of a json file `{video_id: {"start": […], "end": […], "text": […]}}`; where it is not in `folder`,
        it is made first.

        Raises InputError if the file is not of this form.
        """
        captions = Path(captions)
        if not captions.is_file():
            raise InputError(f"{captions}: no such file")
        stat = captions.stat()
        identity = f"{captions.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"
        path = Path(folder) / f"table-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.arrow"
        if not path.exists():
            _write(path, captions)
        return cls(path)

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, video_id: object) -> bool:
        return isinstance(video_id, str) and self._row(video_id) >= 0

    def __iter__(self) -> Iterator[str]:
        """All ids, in the order of the file; read from the disk as they are asked for."""
        for number in range(self._file.num_record_batches):
            yield from self._file.get_batch(number).column("video_id").to_pylist()

    def __getitem__(self, video_id: str) -> Any:
        """What the file says of a video, mostly {"start": …, "end": …, "text": …}."""
        row = self._row(video_id)
        if row < 0:
            raise KeyError(video_id)
        return json.loads(self._cell("captions", row))

    def _row(self, video_id: str) -> int:
        wanted = _digest(video_id)
        place = int(np.searchsorted(self._sorted, wanted, side="right")) - 1
        while place >= 0 and self._sorted[place] == wanted:
            row = int(self._order[place])
            if self._cell("video_id", row) == video_id:
                return row
            place -= 1
        return -1

    def _cell(self, column: str, row: int) -> str:
        batch = self._file.get_batch(row // VIDEOS_AT_ONCE)
        return str(batch.column(column)[row % VIDEOS_AT_ONCE].as_py())


def _digest(video_id: str) -> np.uint64:
    """Eight bytes that stand for an id; where two share theirs the ids themselves are compared."""
    data = video_id.encode("utf-8", "replace")
    return np.uint64(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))


def _write(path: Path, captions: Path) -> None:
    import pyarrow as pa

    schema = pa.schema({"video_id": pa.string(), "captions": pa.large_string(), "digest": pa.uint64()})
    seen: array[int] = array("Q")
    ids: list[str] = []
    texts: list[str] = []

    def batch() -> Any:
        columns = [ids, texts, np.frombuffer(seen, np.uint64)[-len(ids) :].copy()]
        return pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, schema)], schema=schema)

    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for video_id, text in stream_object(captions):
            seen.append(int(_digest(video_id)))
            ids.append(video_id.encode("utf-8", "replace").decode())  # half a character is no text for Arrow
            texts.append(text)
            if len(ids) == VIDEOS_AT_ONCE:
                writer.write_batch(batch())
                ids, texts = [], []
        if ids:
            writer.write_batch(batch())


def stream_object(path: Path) -> Iterator[tuple[str, str]]:
    """The names of a json file that is one object, each with its value as the file spells it, in constant memory.

    Raises InputError if it is no such file, or a value is larger than a video's captions can be.
    """
    with open(path, encoding="utf-8") as file:
        window = _Window(file, path)
        if window.sign() not in ("{", ""):
            raise InputError(f'{path}: expected {{video_id: {{"start": [...], "end": [...], "text": [...]}}}}')
        window.take("{")
        while window.sign() != "}":
            name, _ = window.value()
            if not isinstance(name, str):
                raise InputError(f"{path}: not valid JSON (a name that is no text)")
            window.take(":")
            yield name, window.value()[1]
            if window.sign() != "}":
                window.take(",")
                if window.sign() == "}":
                    raise InputError(f"{path}: not valid JSON (a comma before the end)")
        window.take("}")
        if window.sign():
            raise InputError(f"{path}: not valid JSON (something behind its end)")


class _Window:
    """The stretch of a json file that is being parsed: it moves on as it is used."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._place = "", 0
        self._decoder = json.JSONDecoder()

    def _read_on(self) -> bool:
        """Forget what was used and read more; whether there was more."""
        left = self._text[self._place :]
        if len(left) > LONGEST:
            raise InputError(f"{self._path}: more than {LONGEST >> 20} MB between two video ids; these are no captions")
        try:
            block = self._file.read(max(READ_AT_ONCE, len(left)))
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path}: not valid JSON ({error})") from None
        self._text, self._place = left + block, 0
        return bool(block)

    def sign(self) -> str:
        """The next character that is no space, which stays; none at the end of the file."""
        while True:
            while self._place < len(self._text):
                if self._text[self._place] not in " \t\r\n":
                    return self._text[self._place]
                self._place += 1
            if not self._read_on():
                return ""

    def take(self, sign: str) -> None:
        """Go on behind `sign`, which must be next."""
        found = self.sign()
        if found != sign:
            raise InputError(f"{self._path}: not valid JSON (expected {sign!r}, not {found!r})")
        self._place += 1

    def value(self) -> tuple[Any, str]:
        """The next value, and how it is spelt.

        What ends where the window does may go on behind it: it is read again when more is there.
        """
        self.sign()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
                if end < len(self._text) or not self._read_on():
                    first, self._place = self._place, min(end, len(self._text))
                    return value, self._text[first : self._place]
            except RecursionError:
                raise InputError(f"{self._path}: lists in lists, too deep for captions") from None
            except json.JSONDecodeError as error:
                if not self._read_on():
                    raise InputError(f"{self._path}: not valid JSON ({error.msg})") from None
