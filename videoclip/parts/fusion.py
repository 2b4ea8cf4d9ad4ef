"""Fusion: words and video tokens in one sequence through layers of our own transformer, as in ALPRO.

Everything looks at everything: plain self-attention over the words followed by the video's tokens, no new embeddings,
no cross-attention, no mask. Sequences are packed, so there is no padding that could be looked at.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from videoclip.packed import Packed
from videoclip.transformer import Encoder, TransformerShape


def through(layers: Iterable[nn.Module], x: Packed) -> Packed:
    """`x` through layers over `Packed`; sequences of equal length are attended together, whatever their order."""
    ordered, before = x.by_length()
    for layer in layers:
        ordered = layer(ordered)
    return ordered.take(torch.argsort(before))


def fuse(layers: Iterable[nn.Module], words: Packed, video: Packed) -> Packed:
    """States [sum of (words + video tokens), W]: sequence p holds the words of pair p, then its video tokens."""
    return through(layers, words.cat(video))


class FusionEncoder(nn.Module):
    """A fusion encoder of its own layers, for towers that end before it: `forward(words, video) -> Packed`."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.encoder = Encoder(shape)

    def forward(self, words: Packed, video: Packed) -> Packed:
        """States of words and video tokens [N, W] -> fused states, the words of each pair first."""
        return fuse(self.encoder.layer, words, video)


def first_rows(x: Packed) -> Tensor:
    """[B, …]: the first row of every sequence, which is [CLS] where one was put there."""
    return x.rows[x.starts.to(x.rows.device)]


def last_rows(x: Packed, count: int) -> Tensor:
    """[B, count, …]: the last `count` rows of every sequence, such as a fused pair's video tokens."""
    ends = x.starts + x.lengths
    return x.rows[(ends[:, None] - count + torch.arange(count)).to(x.rows.device)]


def from_even(x: Tensor) -> Packed:
    """[B, n, …], sequences of one length -> packed, without copying."""
    return Packed(x.flatten(0, 1), torch.full((len(x),), x.shape[1]))
