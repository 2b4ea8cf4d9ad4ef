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
from videoclip.remote import RemoteReader, is_remote, list_files, look

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts")
MAX_PIXELS = 8192 * 8192  # a stranger's header must not make the decoder allocate more than about 200 MB a frame
MAX_SECONDS = 24 * 3600
VIDEO_BLOCK, VIDEO_BLOCKS = 2 << 20, 8  # bytes of one request to a store, and blocks kept
TOLERANCE = 2.0  # seconds; containers round, and audio may outlast the picture a little
CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg")  # FFmpeg's demuxers that may open a file

# What a file may cost, whatever its headers say. A slide may stay for ten minutes and a slide show change twice a
# minute; the stillest of films has some 100 bytes a second, and all-black 4K a byte for some 100,000 pixels.
LONGEST_STILL = 600.0
SECONDS_PER_PICTURE = 30.0
SECONDS_OF_ANY_FILE = 60.0
BYTES_PER_SECOND = 16
PIXELS_OF_ANY_FILE = 500_000_000
PIXELS_PER_BYTE = 100_000


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
    if is_remote(folder):
        paths = [file.path for file in list_files(folder)]
    elif folder.is_dir():
        paths = list(folder.rglob("*"))
    else:
        raise InputError(f"{folder}: no such folder of videos")
    videos = sorted(path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES)
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
            before, after = reach(offsets, fps)
        window.append(second)
        if len(window) == before + 1 + after:
            frames = np.concatenate(window) if len(window) > 1 else window[0]
            yield frames[before * fps + offsets]
            window.popleft()


