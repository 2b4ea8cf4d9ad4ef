"""Pairs of all workers: every pair of a batch beside the rows that it is contrasted with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from videoclip.data.clips import ClipBatch
from videoclip.gather import gather, gather_with_gradient, rank_offset, rows_per_rank
from videoclip.retrieval.false_negatives import PAPER, false_negatives, pair_labels


@dataclass(frozen=True)
class Pairs:
    """Own embeddings `video`, `text` float [P, H], and those of all workers, `all_video`, `all_text` [W * P, H].

    Own pair p is row `rank_offset` + p of all. bool [P, W * P]: `excluded`, no negatives of each other;
    `other_videos`, negatives that come from another video.
    """

    video: Tensor
    text: Tensor
    all_video: Tensor
    all_text: Tensor
    rank_offset: int
    excluded: Tensor
    other_videos: Tensor

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """How near a clip finds its own text among all, as shares.

        "accuracy": of pairs whose own text is the nearest of all; "hard_negatives": of other videos' texts that a
        clip finds at least as near as its own; "excluded": of pairs of clips that were no negatives.
        """
        similarity = self.video @ self.all_text.T
        rows = torch.arange(len(self.video), device=self.video.device)
        own = similarity[rows, self.rank_offset + rows][:, None]
        hard = (similarity >= own) & self.other_videos
        return {
            "accuracy": (similarity.argmax(1) == self.rank_offset + rows).float().mean(),
            "hard_negatives": (hard.sum(1).double() / self.other_videos.sum(1).clamp_min(1)).mean(),
            "excluded": self.excluded.float().mean(),
        }


def gather_pairs(video: Tensor, text: Tensor, batch: ClipBatch) -> Pairs:
    """Bring the embeddings [P, H] of a batch's pairs together with those of all workers; gradients flow to each."""
    counts = batch.rows_per_rank or rows_per_rank(len(batch))
    offset = rank_offset(counts)
    labels = pair_labels(batch, PAPER, rank_offset=offset) if batch.labels is None else batch.labels
    labels = labels.to(video.device)
    all_labels = gather(labels, counts)
    excluded = false_negatives(labels, all_labels, offset)
    all_video, all_text = gather_with_gradient(video, counts), gather_with_gradient(text, counts)
    other_videos = (labels[:, :1] != all_labels[:, 0]) & ~excluded
    return Pairs(video, text, all_video, all_text, offset, excluded, other_videos)
