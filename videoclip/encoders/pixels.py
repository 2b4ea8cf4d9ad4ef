"""No network at all: the token of a second is its first frame, for recipes that are trained from pixels.

float16 holds 0 to 255 exactly, so frames go through the shards of tokens unchanged: 64 x 64 pixels are 24 KB a second.
Frames of 224 x 224 are 300 KB a second; those belong into shards of JPEG (`videoclip/data/frame_shards.py`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from videoclip.data.video import FrameFormat
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.errors import InputError

SIZES = (32, 64, 96, 128)


class Pixels(VideoEncoder):
    """Frames of `size` x `size` pixels, one a second, as rows of size * size * 3 numbers from 0 to 255."""

    clips_at_once = 16

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        if size not in SIZES:
            raise InputError(f"pixels must be one of {', '.join(map(str, SIZES))} wide, not {size}")
        self.name, self.options = f"pixels-{size}", {"size": size}
        self.dimension = size * size * 3
        self.frame_format = FrameFormat(1, size)
        self.frame_offsets = np.zeros(1, np.int64)
        self.unused = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # says which device it is on

    def forward(self, frames: Tensor) -> Tensor:
        """[B, 3, 1, S, S] in [0, 1] -> [B, S * S * 3], 0 to 255."""
        return (frames[:, :, 0].permute(0, 2, 3, 1).flatten(1) * 255).round()
