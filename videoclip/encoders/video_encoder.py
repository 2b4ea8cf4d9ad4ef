"""What every frozen video encoder can do: turn the seconds of a video into tokens, and be saved beside them."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.data.video import FrameFormat, clips_of_seconds, decode_seconds
from videoclip.errors import InputError
from videoclip.files import atomic_path, read_json, write_json

CLIPS_AT_ONCE_ON_GPU = 16


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
        on_cpu = next(self.parameters()).device.type == "cpu"
        seconds = decode_seconds(path, replace(self.frame_format, scaled=on_cpu), start, end)
        size = self.clips_at_once if on_cpu else CLIPS_AT_ONCE_ON_GPU
        clips = ahead(clips_of_seconds(seconds, self.frame_offsets), 2 * size)
        batches = [self.encode_clips(batch, scaled=on_cpu) for batch in _batches(clips, size)]
        tokens = np.concatenate(batches).astype(np.float16)
        if not np.isfinite(tokens).all():
            raise InputError(f"{path}: the encoder {self.name} gave tokens that are not finite numbers")
        return tokens

    @torch.inference_mode()
    def encode_clips(self, clips: np.ndarray | Sequence[np.ndarray], scaled: bool = True) -> np.ndarray:
        """uint8 [B, T, H, W, 3] -> float32 [B, dimension].

        Frames cross to the device as uint8, a quarter of float, and are made numbers (and `scaled`, if they are not
        yet) there, in the precision of the weights.
        """
        parameter = next(self.parameters())
        size = self.frame_format.size

        def prepare(clip: np.ndarray) -> Tensor:
            frames = torch.from_numpy(np.ascontiguousarray(clip)).to(parameter.device).permute(0, 3, 1, 2)
            frames = frames.to(parameter.dtype).div_(255)
            return (frames if scaled else scale_and_crop(frames, size)).transpose(0, 1)

        batch = torch.stack([prepare(clip) for clip in clips])
        return self.tokens(batch.contiguous(memory_format=torch.channels_last_3d)).float().cpu().numpy()

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
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_path(folder / "video_encoder.safetensors") as temporary:
            save_file(tensors, temporary)
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


def ahead(items: Iterable[Any], count: int) -> Iterator[Any]:
    """Yield `items` while a thread draws up to `count` more: decoding goes on while the network computes.

    What the thread raises is raised here. FFmpeg works without the interpreter's lock, so the two really overlap.
    """
    waiting: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(count)
    stopped = threading.Event()
    end = object()

    def put(item: Any, error: BaseException | None = None) -> bool:
        while not stopped.is_set():
            try:
                waiting.put((item, error), timeout=0.1)
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
            put(None, error)
        else:
            put(end)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def load_video_encoder(folder: Path) -> VideoEncoder:
    """Read an encoder that `VideoEncoder.save` wrote, frozen and in evaluation mode.

    Raises InputError if the folder holds none, or if its weights are not those it was saved with.
    """
    from safetensors.torch import load_file

    from videoclip.encoders.image import ImageEncoder
    from videoclip.encoders.s3d import S3D
    from videoclip.encoders.x3d import X3D

    folder = Path(folder)
    description = read_json(folder / "video_encoder.json")
    classes: dict[str, Any] = {"ImageEncoder": ImageEncoder, "S3D": S3D, "X3D": X3D}
    if description.get("encoder") not in classes:
        raise InputError(f"{folder / 'video_encoder.json'}: unknown encoder {description.get('encoder')!r}")
    encoder = classes[description["encoder"]](**description["options"])
    try:
        encoder.load_state_dict(load_file(folder / "video_encoder.safetensors"))
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{folder / 'video_encoder.safetensors'}: does not fit {encoder.name} ({error})") from None
    if encoder.fingerprint() != description.get("fingerprint"):
        raise InputError(f"{folder / 'video_encoder.safetensors'}: not the weights that were saved here; extract again")
    return encoder


def _batches(clips: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    while batch := list(islice(clips, size)):
        yield batch
