"""Videos as tokens on disk: Arrow IPC files that are memory-mapped and read without copying.

A folder of shards holds `part-00000.arrow` …, `manifest.json`, the frozen encoder that made the tokens
(`video_encoder.json` and `.safetensors`) and `quarantine.jsonl`, the videos that could not be used and why.
One row of a part is one video: `video_id`, `duration` in seconds, `tokens` float16 [T, D] (one row a second), and
its captions. A part is written once, under a temporary name, synced and renamed; then the manifest names it.
Captions that were given or changed later lie beside the part, in `captions-00000-<digest>.arrow`, and go before those
inside it: tokens cost days, captions minutes, so they can be made again alone (`recaption.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.data.captions import Captions
from videoclip.data.lazy import Lazy, open_files
from videoclip.errors import InputError
from videoclip.files import atomic_path, read_json, sha256, write_json
from videoclip.remote import is_remote, look
from videoclip.storage import fetched, sizes_in

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
FROZEN = "frozen"  # in place of a model's folder: the two-tower model that made the shards


@dataclass(frozen=True)
class VideoRecord:
    """One video: `duration` in seconds, `tokens` float16 [T, D], row t covers seconds [t, t + 1)."""

    video_id: str
    duration: float
    tokens: np.ndarray
    captions: Captions


@dataclass(frozen=True)
class CaptionFile:
    """What the manifest says of the captions that lie beside a part."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """What the manifest says of one Arrow file. `seconds` is its number of token rows.

    `captions` is the file that holds its captions, where they are no longer those inside it.
    """

    name: str
    videos: int
    seconds: int
    bytes: int
    sha256: str
    captions: CaptionFile | None = None

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 that stands for tokens and captions together."""
        if self.captions is None:
            return self.sha256
        return hashlib.sha256(f"{self.sha256}{self.captions.sha256}".encode()).hexdigest()


