"""A list of videos as a file that is mapped: a million rows at hand, some bytes of each in memory.

It is written while a list is read and lives as long as the run. In memory are eight bytes of a checksum of every id,
and their order: enough to find a row by its id, and ids that stand in the list twice.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.data.video_lists import PICTURE_SUFFIXES, BadRow, ListedVideo, Row, local_path
from videoclip.errors import InputError
from videoclip.files import atomic_path

LIST = "list.arrow"
ROWS_AT_ONCE = 4096  # in one record batch


def digest(video_id: str) -> int:
    """Eight bytes that stand for an id. Among ten million ids two share theirs with a chance of three in a million."""
    return int.from_bytes(hashlib.blake2b(video_id.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def digests_of(video_ids: Iterable[str]) -> np.ndarray:
    """uint64 [N]."""
    return np.frombuffer(array("Q", map(digest, video_ids)), np.uint64)


class VideoList(Mapping[str, Path]):
    """Rows of a stored list; as a mapping, where the video of an id is. Rows whose id came earlier are not in it."""

    def __init__(self, path: Path, digests: np.ndarray) -> None:
        """`digests` (uint64 [N]) are those of the ids in the file."""
        import pyarrow as pa

        self.path = path
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._order = np.argsort(digests, kind="stable")
        self._sorted = digests[self._order]
        first = np.ones(len(digests), bool)
        first[1:] = self._sorted[1:] != self._sorted[:-1]
        self._repeated = np.sort(self._order[~first])
        self.digests = digests
        self.good_rows = np.sort(self._order[first])  # int64: rows whose id is new
        self.has_captions = False

    @classmethod
    def write(cls, folder: Path, rows: Iterable[Row], bad: Callable[[str, str, str], None]) -> VideoList:
        """Store rows in `folder/list.arrow`. `bad` gets those that cannot be used: name, reason, and whether
        it is the row or the file that is left out."""
        import pyarrow as pa

        path, digests = Path(folder) / LIST, array("Q")
        waiting: list[ListedVideo] = []
        said = False
        with (
            atomic_path(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, _schema()) as writer,
        ):
            for row in rows:
                if isinstance(row, BadRow):
                    bad(row.name, row.reason, "row")
                    continue
                digests.append(digest(row.video_id))
                waiting.append(row)
                said = said or row.said is not None
                if len(waiting) == ROWS_AT_ONCE:
                    writer.write_batch(_to_arrow(waiting))
                    waiting = []
            if waiting:
                writer.write_batch(_to_arrow(waiting))
        videos = cls(path, np.frombuffer(digests, np.uint64))
        videos.has_captions = said
        for row_number in videos._repeated.tolist():
            repeated = videos.row(row_number)
            reason = f"the id is taken by {videos.row(videos.row_of_digest(digest(repeated.video_id))).location}"
            bad(repeated.video_id, f"{repeated.location}: {reason}; the second file is left out", "file")
        return videos

    def pictures(self) -> np.ndarray:
        """bool [rows]: which rows are pictures, a token each."""
        import pyarrow.compute as compute

        found = [np.zeros(0, bool)]
        pattern = "(?i)(" + "|".join(suffix.replace(".", "[.]") for suffix in PICTURE_SUFFIXES) + ")$"
        for number in range(self._file.num_record_batches):
            batch = self._file.get_batch(number)
            named = compute.match_substring_regex(batch.column("location"), pattern)
            found.append(compute.or_(named, batch.column("offset").is_valid()).to_numpy(zero_copy_only=False))
        return np.concatenate(found)

    def row(self, number: int) -> ListedVideo:
        """One row by its number, those of repeated ids included."""
        return self.rows([number])[0]

    def rows(self, numbers: Sequence[int]) -> list[ListedVideo]:
        """Rows by their numbers."""
        found = []
        for number in numbers:
            batch = self._file.get_batch(int(number) // ROWS_AT_ONCE)
            values = batch.slice(int(number) % ROWS_AT_ONCE, 1).to_pylist()[0]
            found.append(ListedVideo(**values))
        return found

    def row_of_digest(self, number: int) -> int:
        """The first row of an id, by its digest; -1 where there is none."""
        place = int(np.searchsorted(self._sorted, np.uint64(number)))
        if place == len(self._sorted) or int(self._sorted[place]) != number:
            return -1
        return int(self._order[place])

    def rows_of_digests(self, digests: np.ndarray) -> np.ndarray:
        """int64: the first row of each id, -1 where there is none."""
        if not len(self._sorted):
            return np.full(len(digests), -1)
        places = np.minimum(np.searchsorted(self._sorted, digests), len(self._sorted) - 1)
        return np.where(self._sorted[places] == digests, self._order[places], -1)

    def find(self, video_id: str) -> ListedVideo | None:
        """The row of an id."""
        number = self.row_of_digest(digest(video_id))
        return None if number < 0 else self.row(number)

    def __getitem__(self, video_id: str) -> Path:
        row = self.find(video_id)
        if row is None:
            raise KeyError(video_id)
        return local_path(row.location)

    def __contains__(self, video_id: object) -> bool:
        return isinstance(video_id, str) and self.row_of_digest(digest(video_id)) >= 0

    def __iter__(self) -> Iterator[str]:
        return (row.video_id for row in map(self.row, self.good_rows.tolist()))

    def __len__(self) -> int:
        return len(self.good_rows)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of ids and captions: what the captions of a list depend on."""
        total = hashlib.sha256()
        for number in range(self._file.num_record_batches):
            batch = self._file.get_batch(number)
            for name in ("video_id", "said"):
                total.update(
                    "\0".join(str(value) for value in batch.column(name).to_pylist()).encode("utf-8", "replace")
                )
        return total.hexdigest()


def _schema() -> Any:
    import pyarrow as pa

    fields = {"video_id": pa.string(), "location": pa.string(), "start": pa.float64(), "end": pa.float64()}
    return pa.schema({**fields, "said": pa.string(), "offset": pa.int64(), "size": pa.int64()})


def _to_arrow(rows: list[ListedVideo]) -> Any:
    import pyarrow as pa

    columns = [pa.array([getattr(row, name) for row in rows], field.type) for name, field in _fields()]
    return pa.record_batch(columns, schema=_schema())


def _fields() -> list[tuple[str, Any]]:
    schema = _schema()
    return [(name, schema.field(name)) for name in schema.names]


def refuse_empty(videos: VideoList, source: Path) -> None:
    """Raises InputError if a list names no video."""
    if not len(videos):
        raise InputError(f"{source}: names no video")
