"""Frames as models see them: normalised, and cropped by whole patches."""

from __future__ import annotations

import torch
from torch import Tensor

from videoclip.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalised(frames: Tensor) -> Tensor:
    """uint8 [B, T, H, W, 3] RGB -> float [B, T, 3, H, W], with CLIP's mean and deviation; floats are taken as done.

    Raises InputError if `frames` are neither.
    """
    if frames.is_floating_point() and frames.ndim == 5:
        return frames
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
        raise InputError(f"frames must be uint8 [clips, frames, height, width, 3], not {list(frames.shape)}")
    mean, std = (torch.tensor(values, device=frames.device) for values in (CLIP_MEAN, CLIP_STD))
    return ((frames / 255 - mean) / std).permute(0, 1, 4, 2, 3)


def inside(crops: Tensor, grid: int) -> Tensor:
    """Crops int64 [B, 4] (top, left, height, width, in patches) -> bool [B, grid, grid], true inside."""
    top, left, height, width = (column[:, None] for column in crops.T)
    place = torch.arange(grid, device=crops.device)
    rows, columns = (place >= top) & (place < top + height), (place >= left) & (place < left + width)
    return rows[:, :, None] & columns[:, None, :]


def zeroed_outside(frames: Tensor, crops: Tensor, patch: int) -> Tensor:
    """uint8 [B, T, S, S, 3] with everything outside each crop black, in all frames; place and size stay.

    It happens before normalisation, as in ALPRO's release: outside is -mean / std for the model, not 0.
    """
    kept = inside(crops, frames.shape[2] // patch)
    kept = kept.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return frames * kept[:, None, :, :, None]