@dataclass
class Manifest:
    """`manifest.json`: which encoder made these tokens, and every finished part."""

    encoder: str
    fingerprint: str
    dimension: int
    tokens_per_second: int = 1
    schema_version: int = SCHEMA_VERSION
    complete: bool = False
    parts: list[Part] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises InputError if the folder holds no manifest, or one of another form or version."""
        path = Path(folder) / MANIFEST
        if not (look(path) if is_remote(path) else path.is_file()):
            raise InputError(f"{folder}: holds no {MANIFEST}; is this a folder that `videoclip extract` wrote?")
        values = read_json(path)
        try:
            if values["schema_version"] != SCHEMA_VERSION:
                raise InputError(f"{path}: schema version {values['schema_version']}, this reads {SCHEMA_VERSION}")
            return cls(**{**values, "parts": [_read_part(part) for part in values["parts"]]})
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: not a manifest of shards ({error})") from None

    def write(self, folder: Path) -> None:
        """Write atomically into `folder`."""
        values = asdict(self)
        for part in values["parts"]:
            if part["captions"] is None:
                del part["captions"]
        write_json(Path(folder) / MANIFEST, values)


def _read_part(values: dict[str, Any]) -> Part:
    captions = values.get("captions")
    return Part(**{**values, "captions": None if captions is None else CaptionFile(**captions)})


class ShardWriter:
    """Append videos; every `videos_per_part` of them become a part that is never written again.

    `manifest` describes the encoder. If `folder` already has an unfinished manifest of the same encoder, writing
    goes on after its last part.

    Raises InputError if the folder holds the tokens of another encoder, or is complete.
    """

    def __init__(self, folder: Path, manifest: Manifest, videos_per_part: int = 256) -> None:
        self.folder = Path(folder)
        self.videos_per_part = videos_per_part
        self.manifest = manifest
        self._waiting: list[VideoRecord] = []
        if (self.folder / MANIFEST).exists():
            self.manifest = Manifest.read(self.folder)
            check_encoder(self.manifest, manifest.fingerprint, manifest.encoder, self.folder)
        else:
            self.manifest.write(self.folder)

    def add(self, record: VideoRecord) -> None:
        """Take one video.

        Raises InputError if its tokens have the wrong width, no row, or values that are not finite.
        """
        check_tokens(record.tokens, self.manifest.dimension, record.video_id)
        self._waiting.append(record)
        if len(self._waiting) == self.videos_per_part:
            self._write_part()

    def close(self) -> Manifest:
        """Write what is left and mark the folder complete."""
        if self._waiting:
            self._write_part()
        self.manifest.complete = True
        self.manifest.write(self.folder)
        return self.manifest

    def _write_part(self) -> None:
        name = f"part-{len(self.manifest.parts):05d}.arrow"
        self.manifest.parts.append(write_part(self.folder, name, self._waiting, self.manifest.dimension))
        self.manifest.complete = False  # until `close`, also where videos are added to a folder that was complete
        self.manifest.write(self.folder)
        self._waiting = []


def write_part(folder: Path, name: str, records: list[VideoRecord], dimension: int) -> Part:
    """Write one part, which no manifest names yet. The same records make the same bytes."""
    import pyarrow as pa

    with atomic_path(folder / name) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink:
            write_batch(sink, _to_arrow(records, dimension))
        digest, size = sha256(temporary), temporary.stat().st_size
    return Part(name, len(records), sum(len(record.tokens) for record in records), size, digest)


class Shards:
    """Read-only view of a folder of shards: rows are videos, counted through all parts.

    Opening reads the manifest and looks at the files' sizes; a part is mapped when it is first touched and closed
    again when many others were touched since, unless an array that views it still lives. Parts in a store are
    fetched into this machine's cache for that (`storage.py`), where their checksums are verified in any case.
    Raises InputError if a part is missing or disagrees with the manifest (with `verify`, also by checksum).
    """

    def __init__(self, folder: Path, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if not self.manifest.parts:
            raise InputError(f"{self.folder}: holds no finished part yet; run `videoclip extract` to the end")
        sizes = sizes_in(self.folder, sum(part.bytes for part in self.manifest.parts))
        for part in self.manifest.parts:
            check_part(self.folder, part, verify, sizes)
        directory, manifest = self.folder, self.manifest  # not self: a circle would keep maps open until it is found
        self.parts = Lazy(
            len(manifest.parts),
            lambda number: open_part(directory, manifest.parts[number], manifest.dimension),
            limit=open_files() // 8,  # two descriptors a part at most; the rest of the process needs some too
        )
        self.first_rows = np.cumsum([0] + [part.videos for part in self.manifest.parts])

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __iter__(self) -> Iterator[VideoRecord]:
        return (self.record(row) for row in range(len(self)))

    def locate(self, row: int) -> tuple[int, int]:
        """Part number and row inside that part."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        part = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return part, row - int(self.first_rows[part])

    def record(self, row: int) -> VideoRecord:
        """One video, its tokens a view of the mapped file."""
        part, inside = self.locate(row)
        return self.parts[part].record(inside)

    def tokens(self, row: int) -> np.ndarray:
        """float16 [T, D], a view of the mapped file."""
        part, inside = self.locate(row)
        return self.parts[part].tokens(inside)

    def video_ids(self) -> list[str]:
        """All ids, in row order.

        Raises InputError if two videos have the same one: an answer could not say which it means.
        """
        ids = [video_id for part in self.parts for video_id in part.video_ids()]
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            rows = [row for row, video_id in enumerate(ids) if video_id == twice]
            raise InputError(f"{self.folder}: the video id {twice!r} stands in rows {', '.join(map(str, rows))}")
        return ids

    def rows_by_id(self) -> dict[str, int]:
        """Row of every video id. Raises InputError as `video_ids` does."""
        return {video_id: row for row, video_id in enumerate(self.video_ids())}

    def seconds(self) -> np.ndarray:
        """int64 [N]: token rows of every video."""
        return np.concatenate([np.diff(part.token_offsets) for part in self.parts])


def open_part(folder: Path, part: Part, dimension: int) -> PartReader:
    """Map one part, with the captions beside it if it has any there."""
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(fetched(folder / part.name, part.bytes, part.sha256))
        captions = None
        if (beside := part.captions) is not None:
            captions = stack.enter_context(fetched(folder / beside.name, beside.bytes, beside.sha256))
        return PartReader(path, dimension, captions)


class PartReader:
    """One memory-mapped Arrow file. Offsets say where the rows of a video lie in the flat columns.

    Maps stay open as long as the reader or arrays that view it live.
    """

    def __init__(self, path: Path, dimension: int, captions: Path | None = None) -> None:
        """`captions` is the file that holds the captions, where they are not those inside the part."""
        batch = _map_batch(path)
        of_captions = batch if captions is None else _map_batch(captions)
        try:
            tokens = batch.column("tokens")
            self.token_offsets = tokens.offsets.to_numpy()
            self.flat_tokens = tokens.values.values.to_numpy(zero_copy_only=True).reshape(-1, dimension)
            self._ids, self._durations = batch.column("video_id"), batch.column("duration").to_numpy()
        except (KeyError, ValueError, AttributeError) as error:
            raise _unreadable(path, error) from None
        try:
            starts, ends = of_captions.column("caption_start"), of_captions.column("caption_end")
            self.caption_offsets = starts.offsets.to_numpy()
            self.caption_start = starts.values.to_numpy(zero_copy_only=True)
            self.caption_end = ends.values.to_numpy(zero_copy_only=True)
            self.caption_text = of_captions.column("caption_text").values
        except (KeyError, ValueError, AttributeError) as error:
            raise _unreadable(captions or path, error) from None
        if len(of_captions) != len(batch):
            raise InputError(f"{captions}: captions of {len(of_captions)} videos where the part has {len(batch)}")

    def __len__(self) -> int:
        return len(self._ids)

    def video_ids(self) -> list[str]:
        return self._ids.to_pylist()

    def tokens(self, row: int) -> np.ndarray:
        return self.flat_tokens[self.token_offsets[row] : self.token_offsets[row + 1]]

    def captions(self, row: int) -> Captions:
        first, last = int(self.caption_offsets[row]), int(self.caption_offsets[row + 1])
        texts = self.caption_text.slice(first, last - first).to_pylist()
        return Captions(self.caption_start[first:last], self.caption_end[first:last], texts)

    def record(self, row: int) -> VideoRecord:
        duration = float(self._durations[row])
        return VideoRecord(self._ids[row].as_py(), duration, self.tokens(row), self.captions(row))


