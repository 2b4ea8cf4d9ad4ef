"""What every frozen video encoder can do: turn the seconds of a video into tokens, and be saved beside them."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.checkpoints import save_tensors
from videoclip.data.video import FrameFormat, clips_of_seconds, decode_seconds
from videoclip.errors import InputError
from videoclip.files import write_json

CLIPS_AT_ONCE_ON_GPU = 16
T = TypeVar("T")


class VideoEncoder(nn.Module):
    """A frozen network from clips of frames to one token each.

    Subclasses define `forward(frames)`: float [B, 3, T, H, W] in [0, 1] -> [B, dimension], and set

    - `name`: the name that shards record, for instance "x3d-s";
    - `options`: the constructor's arguments, JSON values, from which `load` builds it again;
    - `dimension`: width of a token;
    - `frame_format`: rate and size at which it wants its frames;
    - `frame_offsets`: int64 [T], the frames of a second's clip, counted from the first frame of that second;
    - `clips_at_once`: how many clips go through the network together on a CPU, where activations that outgrow the
      caches cost more than a larger batch gains: X3D-S makes 8 clips a second one by one and 4 in sixteens.
    """

    name: str
    options: dict[str, Any]
    dimension: int
    frame_format: FrameFormat
    frame_offsets: np.ndarray
    clips_at_once: int = 1

    def encode_video(self, path: Path, start: float = 0.0, end: float | None = None) -> np.ndarray:
        """Tokens of a video file between two times in seconds: float16 [T, dimension], one row a second.

        Extraction calls this, and so does a model that is given a file: their tokens are the same.
        Raises InputError if the file cannot be decoded or its tokens are not finite.
        """
        seconds = decode_seconds(path, self.frame_format, start, end)
        tokens = self.encode_all(clips_of_seconds(seconds, self.frame_offsets))
        if not np.isfinite(tokens).all():
            raise InputError(f"{path}: the encoder {self.name} gave tokens that are not finite numbers")
        return tokens

    def encode_all(self, clips: Iterable[np.ndarray]) -> np.ndarray:
        """Tokens of a video's clips, each uint8 [T, H, W, 3], in batches of their own: float16 [clips, dimension]."""
        on_cpu = next(self.parameters()).device.type == "cpu"
        size = self.clips_at_once if on_cpu else CLIPS_AT_ONCE_ON_GPU
        batches = [self.encode_clips(batch) for batch in _batches(prefetched(clips, 2 * size), size)]
        return np.concatenate([np.zeros((0, self.dimension), np.float32), *batches]).astype(np.float16)

    @torch.inference_mode()
    def encode_clips(self, clips: np.ndarray | Sequence[np.ndarray], scaled: bool = True) -> np.ndarray:
        """uint8 [B, T, H, W, 3] -> float32 [B, dimension].

        Frames cross to the device as uint8, a quarter of float, and are made numbers (and `scaled`, if they are not
        yet) there, in the precision of the weights.
        """
        parameter = next(self.parameters())
        if scaled:
            return self.tokens(self.prepare(torch.from_numpy(np.stack(list(clips))))).float().cpu().numpy()

        def prepare(clip: np.ndarray) -> Tensor:
            frames = torch.from_numpy(np.ascontiguousarray(clip)).to(parameter.device).permute(0, 3, 1, 2)
            return scale_and_crop(frames.to(parameter.dtype).div_(255), self.frame_format.size).transpose(0, 1)

        batch = torch.stack([prepare(clip) for clip in clips])
        return self.tokens(batch.contiguous(memory_format=torch.channels_last_3d)).float().cpu().numpy()

    def prepare(self, clips: Tensor) -> Tensor:
        """What `tokens` takes: uint8 [B, T, H, W, 3] -> numbers [B, 3, T, H, W] in [0, 1], channels last, on the
        device and in the precision of the weights. From pinned memory the copy does not wait."""
        parameter = next(self.parameters())
        frames = clips.to(parameter.device, non_blocking=True).permute(0, 4, 1, 2, 3)
        frames = frames.to(parameter.dtype).div_(255)
        return frames.contiguous(memory_format=torch.channels_last_3d)

    def tokens(self, frames: Tensor) -> Tensor:
        """What is stored for clips [B, 3, T, H, W] in [0, 1]: `forward`, unless an encoder has another convention."""
        return self(frames)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 over the name, the options and every weight: two equal ones give equal tokens."""
        digest = hashlib.sha256(json.dumps([self.name, self.options], sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write `video_encoder.json` and `video_encoder.safetensors` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "video_encoder.safetensors", self)
        write_json(
            folder / "video_encoder.json",
            {"encoder": type(self).__name__, "options": self.options, "fingerprint": self.fingerprint()},
        )


def scale_and_crop(frames: Tensor, size: int) -> Tensor:
    """Frames [T, 3, H, W] in [0, 1]: shorter side to `size`, centre crop -> [T, 3, size, size]. For GPUs; on a CPU
    the decoder scales, which is faster there."""
    height, width = frames.shape[2:]
    scale = size / min(height, width)
    shape = (max(round(height * scale), size), max(round(width * scale), size))
    frames = F.interpolate(frames, shape, mode="bilinear", antialias=True, align_corners=False).clamp_(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return frames[:, :, top : top + size, left : left + size]


@dataclass(frozen=True)
class _End:
    """Comes after the last item; with what was raised, if something was."""

    error: BaseException | None = None


def prefetched(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield `items` while a thread draws up to `count` more: decoding goes on while the network computes.

    What the thread raises is raised here. FFmpeg works without the interpreter's lock, so the two really overlap.
    """
    waiting: queue.Queue[T | _End] = queue.Queue(count)
    stopped = threading.Event()

    def put(item: T | _End) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def draw() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:
            put(_End(error))
        else:
            put(_End())

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return
    finally:
        stopped.set()
        thread.join()


def _batches(clips: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    while batch := list(islice(clips, size)):
        yield batch
