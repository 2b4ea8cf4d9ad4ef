"""Pairs drawn from shards of frames, as batches of clips of a few frames each.

Shards of the encoder `pixels-64` (`videoclip/encoders/pixels.py`) hold a video's frames, one a second, in the place of
tokens. So a recipe on pixels is trained, clustered, evaluated and searched by the same stages as one on tokens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from videoclip.data.clips import ClipBatch
from videoclip.data.frames import FrameBatch, choose_frames, random_crop_of_patches
from videoclip.data.shards import Manifest
from videoclip.errors import InputError
from videoclip.gather import rank_offset, rows_per_rank, shared_generator
from videoclip.packed import Packed
from videoclip.parts.vision_blocks import VisionShape


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


def frame_batch(batch: ClipBatch | FrameBatch, vision: VisionShape, frames: int, sampler: str) -> FrameBatch:
    """Pairs drawn from shards of frames -> clips of `frames` frames each, a crop each, and a generator.

    Frames and crops are drawn by a pair's number among those of all workers, whichever of them holds it, from a seed
    that the first takes from torch's generator: a resumed run draws the same again.
    """
    counts = batch.rows_per_rank or tuple(rows_per_rank(len(batch)))
    if isinstance(batch, FrameBatch):
        draws = batch.draws or shared_generator(batch.frames.device)
        return replace(batch, draws=draws, rows_per_rank=counts)
    clips = as_frames(batch.video_tokens, vision.size)
    draws = shared_generator(clips.rows.device)
    chosen, crops = [], []
    spans = zip(clips.starts.tolist(), clips.lengths.tolist())
    for number, (start, length) in enumerate(spans, rank_offset(counts)):
        generator = np.random.default_rng([draws.initial_seed(), number])
        chosen.append(start + choose_frames(length, frames, sampler, generator))
        crops.append(random_crop_of_patches(vision.grid, generator, patch=vision.patch))
    return FrameBatch(
        clips.rows[torch.from_numpy(np.stack(chosen)).to(clips.rows.device)],
        batch.word_ids.to(batch.word_ids.rows.device, torch.int64),
        draws,
        torch.from_numpy(np.stack(crops)),
        labels=batch.labels,
        rows_per_rank=counts,
    )


def frame_size(manifest: Manifest) -> int:
    """Height and width of the frames in shards. Raises InputError if they hold something else."""
    name, _, size = manifest.encoder.rpartition("-")
    if name not in ("pixels", "frames") or not size.isdigit() or int(size) ** 2 * 3 != manifest.dimension:
        raise InputError(
            f"shards of the encoder {manifest.encoder} hold tokens, and this recipe is trained from frames: "
            "extract with --encoder pixels-64"
        )
    return int(size)