def check_part(folder: Path, part: Part, verify: bool, sizes: Mapping[str, int] | None = None) -> None:
    """Raises InputError, naming the part, if the file is not the one that the manifest describes.

    `sizes` by name are given for folders in a store, whose parts are verified when they are fetched.
    """
    for file in (part, part.captions):
        if file is None:
            continue
        path = Path(folder) / file.name
        if Path(file.name).name != file.name:
            raise InputError(f"{folder}: the manifest names a part outside the folder: {file.name!r}")
        size = sizes.get(file.name) if sizes is not None else path.stat().st_size if path.is_file() else None
        if size is None:
            raise InputError(f"{path}: the manifest lists this part but it is missing; extract again into a new folder")
        if size != file.bytes:
            raise InputError(f"{path}: {size} bytes where the manifest says {file.bytes}; the part is damaged")
        if verify and sizes is None and sha256(path) != file.sha256:
            raise InputError(f"{path}: its checksum is not the manifest's; the part is damaged")


def check_encoder(manifest: Manifest, fingerprint: str, encoder: str, where: Path | str) -> None:
    """Raises InputError if tokens were made by another encoder than `fingerprint` stands for."""
    if manifest.fingerprint != fingerprint:
        raise InputError(
            f"{where}: tokens of the encoder {manifest.encoder} ({manifest.fingerprint[:12]}), but expected "
            f"{encoder} ({fingerprint[:12]}); extract into another folder with the encoder you mean"
        )


def check_tokens(tokens: np.ndarray, dimension: int, video_id: str) -> None:
    """Raises InputError if tokens are not [T >= 1, dimension] finite numbers."""
    if tokens.ndim != 2 or tokens.shape[1] != dimension:
        raise InputError(f"video {video_id!r}: tokens of shape {tokens.shape}, expected [seconds, {dimension}]")
    if not len(tokens):
        raise InputError(f"video {video_id!r}: no tokens")
    if not np.isfinite(tokens).all():
        raise InputError(f"video {video_id!r}: tokens that are not finite numbers")


def _map_batch(path: Path) -> Any:
    """The one record batch of an Arrow file, mapped."""
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not a readable part ({str(error).splitlines()[0]})")


def write_batch(sink: Any, batch: Any) -> None:
    """Write one record batch as an Arrow file into an open pyarrow stream."""
    import pyarrow as pa

    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _to_arrow(records: list[VideoRecord], dimension: int) -> Any:
    import pyarrow as pa

    flat = np.concatenate([np.asarray(record.tokens, np.float16) for record in records]).reshape(-1)
    token_offsets = _offsets(len(record.tokens) for record in records).astype(np.int64)
    columns = {
        "video_id": pa.array([record.video_id for record in records], pa.string()),
        "duration": pa.array([record.duration for record in records], pa.float64()),
        "tokens": pa.LargeListArray.from_arrays(
            pa.array(token_offsets), pa.FixedSizeListArray.from_arrays(pa.array(flat), dimension)
        ),
    }
    captions = captions_to_arrow([record.captions for record in records])
    return pa.record_batch([*columns.values(), *captions.columns], names=[*columns, *captions.schema.names])


def captions_to_arrow(captions: list[Captions]) -> Any:
    """A record batch with the three caption columns of a part, one row a video."""
    import pyarrow as pa

    offsets = _offsets(len(of_video) for of_video in captions).astype(np.int32)

    def per_caption(values: Any) -> Any:
        return pa.ListArray.from_arrays(pa.array(offsets), values)

    columns = {
        "caption_start": per_caption(pa.array(np.concatenate([c.start for c in captions]), pa.float32())),
        "caption_end": per_caption(pa.array(np.concatenate([c.end for c in captions]), pa.float32())),
        "caption_text": per_caption(pa.array([text for c in captions for text in c.text], pa.string())),
    }
    return pa.record_batch(list(columns.values()), names=list(columns))


def _offsets(lengths: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *lengths])
