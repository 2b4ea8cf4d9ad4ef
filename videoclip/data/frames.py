"""Clips of a few frames: which frames are chosen, and the batches that models on pixels are trained with.

Frames are chosen by number before anything is decoded. Samplers that draw take a generator; those that do not are for
evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from videoclip.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from videoclip.packed import Packed

SAMPLERS = ("uniform", "middle", "random", "segments", "headtail", "dense", "release-uniform")
DRAWING = ("random", "segments", "headtail", "dense")


def choose_frames(
    count: int, wanted: int, sampler: str = "uniform", generator: np.random.Generator | None = None, stride: int = 1
) -> np.ndarray:
    """int64 [wanted], rising: which of `count` frames make the clip. A short video repeats frames.

    "uniform": at i * count / wanted, rounded down, so that every frame stands at the start of its share.
    "middle": in the middle of each of `wanted` equal segments. "segments": one drawn from each of them (Frozen in
    Time's training). "random": drawn from all, sorted. "headtail": half drawn from each half of the video, sorted
    (ALPRO's pretraining). "dense": a window of neighbours `stride` apart, placed by chance, or in the middle without a
    generator. "release-uniform": ALPRO's `arange(0, n, n / T, dtype=int)`, which steps by the whole part of n / T and
    so never reaches the end (n 300, T 8: 0, 37, 74, … 259).
    Raises InputError if there is no frame, the sampler is unknown, or one that draws has no generator.
    """
    if count < 1 or wanted < 1:
        raise InputError(f"a clip of {wanted} frames cannot be chosen from {count}")
    if sampler not in SAMPLERS:
        raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, not {sampler!r}")
    if sampler == "uniform":
        return np.arange(wanted) * count // wanted
    if sampler == "middle":
        return (2 * np.arange(wanted) + 1) * count // (2 * wanted)
    if sampler == "release-uniform":
        return np.minimum(np.arange(wanted) * max(1, int(count / wanted)), count - 1)
    if sampler == "dense":
        span = (wanted - 1) * stride + 1
        free = max(0, count - span)
        first = free // 2 if generator is None else int(generator.integers(free + 1))
        return np.minimum(first + stride * np.arange(wanted), count - 1)
    if generator is None:
        raise InputError(f"the sampler {sampler!r} draws: it needs a generator")
    if sampler == "segments":
        edges = np.arange(wanted + 1) * count // wanted
        return generator.integers(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1))
    if sampler == "headtail":
        half = (count + 1) // 2
        head = _draw(np.arange(half), (wanted + 1) // 2, generator)
        tail = _draw(np.arange(min(half, count - 1), count), wanted // 2, generator)
        return np.concatenate([head, tail])
    return _draw(np.arange(count), wanted, generator)


def _draw(frames: np.ndarray, wanted: int, generator: np.random.Generator) -> np.ndarray:
    """`wanted` of `frames`, rising; all of them, some twice, if there are fewer."""
    whole = np.tile(frames, wanted // len(frames))
    return np.sort(np.concatenate([whole, generator.choice(frames, wanted % len(frames), replace=False)]))


def random_crop_of_patches(
    grid: int, generator: np.random.Generator, area: tuple[float, float] = (0.3, 0.5), patch: int = 16
) -> np.ndarray:
    """int64 [4]: top, left, height and width of one crop, in patches of a `grid` x `grid` picture, as ALPRO draws it.

    The area is even in `area` (a share of the picture) and the ratio even in [0.3, 1 / 0.3], so crops are mostly taller
    than wide; sides and corner, which may lie anywhere, are floored to whole patches, and all is drawn anew until the
    crop is inside and not empty. So large crops are rarer and the area is smaller: 0.22 to 0.49 of 14 x 14 patches.
    """
    size = grid * patch
    while True:
        pixels = generator.uniform(*area) * size * size
        ratio = generator.uniform(0.3, 1 / 0.3)
        height, width = int((pixels * ratio) ** 0.5) // patch, int((pixels / ratio) ** 0.5) // patch
        top, left = (generator.integers(0, size, 2) // patch).tolist()
        if height and width and top + height <= grid and left + width <= grid:
            return np.array([top, left, height, width])


@dataclass(frozen=True)
class FrameBatch:
    """B clips and their texts.

    `frames`: uint8 [B, T, S, S, 3] RGB (or float [B, T, 3, S, S], normalised already). `words`: ids with [CLS] … [SEP].
    `draws`: what masks and negatives are drawn with, by a pair's number, the same on all workers; else torch's own is.
    `crops`: int64 [B, 4], top, left, height, width in patches. `kind`: "video", or "image" if every clip is one
    picture. `labels`: int64 [B, 3], whose negative a pair is (`videoclip.retrieval.false_negatives`); without them all
    others are. `relabel`: int64 [B], whose entity labels each clip is given, for a control. `answers`: int64 [B], the
    numbers of the right answers where `words` are questions, -100 for one that is none of the model's.
    `rows_per_rank`: the clips of every worker in this step.
    """

    frames: Tensor
    words: Packed
    draws: torch.Generator | None = None
    crops: Tensor | None = None
    kind: str = "video"
    labels: Tensor | None = None
    relabel: Tensor | None = None
    answers: Tensor | None = None
    rows_per_rank: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.words)

    def to(self, device: torch.device) -> FrameBatch:
        """The same with frames, crops and answers on a device; words follow when they are embedded."""

        def there(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        words = self.words.to(device, self.words.rows.dtype)
        return replace(
            self, frames=self.frames.to(device), words=words, crops=there(self.crops), answers=there(self.answers)
        )

    @staticmethod
    def even(frames: Packed, wanted: int) -> Tensor:
        """Of clips of any length the `wanted` frames at even distances: [N, …] end to end -> [B, wanted, …]."""
        import torch

        chosen = [
            start + torch.from_numpy(choose_frames(length, wanted))
            for start, length in zip(frames.starts.tolist(), frames.lengths.tolist())
        ]
        return frames.rows[torch.stack(chosen).to(frames.rows.device)]
