"""Decode any video file to a fixed frame rate, second by second, in constant memory.

Frames are chosen by time stamp, never by counting: output frame k shows what a player would show at k / fps
seconds, so variable frame rates, dropped frames and odd time bases all come out right.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts")
MAX_PIXELS = 8192 * 8192  # a stranger's header must not make the decoder allocate more than about 200 MB a frame
MAX_SECONDS = 24 * 3600
TRUNCATION_TOLERANCE = 2.0  # seconds; containers round, and audio may outlast the picture a little


@dataclass(frozen=True)
class VideoInfo:
    """What the container says of its first video stream. `duration` in seconds (0 if unknown), sizes in pixels."""

    duration: float
    width: int
    height: int


@dataclass(frozen=True)
class FrameFormat:
    """How frames reach an encoder: `fps` frames a second, shorter side scaled to `size`, then a `size` centre crop.

    With `scaled` off they keep their displayed size, and whoever reads them scales them: a GPU does that for free.
    """

    fps: int
    size: int
    scaled: bool = True


def find_videos(folder: Path) -> list[Path]:
    """All video files below `folder`, by suffix, sorted by name.

    Raises InputError if the folder is missing or holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of videos")
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise InputError(f"{folder}: no video files here (looked for {', '.join(VIDEO_SUFFIXES)})")
    return videos


def probe(path: Path) -> VideoInfo:
    """Read a file's header.

    Raises InputError if it is missing, empty, no video, or larger than the decoder may allocate.
    """
    with open_container(path) as container:
        stream = _video_stream(container, path)
        return VideoInfo(_duration(container, stream), stream.codec_context.width, stream.codec_context.height)


def decode_seconds(
    path: Path, frame_format: FrameFormat, start: float = 0.0, end: float | None = None
) -> Iterator[np.ndarray]:
    """Yield one uint8 array [fps, H, W, 3] (RGB, H = W = size unless `scaled` is off) for every second of
    [start, end), both in seconds.

    The last, partial second is filled with zeros, as the public extraction scripts do. Rotation flags and
    non-square pixels are honoured.

    Raises InputError if the file cannot be read, holds no picture or a single one, ends well before the length
    that its header promises, or if `start` lies behind its end.
    """
    fps = frame_format.fps
    second = np.zeros((fps, 0, 0, 3), np.uint8)
    filled = 0
    for frame in _frames_at_rate(Path(path), frame_format, start, end):
        if frame.shape != second.shape[1:]:
            if filled:
                raise InputError(f"{path}: the picture changes its size within a second; convert the file first")
            second = np.zeros((fps, *frame.shape), np.uint8)
        second[filled] = frame
        filled += 1
        if filled == fps:
            yield second
            second, filled = np.zeros_like(second), 0
    if filled:
        yield second


def clips_of_seconds(seconds: Iterable[np.ndarray], offsets: np.ndarray) -> Iterator[np.ndarray]:
    """Yield one clip for every second of a video: uint8 [len(offsets), H, W, 3].

    `offsets` (int64) count frames from the first frame of the second; `arange(fps)` is the second itself, and an
    encoder whose clips are longer reaches into the neighbouring seconds. Before the first and after the last
    frame the edge frame is repeated. Memory holds as many seconds as the offsets reach over.
    """
    window: deque[np.ndarray] = deque()
    before = after = 0
    for index, second in enumerate(_with_repeated_edges(seconds, offsets)):
        if index == 0:
            fps = len(second)
            before, after = _reach(offsets, fps)
        window.append(second)
        if len(window) == before + 1 + after:
            frames = np.concatenate(window) if len(window) > 1 else window[0]
            yield frames[before * fps + offsets]
            window.popleft()


