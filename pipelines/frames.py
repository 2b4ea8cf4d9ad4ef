"""Frames for recipes that are trained end to end: videos and pictures into shards of JPEG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipelines.runs import Quarantine, refuse_other_run, start_run, with_absolute_paths, writes_output
from videoclip.data.captions import NO_CAPTIONS, Captions
from videoclip.data.entities import read_captioned
from videoclip.data.frame_shards import (
    FrameShards,
    FramesRecord,
    decode_picture,
    encode_picture,
    write_frame_shards,
    written_videos,
)
from videoclip.data.shards import MANIFEST, Manifest
from videoclip.data.video import VIDEO_SUFFIXES, FrameFormat, decode_seconds, probe
from videoclip.errors import InputError
from videoclip.files import sha256

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class FramesConfig:
    """Turn a folder of videos or pictures into shards of frames. Run it again to go on where it stopped."""

    folder: Path
    """Searched recursively for videos and pictures; a file's name without its suffix is its id."""
    output: Path = Path("runs/frames")
    captions: Path | None = None
    """What is said of each as a whole: WebVid's table (csv, parquet, jsonl), or CC3M's json; needed for training.
    Only files that it lists are used."""
    size: int = 224
    """Height and width, pixels; what is not square is squeezed, as ALPRO does it."""
    fps: int = 1
    """Frames of a second of video. A clip's own are chosen from these."""
    quality: int = 90
    """Of JPEG; 0: PNG, without loss."""
    longest_caption: int = 30
    """Captions of so many words (`txt_len`) or more are left out, as in ALPRO's release."""
    per_part: int = 64
    """Videos in one Arrow file; as many pictures are one part too."""


@writes_output
def extract_frames(config: FramesConfig) -> Manifest:
    """Run the stage; files that cannot be used go to quarantine.jsonl.

    Raises InputError if none can, or the folder holds the work of other options.
    """
    config = with_absolute_paths(config)
    if not 8 <= config.size <= 1024 or config.fps < 1 or not 0 <= config.quality <= 95 or config.per_part < 1:
        raise InputError("--size must be 8 to 1024, --fps and --per-part at least 1, --quality 0 to 95")
    quarantine = Quarantine(config.output)
    todo = _files_and_captions(config, quarantine)
    identity: dict[str, object] = {"size": config.size, "fps": config.fps, "quality": config.quality}
    identity["captions"] = sha256(config.captions) if config.captions else ""
    refuse_other_run(config.output, identity)
    if (config.output / MANIFEST).exists() and Manifest.read(config.output).complete:
        print(f"{config.output} is finished; nothing to do")
        return Manifest.read(config.output)
    start_run(config.output, "frames", config, identity)
    left_out = written_videos(config.output) | quarantine.video_ids()
    waiting = [(path, caption) for path, caption in todo if path.stem not in left_out]
    manifest = write_frame_shards(config.output, _records(waiting, config, quarantine), config.size, config.per_part)
    quarantine.save()
    if not manifest.parts:
        raise InputError(f"{config.folder}: none of the {len(todo)} files could be used; see {quarantine.path}")
    shards = FrameShards(config.output)
    count = sum(shards.count(row) for row in range(len(shards)))
    print(f"{len(shards)} videos or pictures, {count} frames in {config.output}; {quarantine.summary()}")
    return manifest


def _files_and_captions(config: FramesConfig, quarantine: Quarantine) -> list[tuple[Path, str | None]]:
    """What there is, by name, each id once; captions without a file are noted."""
    if not config.folder.is_dir():
        raise InputError(f"{config.folder}: no such folder of videos or pictures")
    suffixes = (*VIDEO_SUFFIXES, *PICTURE_SUFFIXES)
    found: dict[str, Path] = {}
    for path in sorted(path for path in config.folder.rglob("*") if path.suffix.lower() in suffixes):
        if path.stem in found:
            quarantine.add(path.stem, f"the same id as {found[path.stem]}: {path} is left out")
        found.setdefault(path.stem, path)
    if not found:
        raise InputError(f"{config.folder}: no videos or pictures here (looked for {', '.join(suffixes)})")
    if config.captions is None:
        return [(path, None) for path in found.values()]
    captions: dict[str, str] = {}
    for pair in read_captioned(config.captions, config.longest_caption):
        name = Path(pair.path).stem
        if name in found:
            captions.setdefault(name, pair.caption)
        else:
            quarantine.add(name, f"{config.captions}: no such file in {config.folder}")
    return [(found[name], caption) for name, caption in sorted(captions.items())]


def _records(
    files: list[tuple[Path, str | None]], config: FramesConfig, quarantine: Quarantine
) -> Iterator[FramesRecord]:
    for path, caption in tqdm(files, "frames", unit="file", disable=len(files) < 8):
        try:
            frames, fps = _frames(path, config)
        except (InputError, OSError) as error:
            quarantine.add(path.stem, str(error))
            continue
        seconds = np.array([0.0, len(frames) / fps], np.float32)
        captions = NO_CAPTIONS if caption is None else Captions(seconds[:1], seconds[1:], [caption])
        yield FramesRecord(path.stem, fps, frames, captions)


def _frames(path: Path, config: FramesConfig) -> tuple[list[bytes], float]:
    """The encoded frames of a file, and how many a second has. Raises InputError if it cannot be read."""
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return [encode_picture(decode_picture(path.read_bytes(), str(path), config.size), config.quality)], 1.0
    frames = []
    for second in decode_seconds(path, FrameFormat(config.fps, config.size, scaled=False)):
        frames += [encode_picture(_squeezed(frame, config.size), config.quality) for frame in second]
    shown = round(probe(path).duration * config.fps)  # the last second is filled up with black frames
    return frames[: max(1, shown)] if shown else frames, float(config.fps)


def _squeezed(frame: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR))
