"""Folders of `.npy` features, as older tools leave them, into shards and back."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from videoclip.data.captions import Captions
from videoclip.data.shards import Manifest, Shards, ShardWriter, VideoRecord
from videoclip.errors import InputError
from videoclip.files import write_array


def features_to_shards(
    folder: Path,
    output: Path,
    captions_of: Callable[[str, int], Captions],
    encoder: str,
    videos_per_part: int = 256,
) -> Iterator[tuple[str, str]]:
    """Write `<id>.npy` arrays [seconds, width], as older tools leave them, into shards; yields (id, reason) of rejects.

    `captions_of(video_id, seconds of tokens)` gives a video its captions; `captions_of_video` prepares raw ones.
    Arrays are read without pickle. The manifest names `encoder`, whose weights are not known: its fingerprint is the
    hash of that name, so that tokens of differently named encoders are never mixed.
    Raises InputError if the folder holds no array that can be used, or if shards of another encoder are there.
    """
    files = sorted(Path(folder).glob("*.npy"))
    if not files:
        raise InputError(f"{folder}: holds no .npy files")
    width = _usual_width(files)
    fingerprint = fingerprint_of_features(encoder)
    writer: ShardWriter | None = None
    done: set[str] = set()
    for file in files:
        try:
            tokens = _read_features(file)
        except InputError as error:
            yield file.stem, str(error)
            continue
        if writer is None:
            writer = ShardWriter(output, Manifest(encoder, fingerprint, width), videos_per_part)
            done = set(Shards(output).video_ids()) if writer.manifest.parts else set()
        if file.stem in done:
            continue
        try:
            writer.add(VideoRecord(file.stem, float(len(tokens)), tokens, captions_of(file.stem, len(tokens))))
        except InputError as error:
            yield file.stem, str(error)
    if writer is None:
        raise InputError(f"{folder}: none of {len(files)} .npy files could be used")
    writer.close()


def fingerprint_of_features(encoder: str) -> str:
    """Hexadecimal SHA-256 that stands for the unknown weights of the encoder of this name."""
    return hashlib.sha256(f"features:{encoder}".encode()).hexdigest()


def _usual_width(files: list[Path]) -> int:
    """The width that most arrays have; only their headers are read."""
    widths: Counter[int] = Counter()
    for file in files:
        try:
            shape = np.load(file, mmap_mode="r", allow_pickle=False).shape
        except (ValueError, OSError, EOFError):
            continue  # named when it is read as a whole
        if len(shape) == 2:
            widths[shape[1]] += 1
    return widths.most_common(1)[0][0] if widths else 0


def _read_features(file: Path) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{file}: not an array that can be read safely ({' '.join(str(error).split())})") from None
    if array.ndim != 2 or not len(array) or array.dtype.kind != "f":
        raise InputError(f"{file}: expected floats [seconds, width], found {array.dtype} {array.shape}")
    tokens = array.astype(np.float16)
    if not np.isfinite(tokens).all():
        raise InputError(f"{file}: holds values that are not finite in half precision")
    return tokens


def shards_to_features(shards: Shards, folder: Path) -> int:
    """Write every video's tokens as `<id>.npy` float16 [T, D]; returns how many.

    Raises InputError for an id that cannot be a file name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for record in shards:
        if Path(record.video_id).name != record.video_id or record.video_id in ("", ".", ".."):
            raise InputError(f"video id {record.video_id!r} cannot be a file name")
        write_array(folder / f"{record.video_id}.npy", record.tokens)
    return len(shards)
