"""Pictures and playable files of an archive's videos: what a browser can be given, and what it must be told."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from videoclip.data.video import FrameFormat, decode_seconds, open_container, probe
from videoclip.errors import InputError
from videoclip.files import atomic_path

PICTURE_WIDTH, MAX_PICTURE_WIDTH = 320, 1280
PLAYED_PICTURES = {"h264": ("yuv420p", "yuvj420p"), "vp8": ("yuv420p",), "vp9": ("yuv420p",), "av1": ("yuv420p",)}
PLAYED_SOUNDS = ("aac", "mp3", "opus", "vorbis", "flac")
IN_MP4 = ("aac", "mp3", "opus", "flac")


@dataclass(frozen=True)
class Playback:
    """How a browser gets a file: `direct`, `remuxed` into mp4 without encoding anything anew, or `none` and why."""

    way: str
    media_type: str = "video/mp4"
    reason: str = ""


def playback(path: Path) -> Playback:
    """Decide by container and codecs, not by the file's name.

    Raises InputError if the file cannot be read.
    """
    with open_container(path) as container:
        pictures = [s.codec_context for s in container.streams.video if s.codec_context is not None]
        sounds = [s.codec_context.name for s in container.streams.audio if s.codec_context is not None]
        if not pictures:
            return Playback("none", reason="it holds no picture that can be decoded")
        codec, kind = pictures[0].name, pictures[0].pix_fmt
        codec = {"libdav1d": "av1", "libvpx-vp9": "vp9", "libvpx": "vp8"}.get(codec, codec)
        if kind not in PLAYED_PICTURES.get(codec, ()):
            return Playback("none", reason=f"browsers do not play {codec} ({kind}); convert it to H.264, yuv420p")
        names = container.format.name.split(",")
        if "mp4" in names and all(sound in PLAYED_SOUNDS for sound in sounds):
            return Playback("direct")
        if "webm" in names and path.suffix.lower() == ".webm" and codec != "h264":
            return Playback("direct", "video/webm")
    return Playback("remuxed")


def remuxed(path: Path, target: Path) -> Path:
    """The file's first picture and sound in an mp4 that browsers play, written to `target` unless it is there.

    Nothing is encoded anew; sound that mp4 cannot hold is left out. Raises InputError if FFmpeg cannot do it.
    """
    import av

    if target.is_file():
        return target
    try:
        with atomic_path(target) as temporary, open_container(path) as source:
            options = {"movflags": "+faststart"}
            with av.open(str(temporary), "w", format="mp4", options=options) as output:
                wanted = [source.streams.video[0]]
                wanted += [s for s in source.streams.audio[:1] if s.codec_context.name in IN_MP4]
                made = {stream.index: output.add_stream_from_template(stream) for stream in wanted}
                for packet in source.demux(wanted):
                    if packet.dts is not None:
                        packet.stream = made[packet.stream.index]
                        output.mux(packet)
    except (av.error.FFmpegError, ValueError) as error:
        raise InputError(f"{path}: cannot be made playable ({getattr(error, 'strerror', error)})") from None
    return target


def picture(path: Path, time: float, width: int = PICTURE_WIDTH) -> bytes:
    """The picture shown at `time` seconds as JPEG, `width` pixels wide; the last one for a time behind the end.

    Raises InputError if the file cannot be decoded there.
    """
    from PIL import Image

    last = max(0.0, probe(path).duration - 1.0)
    start = float(min(max(time, 0.0), last))
    try:
        frames = next(decode_seconds(path, FrameFormat(1, 1, scaled=False), start, start + 1))
    except StopIteration:
        raise InputError(f"{path}: shows nothing at {time:.1f} s") from None
    image = Image.fromarray(frames[0])
    width = max(1, min(width, MAX_PICTURE_WIDTH))
    image = image.resize((width, max(1, round(image.height * width / image.width))))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