def reach(offsets: np.ndarray, fps: int) -> tuple[int, int]:
    """How many whole seconds before and after its own a clip looks at."""
    return max(0, -int(offsets.min() // fps)), max(0, int(offsets.max() // fps))


def _with_repeated_edges(seconds: Iterable[np.ndarray], offsets: np.ndarray) -> Iterator[np.ndarray]:
    last: np.ndarray | None = None
    after = 0
    for second in seconds:
        if last is None:
            before, after = reach(offsets, len(second))
            yield from (np.broadcast_to(second[:1], second.shape) for _ in range(before))
        last = second
        yield second
    if last is not None:
        yield from (np.broadcast_to(last[-1:], last.shape) for _ in range(after))


def _frames_at_rate(path: Path, frame_format: FrameFormat, start: float, end: float | None) -> Iterator[np.ndarray]:
    """Yield the picture shown at start, start + 1/fps, … as [size, size, 3], repeating or dropping as needed."""
    if not start <= MAX_SECONDS:
        raise InputError(f"{path}: the start of a clip ({start} s) lies behind the longest video, {MAX_SECONDS} s")
    if end is not None and end <= start:
        raise InputError(f"{path}: the end of a clip ({end} s) must lie after its start ({start} s)")
    fps = frame_format.fps
    stop = math.inf if end is None else end
    wanted = 0  # index of the next output frame
    shown: Any = None  # the latest decoded frame, the one a player would be showing
    picture: np.ndarray | None = None  # `shown`, scaled and cropped once however often it repeats
    with open_container(path) as container:
        stream = _video_stream(container, path)
        pictures = _Pictures(container, stream, path)
        for time, frame in pictures.read(start):
            pictures.check_length(min(time, stop) - start)
            while shown is not None and start + wanted / fps < min(time - 1e-6, stop - 1e-6):
                if picture is None:
                    picture = pictures.draw(shown, frame_format)
                yield picture
                wanted += 1
            shown, picture = frame, None
            if time >= stop:
                break
        video_end = pictures.end(start, stop)
    pictures.check_length(min(video_end, stop) - start)
    while start + wanted / fps < min(video_end, stop) - 1e-6:
        if picture is None:
            picture = pictures.draw(shown, frame_format)
        yield picture
        wanted += 1
    if not wanted:
        raise InputError(f"{path}: its pictures last no time at all; the file is damaged")


class _Pictures:
    """The decoded pictures of a stream, when each is shown, and from these where the video ends.

    Times are seconds from the start of the stream. What a file may cost is bounded by its own bytes and pictures:
    a header promises anything.
    """

    def __init__(self, container: Any, stream: Any, path: Path) -> None:
        self._container, self._stream, self._path = container, stream, path
        self._bytes = _size(path)
        self._pixels_left = PIXELS_OF_ANY_FILE + PIXELS_PER_BYTE * self._bytes  # to decode and to draw
        self._duration = _duration(container, stream)
        self._origin = (stream.start_time or 0) * stream.time_base
        self._count = 0
        self._last_time = 0.0
        self._last_length = 0.0  # of the latest picture, as the file has it; 0 if it does not say
        self._gap = 0.0  # between the latest two pictures
        self._shortest_gap = math.inf
        self._damage = ""

    def read(self, start: float) -> Iterator[tuple[float, Any]]:
        """Yield time and frame, from the last key frame before `start` on. Damage ends it; `end` tells of it.

        Raises InputError for times that no video has, and for more pixels than the file's bytes can stand for.
        """
        import av

        stream, context = self._stream, self._stream.codec_context
        stream.thread_type = "AUTO"
        try:
            if start > 0:
                self._container.seek(int(start / stream.time_base) + (stream.start_time or 0), stream=stream)
            for packet in self._container.demux(stream):
                for frame in packet.decode():
                    if frame.pts is not None:
                        yield self._note(frame), frame
                self._spend(context.width * context.height)  # for packets too that show nothing: they cost the same
        except av.error.FFmpegError as error:
            self._damage = f" ({error.strerror})"
        except IndexError:  # PyAV's list of streams is made when a file is opened
            self._damage = " (its streams change while it is read)"

    def _note(self, frame: Any) -> float:
        time = float(frame.pts * self._stream.time_base - self._origin)
        if not 0 <= time <= MAX_SECONDS:
            raise InputError(f"{self._path}: a frame claims to be shown at {time:.0f} s; the file is damaged")
        if self._count:
            self._gap = time - self._last_time
            if self._gap > 0:
                self._shortest_gap = min(self._shortest_gap, self._gap)
        self._last_time, self._count = time, self._count + 1
        self._last_length = float((frame.duration or 0) * self._stream.time_base)
        return time

    def draw(self, frame: Any, frame_format: FrameFormat) -> np.ndarray:
        """The picture as a player shows it, upright: uint8 [size, size, 3], or [H, W, 3] where `scaled` is off."""
        path, shape = self._path, f"{frame.width} x {frame.height} pixels"
        if frame.width * frame.height > MAX_PIXELS:
            raise InputError(f"{path}: a frame of {shape} is more than may be allocated")
        aspect = float(self._stream.sample_aspect_ratio or 1)
        width, height = frame.width * (aspect if aspect > 0 else 1), frame.height
        size = frame_format.size
        scale = size / min(width, height) if frame_format.scaled else 1.0
        width, height = max(round(width * scale), 1), max(round(height * scale), 1)
        if width * height > MAX_PIXELS:
            raise InputError(f"{path}: its picture of {shape} is too elongated to scale")
        self._spend(width * height)
        picture = frame.reformat(width=width, height=height, format="rgb24", interpolation="BILINEAR").to_ndarray()
        if frame_format.scaled:
            top, left = (height - size) // 2, (width - size) // 2
            picture = picture[top : top + size, left : left + size]
        # Cropping to a square commutes with quarter turns, so it may come before. Players turn the other way round.
        return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90) % 4))

    def _spend(self, pixels: int) -> None:
        self._pixels_left -= pixels
        if self._pixels_left < 0:
            raise InputError(f"{self._path}: too many pixels for a file of {self._bytes} bytes; it is damaged")

    def check_length(self, seconds: float) -> None:
        """Raise InputError if so few pictures or bytes cannot be so many seconds."""
        by_pictures = LONGEST_STILL + SECONDS_PER_PICTURE * self._count
        by_bytes = SECONDS_OF_ANY_FILE + self._bytes / BYTES_PER_SECOND
        if seconds > min(by_pictures, by_bytes):
            raise InputError(
                f"{self._path}: {self._bytes} bytes claim to be {seconds:.0f} seconds or more, with {self._count} "
                "pictures so far; the file is damaged"
            )

    def end(self, start: float, stop: float) -> float:
        """The second at which the last picture ends, once all that were wanted are read.

        Raises InputError if there is none or a single one, if the file ends well before its header says, or if
        `start` lies behind the end.
        """
        path, duration, last_time = self._path, self._duration, self._last_time
        if not self._count:
            if start > 0 and duration and start >= duration:
                raise InputError(f"{path}: clip starts at {start} s but the video ends at {duration:.1f} s")
            raise InputError(f"{path}: no picture could be decoded{self._damage}; the file is empty or damaged")
        if self._count == 1 and (start == 0 or last_time == 0) and last_time < stop:
            raise InputError(f"{path}: holds a single picture, which is no video")
        video_end = last_time + self._length_of_last()
        short = duration - video_end > TOLERANCE
        if last_time < stop and (self._damage or (short and not self._sound_goes_on())):
            decoded = f"{video_end:.1f} of {duration:.1f} seconds could be decoded"
            raise InputError(f"{path}: truncated or damaged{self._damage}: {decoded}")
        if start >= video_end:
            raise InputError(f"{path}: clip starts at {start} s but the video ends at {video_end:.1f} s")
        return video_end

    def _length_of_last(self) -> float:
        """What the file says; else the smaller of the gap before it and what is left of the length in the header;
        where the header is of no help, an ordinary picture's."""
        if self._last_length > 0:
            return self._last_length
        left = self._duration - self._last_time
        if self._count == 1:
            return max(left, 0.0)
        return max(min(self._gap, left if left > 0 else self._shortest_gap), 0.0)

    def _sound_goes_on(self) -> bool:
        """Whether the sound lasts as long as the container: then the picture ends early, and not the file."""
        import av

        others = [stream for stream in self._container.streams.audio if stream.time_base]
        if not others:
            return False
        origin = self._container.start_time or 0  # microseconds
        wanted = self._duration - TOLERANCE + origin / 1e6
        try:
            self._container.seek(int(wanted * 1e6))
            for packet in self._container.demux(others):
                if packet.pts is not None and float(packet.pts * packet.time_base) >= wanted:
                    return True
        except (av.error.FFmpegError, IndexError):
            return False
        return False


