"""Pairs drawn from shards of frames, as batches of clips of a few frames each.

Shards of the encoder `pixels-64` (`videoclip/encoders/pixels.py`) hold a video's frames, one a second, in the place of
tokens. So a recipe on pixels is trained, clustered, evaluated and searched by the same stages as one on tokens.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from videoclip.data.clips import ClipBatch
from videoclip.data.frames import FrameBatch, choose_frames, random_crop_of_patches
from videoclip.data.shards import Manifest
from videoclip.errors import InputError
from videoclip.packed import Packed
from videoclip.retrieval.false_negatives import false_negatives


def as_frames(tokens: Packed, size: int) -> Packed:
    """Rows of shards, float [N, size * size * 3] holding 0 … 255 -> uint8 [N, size, size, 3]; frames stay as they are.

    Raises InputError if the rows are no frames of that size.
    """
    rows = tokens.rows
    if rows.ndim == 2 and rows.shape[1] == size * size * 3:
        return tokens.with_rows(rows.to(torch.uint8).unflatten(1, (size, size, 3)))
    if rows.ndim != 4 or rows.shape[1:] != (size, size, 3) or rows.dtype != torch.uint8:
        raise InputError(
            f"rows {list(rows.shape)} are no frames of {size} x {size}: extract with --encoder pixels-{size}"
        )
    return tokens


def frame_batch(batch: ClipBatch | FrameBatch, size: int, frames: int, grid: int, sampler: str) -> FrameBatch:
    """Pairs drawn from shards of frames -> clips of `frames` frames each, a crop each, and a generator.

    All that is drawn follows from the batch itself, so a resumed run draws the same again.
    """
    if isinstance(batch, FrameBatch):
        return batch
    clips = as_frames(batch.video_tokens, size)
    seed = zlib.crc32(batch.word_ids.rows.cpu().numpy().tobytes(), zlib.crc32(batch.video.cpu().numpy().tobytes()))
    generator = np.random.default_rng(seed)
    chosen = [
        start + choose_frames(length, frames, sampler, generator)
        for start, length in zip(clips.starts.tolist(), clips.lengths.tolist())
    ]
    crops = [random_crop_of_patches(grid, generator, patch=size // grid) for _ in chosen]
    return FrameBatch(
        clips.rows[torch.from_numpy(np.stack(chosen)).to(clips.rows.device)],
        batch.word_ids.to(batch.word_ids.rows.device, torch.int64),
        torch.Generator().manual_seed(seed),
        torch.from_numpy(np.stack(crops)),
        excluded=_excluded(batch),
        rows_per_rank=batch.rows_per_rank,
    )


def _excluded(batch: ClipBatch) -> Tensor | None:
    """bool [P, P]: own pairs that are no negatives of each other, where the batch says so."""
    if batch.labels is None:
        return None
    return false_negatives(batch.labels, batch.labels, 0)


def frame_size(manifest: Manifest) -> int:
    """Height and width of the frames in shards. Raises InputError if they hold something else."""
    name, _, size = manifest.encoder.rpartition("-")
    if name != "pixels" or not size.isdigit() or int(size) ** 2 * 3 != manifest.dimension:
        raise InputError(
            f"shards of the encoder {manifest.encoder} hold tokens, and this recipe is trained from frames: "
            "extract with --encoder pixels-64"
        )
    return int(size)
