"""Pairs that only look like negatives: clips with the same text, and clips of the same video uploaded twice.

Batches of similar videos (section 3.3 of the paper) draw such pairs together. They are left out of the loss; turning
both rules off reproduces the paper.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from videoclip.errors import InputError
from videoclip.retrieval.index import unit

if TYPE_CHECKING:
    from videoclip.data.clips import ClipBatch
    from videoclip.packed import Packed


@dataclass(frozen=True)
class FalseNegativeConfig:
    """Which pairs are not negatives of each other."""

    same_text: bool = True
    """Clips whose words are the same."""
    duplicate_similarity: float | None = 0.98
    """Clips of two videos whose embeddings have at least this cosine, about the mean of all videos; None: never."""

    def __post_init__(self) -> None:
        if self.duplicate_similarity is not None and not 0 < self.duplicate_similarity <= 1:
            raise InputError(f"duplicate_similarity must lie in (0, 1], not {self.duplicate_similarity}")


PAPER = FalseNegativeConfig(same_text=False, duplicate_similarity=None)  # all other pairs are negatives


def near_duplicates(embeddings: np.ndarray, batches: list[np.ndarray], similarity: float) -> np.ndarray:
    """int64 [N]: a label for every row; two rows of one batch share it if they are near-duplicate videos.

    Near-duplicates have a cosine of at least `similarity` after the mean of all rows is taken off (embeddings of a
    young model all point much the same way), or are linked by others that have, also where the links lie in several
    batches. Only videos of one batch are compared: that is where clustering puts the same video uploaded twice.
    """
    pairs = [np.zeros((0, 2), np.int64)]
    mean = np.asarray(embeddings[:: -(-len(embeddings) // 65536)], np.float32).mean(0)
    for batch in batches:
        rows = unit(np.asarray(embeddings[batch], np.float32) - mean)
        alike = np.argwhere(np.triu(rows @ rows.T >= similarity - 1e-6, 1))
        pairs.append(batch[alike])
    return _linked(np.concatenate(pairs), len(embeddings))


def _linked(pairs: np.ndarray, count: int) -> np.ndarray:
    """int64 [count]: the smallest of all numbers that each number is linked to by `pairs`, int64 [P, 2]."""
    label = np.arange(count)
    one, other = pairs.T
    while (label[one] != label[other]).any():
        smaller = np.minimum(label[one], label[other])
        for end in (one, other):
            np.minimum.at(label, label[end], smaller)  # the label itself moves, and with it all that bear it
        while (label != label[label]).any():
            label = label[label]
    return label


def pair_labels(
    batch: ClipBatch, config: FalseNegativeConfig, duplicates: np.ndarray | None = None, rank_offset: int = 0
) -> Tensor:
    """int64 [P, 3]: of every pair the video's row, what stands for its near-duplicates, and what stands for its text.

    `duplicates` gives a label to every row of the shards; without it, or where the rule is off, every video stands
    for itself. Where texts may be repeated, each stands for itself too: the pairs of all workers are counted through,
    this worker's from `rank_offset` on.
    """
    video = batch.video
    same = video
    if duplicates is not None and config.duplicate_similarity is not None:
        same = torch.from_numpy(duplicates)[video]
    text = digests_of_texts(batch.word_ids) if config.same_text else rank_offset + torch.arange(len(batch))
    return torch.stack([video, same, text], 1)


def text_labels(video: Tensor, words: Packed) -> Tensor:
    """`pair_labels` of clips of `video`, int64 [P], and their words: those with the same words are no negatives."""
    return torch.stack([video, video, digests_of_texts(words)], 1)


def digests_of_texts(words: Packed) -> Tensor:
    """int64 [P]: what stands for each text; equal for equal word ids."""
    digests = [hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).digest() for ids in words.split()]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


def false_negatives(own: Tensor, everyone: Tensor, rank_offset: int) -> Tensor:
    """bool [P, W * P]: which of all pairs are no negatives of each own pair.

    `own` and `everyone` are `pair_labels`, int64 [P, 3] and [W * P, 3]; own pair p is row `rank_offset` + p of
    everyone. Clips of the very same video stay negatives, as in the paper. A pair is never excluded from itself.
    """
    video, same, text = own.unsqueeze(1).unbind(2)  # each (P, 1)
    all_video, all_same, all_text = everyone.unbind(1)  # each (W * P,)
    excluded = (text == all_text) | ((same == all_same) & (video != all_video))
    rows = torch.arange(len(own), device=own.device)
    excluded[rows, rank_offset + rows] = False
    return excluded
