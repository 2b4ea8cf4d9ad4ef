"""Masked words: some words are hidden, and guessed from the others and from the video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.losses import IGNORED
from videoclip.packed import Packed

NOT_MASKED = IGNORED  # label of a word that is not to be guessed
CHANCES = 3  # numbers that decide about a word


@dataclass(frozen=True)
class WordMask:
    """How words are hidden. `special` ids are never hidden, nor drawn as a random word."""

    mask_id: int
    vocabulary: int
    special: tuple[int, ...]
    share: float = 0.15
    always: bool = False
    """Always [MASK], as ALPRO's paper says; else [MASK] 80%, a random word 10%, the word itself 10%, as BERT does and
    ALPRO's release too."""


def draw_hidden(
    words: Packed, how: WordMask, longest: int, first: int, draws: torch.Generator, counts: Sequence[int]
) -> tuple[Packed, Tensor]:
    """`hide_words` by numbers that are drawn for the pairs of all workers, of which own ones begin at `first`.

    `longest`: most words of a text, special ones included. What a word is given does not depend on who holds it.
    """
    chance = torch.rand(sum(counts), longest, CHANCES, generator=draws, dtype=torch.float64)
    return hide_words(words, how, chance[first + words.owners, words.positions])


def hide_words(words: Packed, how: WordMask, chance: Tensor) -> tuple[Packed, Tensor]:
    """Word ids int [N] -> the ids with some hidden, and labels int64 [N]: the hidden word, or NOT_MASKED.

    `chance`, float64 [N, CHANCES] on the CPU, even in [0, 1): whether a word is hidden, what takes its place, and which
    other word does.
    """
    ids = words.rows.cpu().long()
    hide, turn, which = chance.unbind(1)
    hidden = (hide < how.share) & ~torch.isin(ids, torch.tensor(how.special))
    usual = torch.arange(how.vocabulary)
    usual = usual[~torch.isin(usual, torch.tensor(how.special))]
    other = usual[(which * len(usual)).long()]
    masked = hidden & ((turn < 0.8) | how.always)
    random = hidden & (turn >= 0.9) & (not how.always)
    seen = torch.where(masked, torch.full_like(ids, how.mask_id), torch.where(random, other, ids))
    labels = torch.where(hidden, ids, torch.full_like(ids, NOT_MASKED))
    return words.with_rows(seen.to(words.rows.device)), labels.to(words.rows.device)


class Transform(nn.Module):
    """BERT's layer before the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """States to scores of every word. With `tied` the word embeddings are the last matrix and are not held twice."""

    def __init__(self, width: int, vocabulary: int, tied: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.transform = Transform(width)
        self.decoder = None if tied else nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """[N, W] and the word embeddings [V, W] -> [N, V]."""
        return F.linear(self.transform(x), embeddings if self.decoder is None else self.decoder.weight, self.bias)


class MaskedWordHead(nn.Module):
    """BERT's head for masked words, under BERT's names (`cls.predictions.…`)."""

    def __init__(self, width: int, vocabulary: int, tied: bool = True) -> None:
        super().__init__()
        self.predictions = Predictions(width, vocabulary, tied)

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        return self.predictions(x, embeddings)
