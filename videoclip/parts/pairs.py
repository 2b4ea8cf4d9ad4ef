"""Pairs of all workers: every pair of a batch beside the rows that it is contrasted with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from videoclip.data.clips import ClipBatch
from videoclip.data.frames import FrameBatch
from videoclip.gather import gather, gather_with_gradient, rank_offset, rows_per_rank
from videoclip.losses import chance_of_contrastive_loss, contrastive_loss
from videoclip.retrieval.false_negatives import PAPER, false_negatives, pair_labels

BLOCK = 1 << 20  # similarities of own pairs with all that are held at a time: 4 MB as float32


@dataclass(frozen=True)
class Pairs:
    """Own embeddings `video`, `text` float [P, H], and those of all workers, `all_video`, `all_text` [W * P, H].

    Own pair p is row `rank_offset` + p of all. `labels` [P, 3] and `all_labels` [W * P, 3] as `pair_labels` makes them.
    """

    video: Tensor
    text: Tensor
    all_video: Tensor
    all_text: Tensor
    rank_offset: int
    labels: Tensor
    all_labels: Tensor

    def __len__(self) -> int:
        """Number of own pairs."""
        return len(self.video)

    @cached_property
    def excluded(self) -> Tensor:
        """bool [P, W * P]: pairs that are no negatives of each other."""
        return false_negatives(self.labels, self.all_labels, self.rank_offset)

    @property
    def other_videos(self) -> Tensor:
        """bool [P, W * P]: negatives that come from another video."""
        return (self.labels[:, :1] != self.all_labels[:, 0]) & ~self.excluded

    @property
    def blocks(self) -> list[Pairs]:
        """The same in runs of own pairs, each against all, so that [P, W * P] is never held; one, where that fits."""
        size = max(1, BLOCK // max(1, len(self.all_text)))
        if size >= len(self):
            return [self]
        return [
            replace(
                self,
                video=self.video[first : first + size],
                text=self.text[first : first + size],
                labels=self.labels[first : first + size],
                rank_offset=self.rank_offset + first,
            )
            for first in range(0, len(self), size)
        ]

    def mean(self, loss: Callable[[Pairs], Tensor]) -> Tensor:
        """A loss that is a mean over own pairs, scalar, block by block: the same to float error, in bounded memory.

        What a block computes is forgotten and computed again for its gradient.
        """
        blocks = self.blocks
        if len(blocks) == 1:
            return loss(self)

        def forgetful(block: Pairs) -> Tensor:
            return loss(replace(block))  # what is cached on the copy goes with it

        parts = [
            checkpoint(forgetful, block, use_reentrant=False, preserve_rng_state=False) * (len(block) / len(self))
            for block in blocks
        ]
        return torch.stack(parts).sum()

    def contrast(self, temperature: Tensor) -> Tensor:
        """`contrastive_loss` of own pairs against all, scalar: symmetric InfoNCE at a temperature."""

        def loss_of(block: Pairs) -> Tensor:
            gathered = block.all_video, block.all_text
            return contrastive_loss(block.video, block.text, temperature, gathered, block.rank_offset, block.excluded)

        return self.mean(loss_of)

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """How near a clip finds its own text among all, as shares.

        "accuracy": of pairs whose own text is the nearest of all; "hard_negatives": of other videos' texts that a
        clip finds at least as near as its own; "excluded": of pairs of clips that were no negatives.
        """
        of_blocks = [_figures_of_rows(block) for block in self.blocks]
        nearest, hard, excluded = (torch.cat(values) for values in zip(*of_blocks))
        return {
            "accuracy": nearest.mean(),
            "hard_negatives": hard.mean(),
            "excluded": excluded.mean(),
        }

    @torch.no_grad()
    def chance_loss(self) -> Tensor:
        """What `contrastive_loss` is for a model that tells nothing apart, a scalar."""
        return self.mean(lambda block: chance_of_contrastive_loss(block.excluded))


def _figures_of_rows(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """What `Pairs.figures` averages, of each own pair [P]."""
    similarity = pairs.video @ pairs.all_text.T  # (P, W * P)
    rows = torch.arange(len(pairs), device=similarity.device)
    own = similarity[rows, pairs.rank_offset + rows][:, None]
    others = pairs.other_videos
    hard = (similarity >= own) & others
    return (
        (similarity.argmax(1) == pairs.rank_offset + rows).float(),
        hard.sum(1).double() / others.sum(1).clamp_min(1),
        pairs.excluded.float().mean(1),
    )


def gather_pairs(video: Tensor, text: Tensor, batch: ClipBatch | FrameBatch) -> Pairs:
    """Bring the embeddings [P, H] of a batch's pairs together with those of all workers; gradients flow to each."""
    counts = batch.rows_per_rank or rows_per_rank(len(batch))
    offset = rank_offset(counts)
    if batch.labels is not None:
        labels = batch.labels.to(video.device)
    elif isinstance(batch, ClipBatch):
        labels = pair_labels(batch, PAPER, rank_offset=offset).to(video.device)
    else:  # every clip is of a video of its own
        labels = (offset + torch.arange(len(batch), device=video.device))[:, None].expand(-1, 3)
    video, text = _single(video), _single(text)
    all_video, all_text = gather_with_gradient(video, counts), gather_with_gradient(text, counts)
    return Pairs(video, text, all_video, all_text, offset, labels, gather(labels, counts))


def _single(rows: Tensor) -> Tensor:
    """At least float32: cosines in bfloat16, divided by a low temperature, would be off by half a unit."""
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