def _reach(offsets: np.ndarray, fps: int) -> tuple[int, int]:
    """How many whole seconds before and after its own a clip looks at."""
    return max(0, -int(offsets.min() // fps)), max(0, int(offsets.max() // fps))


def _with_repeated_edges(seconds: Iterable[np.ndarray], offsets: np.ndarray) -> Iterator[np.ndarray]:
    last: np.ndarray | None = None
    after = 0
    for second in seconds:
        if last is None:
            before, after = _reach(offsets, len(second))
            yield from (np.broadcast_to(second[:1], second.shape) for _ in range(before))
        last = second
        yield second
    if last is not None:
        yield from (np.broadcast_to(last[-1:], last.shape) for _ in range(after))


def _frames_at_rate(path: Path, frame_format: FrameFormat, start: float, end: float | None) -> Iterator[np.ndarray]:
    """Yield the picture shown at start, start + 1/fps, … as [size, size, 3], repeating or dropping as needed."""
    import av

    if end is not None and end <= start:
        raise InputError(f"{path}: the end of a clip ({end} s) must lie after its start ({start} s)")
    fps = frame_format.fps
    wanted = 0  # index of the next output frame
    shown: Any = None  # the latest decoded frame, the one a player would be showing
    picture: np.ndarray | None = None  # `shown`, scaled and cropped once however often it repeats
    decoded, last_time, frame_length = 0, 0.0, 0.0
    with open_container(path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        duration = _duration(container, stream)
        origin = (stream.start_time or 0) * stream.time_base
        stop = math.inf if end is None else end
        if start > 0:
            container.seek(int(start / stream.time_base) + (stream.start_time or 0), stream=stream)
        damage = ""
        try:
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                time = float(frame.pts * stream.time_base - origin)
                if not 0 <= time <= MAX_SECONDS:
                    raise InputError(f"{path}: a frame claims to be shown at {time:.0f} s; the file is damaged")
                while shown is not None and start + wanted / fps < min(time - 1e-6, stop - 1e-6):
                    if picture is None:
                        picture = _picture(shown, stream, frame_format, path)
                    yield picture
                    wanted += 1
                frame_length = time - last_time if decoded else 0.0
                shown, picture, last_time, decoded = frame, None, time, decoded + 1
                if time >= stop:
                    break
        except av.error.FFmpegError as error:
            damage = f" ({error.strerror})"
    if not decoded:
        if start > 0 and duration and start >= duration:
            raise InputError(f"{path}: clip starts at {start} s but the video ends at {duration:.1f} s")
        raise InputError(f"{path}: no picture could be decoded{damage}; the file is empty or damaged")
    if decoded == 1 and start == 0 and last_time < stop:
        raise InputError(f"{path}: holds a single picture, which is no video")
    video_end = last_time + frame_length
    if last_time < stop and (damage or duration - video_end > TRUNCATION_TOLERANCE):
        raise InputError(
            f"{path}: truncated or damaged{damage}: {video_end:.1f} of {duration:.1f} seconds could be decoded"
        )
    if start >= video_end:
        raise InputError(f"{path}: clip starts at {start} s but the video ends at {video_end:.1f} s")
    while start + wanted / fps < min(video_end, stop) - 1e-6:
        if picture is None:
            picture = _picture(shown, stream, frame_format, path)
        yield picture
        wanted += 1


def open_container(path: Path) -> Any:
    """Open a file with PyAV.

    Raises InputError if it is missing, empty or nothing that FFmpeg can read.
    """
    import av

    av.logging.set_level(None)  # FFmpeg's own messages say less than the errors below, and say it many times
    if not Path(path).is_file():
        raise InputError(f"{path}: no such video file")
    if Path(path).stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    try:
        # `file:` keeps FFmpeg from reading a name such as `concat:…` or `http:…` as a protocol.
        return av.open(f"file:{path}", metadata_errors="replace")
    except (av.error.FFmpegError, ValueError) as error:
        raise InputError(f"{path}: not a video that FFmpeg can read ({getattr(error, 'strerror', error)})") from None


def _video_stream(container: Any, path: Path) -> Any:
    streams = [s for s in container.streams.video if not _is_cover_art(s)]
    if not streams:
        raise InputError(f"{path}: holds no video stream (audio only?)")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise InputError(f"{path}: its video codec cannot be decoded here")
    if context.width * context.height > MAX_PIXELS:
        raise InputError(f"{path}: {context.width} x {context.height} pixels is more than the decoder may allocate")
    return stream


def _is_cover_art(stream: Any) -> bool:
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _duration(container: Any, stream: Any) -> float:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else 0.0


def _picture(frame: Any, stream: Any, frame_format: FrameFormat, path: Path) -> np.ndarray:
    """The picture as a player shows it, upright: uint8 [size, size, 3], or [H, W, 3] where `scaled` is off."""
    if frame.width * frame.height > MAX_PIXELS:
        raise InputError(f"{path}: a frame of {frame.width} x {frame.height} pixels is more than may be allocated")
    aspect = float(stream.sample_aspect_ratio or 1)
    width, height = frame.width * (aspect if aspect > 0 else 1), frame.height
    size = frame_format.size
    scale = size / min(width, height) if frame_format.scaled else 1.0
    width, height = max(round(width * scale), 1), max(round(height * scale), 1)
    if width * height > MAX_PIXELS:
        raise InputError(f"{path}: its picture of {frame.width} x {frame.height} pixels is too elongated to scale")
    picture = frame.reformat(width=width, height=height, format="rgb24", interpolation="BILINEAR").to_ndarray()
    if frame_format.scaled:
        top, left = (height - size) // 2, (width - size) // 2
        picture = picture[top : top + size, left : left + size]
    # Cropping to a square commutes with quarter turns, so it may come before. Players turn the other way round.
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90) % 4))