def open_container(path: Path) -> Any:
    """Open a file with PyAV.

    Raises InputError if it is missing, empty or nothing that FFmpeg can read.
    """
    import av

    av.logging.set_level(None)  # FFmpeg's own messages say less than the errors below, and say it many times
    if not _size(path):
        raise InputError(f"{path}: the file is empty")
    # A script, a playlist or a list of pictures would make FFmpeg open other files than the one that was named, and
    # without `file:` a name such as `concat:…` or `http:…` would be read as a protocol.
    only = {"protocol_whitelist": "file", "format_whitelist": ",".join(CONTAINERS)}
    try:
        source = RemoteReader(path, VIDEO_BLOCK, VIDEO_BLOCKS) if is_remote(path) else f"file:{path}"
        return av.open(source, metadata_errors="replace", container_options=only)
    except (av.error.FFmpegError, ValueError) as error:
        raise InputError(f"{path}: not a video that FFmpeg can read ({getattr(error, 'strerror', error)})") from None


def _size(path: Path) -> int:
    """Bytes of a video file. Raises InputError if there is none."""
    file = look(path) if is_remote(path) else None
    if file is not None:
        return file.bytes
    if is_remote(path) or not Path(path).is_file():
        raise InputError(f"{path}: no such video file")
    return Path(path).stat().st_size


def _video_stream(container: Any, path: Path) -> Any:
    streams = [s for s in container.streams.video if not _is_cover_art(s)]
    if not streams:
        raise InputError(f"{path}: holds no video stream (audio only?)")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise InputError(f"{path}: its video codec cannot be decoded here")
    context.options = {"max_pixels": str(MAX_PIXELS)}  # a picture may grow after the header: never allocate it
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
