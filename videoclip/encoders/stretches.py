"""Videos of hours in stretches that several workers encode, and how these become the tokens of the uncut video.

A stretch is so many whole seconds of a video. It is decoded from a little before, so that its first clips look back
into the same frames as in the uncut video, and a little beyond, for its last ones; the last stretch goes on to wherever
the video ends. Seeking is exact in good files only. Therefore two neighbours both decode the second before their seam,
and both give its checksum: where these differ, where a stretch is shorter than it should be, or where one of them
fails, the video is encoded in one piece, and what comes of that counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from videoclip.data.video import FrameFormat, clips_of_seconds, decode_seconds, reach

if TYPE_CHECKING:
    from videoclip.encoders.decoders import Decode

STRETCH = 960  # seconds; a multiple of the sizes of batches, so that a CPU computes the same batches as without cuts


@dataclass(frozen=True)
class Stretch:
    """Seconds [first, last) of a video or clip, counted from its start; `last` is None where it goes to the end."""

    first: int
    last: int | None


@dataclass
class Seam:
    """Checksums of the frames of the second before a stretch, and of its last second; empty where there is none."""

    before: bytes = b""
    last: bytes = b""


def cut(duration: float, length: int = STRETCH) -> list[Stretch]:
    """The stretches of a video: one, where it is shorter than two. The last one is the longest."""
    count = max(1, int(duration // length))
    bounds: list[int | None] = [number * length for number in range(1, count)]
    return [Stretch(first or 0, last) for first, last in zip([0, *bounds], [*bounds, None])]


def stretch_clips(
    path: Path,
    frame_format: FrameFormat,
    offsets: np.ndarray,
    stretch: Stretch,
    seam: Seam,
    start: float = 0.0,
    end: float | None = None,
    decode: Decode = decode_seconds,
) -> Iterator[np.ndarray]:
    """The clips of a stretch of the clip [start, end) of a file, as `clips_of_seconds` gives them of the whole.

    `seam` is filled in on the way. Raises InputError as `decode` does.
    """
    before, after = reach(offsets, frame_format.fps)
    lead = max(1, before) if stretch.first else 0
    count = None if stretch.last is None else stretch.last - stretch.first
    stop = end
    if stretch.last is not None:
        stop = start + stretch.last + after if end is None else min(end, start + stretch.last + after)
    seconds = decode(path, frame_format, start + stretch.first - lead, stop)
    clips = clips_of_seconds(_with_checksums(seconds, lead, count, seam), offsets)
    return islice(clips, lead, None if count is None else lead + count)


def _with_checksums(seconds: Iterator[np.ndarray], lead: int, count: int | None, seam: Seam) -> Iterator[np.ndarray]:
    for number, second in enumerate(seconds):
        if number == lead - 1:
            seam.before = _checksum(second)
        if count is not None and number == lead + count - 1:
            seam.last = _checksum(second)
        yield second


def _checksum(second: np.ndarray) -> bytes:
    return hashlib.blake2b(second.tobytes(), digest_size=16).digest()


def fit_together(stretches: Sequence[Stretch], lengths: Sequence[int], seams: Sequence[Seam]) -> bool:
    """Whether stretches of so many tokens each, in their order, are those of the uncut video."""
    inner = zip(stretches[:-1], lengths[:-1])
    return (
        all(stretch.last is not None and count == stretch.last - stretch.first for stretch, count in inner)
        and lengths[-1] > 0
        and all(left.last == right.before != b"" for left, right in pairwise(seams))
    )
