"""Which library decodes: PyAV everywhere, or torchcodec on NVIDIA's decoder where it is installed and works.

Both choose frames by the time at which a player would show them. Colours are converted and sides scaled by other code:
frames differ by less than 4 grey levels of 255 on average, which is the tolerance that the tests hold scaling to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videoclip.data.video import FrameFormat, decode_seconds, probe
from videoclip.encoders.video_encoder import scale_and_crop
from videoclip.errors import InputError

NAMES = ("auto", "pyav", "torchcodec")
PICTURES_AT_ONCE = 64
Decode = Callable[[Path, FrameFormat, float, float | None], Iterator[np.ndarray]]


def make_decoder(name: str, device: str) -> Decode:
    """`auto`: torchcodec for a `device` "cuda" where it loads, PyAV otherwise.

    Raises InputError if torchcodec is asked for and does not load.
    """
    if name not in NAMES:
        raise InputError(f"unknown decoder {name!r}; choose {', '.join(NAMES)}")
    if name == "pyav" or (name == "auto" and device != "cuda"):
        return decode_seconds
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:  # absent, or built for another torch or FFmpeg
        if name == "auto":
            return decode_seconds
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"--decoder torchcodec: it does not load here ({reason}); use pyav") from None
    return TorchcodecDecoder(VideoDecoder, device)


class TorchcodecDecoder:
    """`decode_seconds` by torchcodec. Files that it has no way for (turned pictures, pixels that are not square,
    formats that the chip cannot decode, damage) are left to PyAV, whose word on them counts."""

    def __init__(self, decoder: Any, device: str) -> None:
        self._decoder, self._device = decoder, device

    def __call__(
        self, path: Path, frame_format: FrameFormat, start: float = 0.0, end: float | None = None
    ) -> Iterator[np.ndarray]:
        """As `decode_seconds`: uint8 [fps, size, size, 3] for every second of [start, end)."""
        probe(path)  # is it a file, of a container that may be opened, of a size that may be allocated?
        try:
            video = self._decoder(f"file:{path}", device=self._device, dimension_order="NCHW", seek_mode="exact")
            times = _times(video.metadata, frame_format.fps, start, end)
        except (RuntimeError, ValueError, TypeError):
            times = None
        if times is None or not len(times):
            yield from decode_seconds(path, frame_format, start, end)
            return
        done = 0
        try:
            for second in self._seconds(video, times, frame_format):
                yield second
                done += 1
        except (RuntimeError, ValueError, IndexError):  # here and there inside a file: PyAV goes on, or says why not
            yield from decode_seconds(path, frame_format, start + done, end)

    def _seconds(self, video: Any, times: np.ndarray, frame_format: FrameFormat) -> Iterator[np.ndarray]:
        fps, size = frame_format.fps, frame_format.size
        block = max(1, PICTURES_AT_ONCE // fps) * fps
        for first in range(0, len(times), block):
            pictures = video.get_frames_played_at(seconds=times[first : first + block].tolist()).data  # uint8 NCHW
            scaled = scale_and_crop(pictures.float().div_(255), size).mul_(255).round_().to(torch.uint8)
            frames = scaled.permute(0, 2, 3, 1).cpu().numpy()
            for place in range(0, len(frames), fps):
                second = np.zeros((fps, size, size, 3), np.uint8)
                second[: len(frames) - place] = frames[place : place + fps]
                yield second


def _times(metadata: Any, fps: int, start: float, end: float | None) -> np.ndarray | None:
    """When the wanted frames are shown, in the file's own time; None for files that are better left to PyAV."""
    aspect, rotation = getattr(metadata, "pixel_aspect_ratio", None), getattr(metadata, "rotation", None)
    begin, stop = metadata.begin_stream_seconds, metadata.end_stream_seconds
    if (aspect is not None and aspect != 1) or rotation or begin is None or stop is None or not stop > begin:
        return None
    until = stop - begin if end is None else min(stop - begin, end)
    header = metadata.duration_seconds_from_header
    if end is None and header is not None and header - until > 2.0:  # it ends well before its header says
        return None
    count = math.ceil((until - start - 1e-6) * fps)
    return begin + start + np.arange(max(count, 0)) / fps
