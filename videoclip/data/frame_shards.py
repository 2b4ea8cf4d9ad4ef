"""Frames on disk: Arrow files of JPEG pictures, of which a clip reads its own alone.

A folder holds `part-00000.arrow` … and the same manifest as shards of tokens; a row is a video: `video_id`, `fps`,
`frames` (JPEG, or PNG where nothing may be lost) and its captions. Which frames make a clip is chosen by number, and
only those are copied from the map and decoded. Small raw uint8 frames go through the shards of tokens instead
(`videoclip/encoders/pixels.py`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.data.captions import Captions
from videoclip.data.frames import choose_frames
from videoclip.data.shards import MANIFEST, Manifest, Part, check_part
from videoclip.errors import InputError
from videoclip.files import atomic_path, sha256

MAX_BYTES = 1 << 25  # of one picture, 32 MB
MAX_PIXELS = 1 << 26
QUALITY = 90


@dataclass(frozen=True)
class FramesRecord:
    """One video: `frames` as encoded pictures, at even times `1 / fps` apart; `captions` in seconds."""

    video_id: str
    fps: float
    frames: Sequence[bytes]
    captions: Captions


def encode_picture(frame: np.ndarray, quality: int = QUALITY) -> bytes:
    """uint8 [H, W, 3] RGB -> JPEG; `quality` 0: PNG, without loss."""
    from PIL import Image

    buffer = io.BytesIO()
    kind: dict[str, Any] = {"format": "JPEG", "quality": quality} if quality else {"format": "PNG"}
    Image.fromarray(frame).save(buffer, **kind)
    return buffer.getvalue()


def decode_picture(data: bytes, where: str, size: int | None = None) -> np.ndarray:
    """A stranger's JPEG or PNG -> uint8 [H, W, 3]; with `size` scaled to a square, whatever its shape, as ALPRO does.

    Raises InputError, saying `where`, if it is truncated, damaged, or larger than may be allocated: its header is read
    before its pixels are.
    """
    from PIL import Image, UnidentifiedImageError

    if len(data) > MAX_BYTES:
        raise InputError(f"{where}: a picture of {len(data)} bytes is more than may be read")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise InputError(
                    f"{where}: a picture of {picture.width} x {picture.height} is more than may be decoded"
                )
            rgb = picture.convert("RGB")
            if size is not None and rgb.size != (size, size):
                rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(rgb)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: not a whole JPEG or PNG picture ({' '.join(str(error).split())[:120]})") from None


def write_frame_shards(folder: Path, records: Iterable[FramesRecord], size: int, videos_per_part: int = 64) -> Manifest:
    """Write videos of frames of `size` x `size` pixels, behind those of an unfinished run (`written_videos`).

    Raises InputError if the folder holds finished or other shards, a video has no frame or its times cannot be.
    """
    folder = Path(folder)
    manifest = Manifest(f"frames-{size}", f"frames-{size}-jpeg", size * size * 3)
    if (folder / MANIFEST).exists():
        stored = Manifest.read(folder)
        if stored.complete or stored.encoder != manifest.encoder:
            raise InputError(f"{folder}: holds shards already; write into a new folder")
        manifest = stored
    waiting: list[FramesRecord] = []
    for record in records:
        if not record.frames or not np.isfinite(record.fps) or record.fps <= 0:
            raise InputError(f"video {record.video_id!r}: {len(record.frames)} frames at {record.fps} a second")
        waiting.append(record)
        if len(waiting) == videos_per_part:
            _write_part(folder, manifest, waiting)
            waiting = []
    if waiting:
        _write_part(folder, manifest, waiting)
    manifest.complete = True
    manifest.write(folder)
    return manifest


def written_videos(folder: Path) -> set[str]:
    """Ids of the videos that are in shards of frames, finished or not; none where there are no shards."""
    if not (Path(folder) / MANIFEST).exists() or not Manifest.read(folder).parts:
        return set()
    return set(FrameShards(folder).video_ids())


def _write_part(folder: Path, manifest: Manifest, records: list[FramesRecord]) -> None:
    import pyarrow as pa

    columns = {
        "video_id": pa.array([record.video_id for record in records], pa.string()),
        "fps": pa.array([record.fps for record in records], pa.float64()),
        "frames": pa.array([list(record.frames) for record in records], pa.large_list(pa.large_binary())),
        "captions": pa.array([_captions_json(record.captions) for record in records], pa.string()),
    }
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    name = f"part-{len(manifest.parts):05d}.arrow"
    with atomic_path(folder / name) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        digest, size = sha256(temporary), temporary.stat().st_size
    frames = sum(len(record.frames) for record in records)
    manifest.parts.append(Part(name, len(records), frames, size, digest))
    manifest.write(folder)


def _captions_json(captions: Captions) -> str:
    return json.dumps([captions.start.tolist(), captions.end.tolist(), list(captions.text)])


def holds_frames(folder: Path) -> bool:
    """Whether a folder of shards holds JPEG frames, not tokens. Raises InputError if there is no manifest."""
    return Manifest.read(Path(folder)).encoder.startswith("frames-")


class FrameShards:
    """Read-only view of a folder that `write_frame_shards` wrote. Rows are videos, counted through all parts."""

    def __init__(self, folder: Path, verify: bool = False) -> None:
        import pyarrow as pa

        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if not self.manifest.encoder.startswith("frames-") or not self.manifest.parts:
            raise InputError(f"{self.folder}: holds no shards of frames ({self.manifest.encoder})")
        self.size = int(self.manifest.encoder.removeprefix("frames-"))
        self._batches = []
        for part in self.manifest.parts:
            check_part(self.folder, part, verify)
            try:
                self._batches.append(pa.ipc.open_file(pa.memory_map(str(self.folder / part.name))).get_batch(0))
            except (pa.ArrowInvalid, OSError) as error:
                raise InputError(f"{self.folder / part.name}: not a readable part ({error})") from None
        self._first_rows = np.cumsum([0] + [len(batch) for batch in self._batches])

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def video_ids(self) -> list[str]:
        """All ids, in row order."""
        return [name for batch in self._batches for name in batch.column("video_id").to_pylist()]

    def count(self, row: int) -> int:
        """Frames of a video; nothing is decoded."""
        batch, inside = self._locate(row)
        return len(batch.column("frames")[inside])

    def fps(self, row: int) -> float:
        """Frames a second."""
        batch, inside = self._locate(row)
        return float(batch.column("fps")[inside].as_py())

    def captions(self, row: int) -> Captions:
        """What is said, in seconds."""
        batch, inside = self._locate(row)
        start, end, text = json.loads(batch.column("captions")[inside].as_py())
        return Captions(np.array(start, np.float32), np.array(end, np.float32), text)

    def frames(self, row: int, numbers: np.ndarray) -> np.ndarray:
        """uint8 [len(numbers), size, size, 3]: those frames alone are copied and decoded."""
        batch, inside = self._locate(row)
        column = batch.column("frames")
        first, name = column.offsets[inside].as_py(), batch.column("video_id")[inside].as_py()

        def decoded(number: int) -> np.ndarray:
            data = column.values[first + number].as_py()
            return decode_picture(data, f"{self.folder}: video {name!r}, frame {number}", self.size)

        pictures = {number: decoded(number) for number in set(numbers.tolist())}
        return np.stack([pictures[number] for number in numbers.tolist()])

    def clip(
        self,
        row: int,
        count: int,
        sampler: str = "uniform",
        generator: np.random.Generator | None = None,
        start: float = 0.0,
        end: float | None = None,
    ) -> np.ndarray:
        """uint8 [count, size, size, 3]: a clip of `count` frames of [start, end) seconds, as `choose_frames` chooses.

        Raises InputError if there is no frame between these times.
        """
        fps, most = self.fps(row), self.count(row)
        first = int(np.ceil(start * fps - 1e-6))
        last = most if end is None else min(most, int(np.ceil(end * fps - 1e-6)))
        if not 0 <= first < last:
            raise InputError(f"{self.folder}: row {row} has no frame between {start} and {end} seconds")
        return self.frames(row, first + choose_frames(last - first, count, sampler, generator))

    def _locate(self, row: int) -> tuple[Any, int]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        part = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self._batches[part], row - int(self._first_rows[part])
