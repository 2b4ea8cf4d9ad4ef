"""Learned prompts around the words of a frozen text encoder, and a transformer over frozen frames (Ju et al., 2022).

A text side is anything with `word_vectors` and `embed_word_vectors`: a CLIP, or a two-tower recipe of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from videoclip.errors import InputError
from videoclip.packed import Packed
from videoclip.parts.clip import Transformer

Position = Literal["relative", "absolute"]
DEVIATION = 0.01  # of the normal distribution that prompts and frame positions start from


class TextSide(Protocol):
    """A frozen text encoder taken apart: what words are looked up as in, embeddings out, with gradient through it."""

    @property
    def word_width(self) -> int:
        """Width of a word's vector."""
        ...

    @property
    def word_positions(self) -> int:
        """Most vectors of one text, the start and end words among them."""
        ...

    def word_vectors(self, word_ids: Packed) -> Packed:
        """Ids, rows int [N], start and end words included -> rows [N, W]."""
        ...

    def embed_word_vectors(self, vectors: Packed) -> Tensor:
        """Rows [N, W] of B texts -> [B, H]."""
        ...


class Prompts(nn.Module):
    """`prefix` vectors between a text's start word and its words, `postfix` between these and its end word.

    `relative`, the paper's: all texts share all vectors. `absolute`, the release's: a table of vectors by position, of
    which a text takes those at the positions that its prompts stand at, so that the postfix of a long name shares
    only some vectors with that of a short one.
    """

    def __init__(self, width: int, prefix: int, postfix: int, position: Position, positions: int) -> None:
        super().__init__()
        if min(prefix, postfix) < 0 or prefix + postfix + 3 > positions:
            raise InputError(
                f"prompts of {prefix} and {postfix} vectors leave no room for a word in {positions} positions"
            )
        self.prefix, self.postfix, self.position, self.positions = prefix, postfix, position, positions
        self.embedding = nn.Embedding(positions if position == "absolute" else prefix + postfix, width)
        with torch.no_grad():
            self.embedding.weight.mul_(DEVIATION)  # PyTorch's own are N(0, 1)

    @property
    def room(self) -> int:
        """Most words that a text may have between its start and its end."""
        return self.positions - self.prefix - self.postfix - 2

    def forward(self, words: Packed) -> Packed:
        """Vectors `start, words, end` of each text, rows [N, W] -> the same with prompts between them.

        Raises InputError, with its number, for a text that does not fit the positions, or lacks start and end.
        """
        bad = (words.lengths > self.room + 2) | (words.lengths < 2)
        if bad.any():
            place = int(bad.int().argmax())
            raise InputError(
                f"text {place} has {int(words.lengths[place]) - 2} words; with prompts of {self.prefix} and "
                f"{self.postfix} there is room for {self.room} between a start and an end word"
            )
        lengths = words.lengths + self.prefix + self.postfix
        numbers = Packed(torch.empty(int(lengths.sum())), lengths)
        k, owners = numbers.positions, numbers.owners  # position in the new text, and which text
        last, behind = lengths[owners] - 1, lengths[owners] - 1 - self.postfix  # end word; first postfix vector
        is_prefix, is_postfix = (k >= 1) & (k <= self.prefix), (k >= behind) & (k < last)
        if self.position == "absolute":
            vector = k
        else:
            vector = torch.where(is_prefix, k - 1, self.prefix + k - behind)
        word = torch.where(k == 0, 0, torch.where(k == last, words.lengths[owners] - 1, k - self.prefix))
        source = torch.where(is_prefix | is_postfix, len(words.rows) + vector, words.starts[owners] + word)
        both = torch.cat([words.rows, self.embedding.weight.to(words.rows)])
        return Packed(both[source.to(both.device)], lengths)


def fit_words(word_ids: Sequence[Sequence[int]], room: int) -> tuple[list[list[int]], int]:
    """Texts, start and end words included, cut to `room` words between them; and how many had to be cut."""
    cut = [[*ids[: room + 1], ids[-1]] if len(ids) > room + 2 else list(ids) for ids in word_ids]
    return cut, sum(len(ids) > room + 2 for ids in word_ids)


def cut_words(words: Packed, room: int) -> tuple[Packed, int]:
    """`fit_words` of texts laid end to end, rows [N]: those that fit stay as they are."""
    lengths = words.lengths.clamp(max=room + 2)
    kept = (words.positions <= room) | (words.positions == words.lengths[words.owners] - 1)
    return Packed(words.rows[kept.to(words.rows.device)], lengths), int((words.lengths > room + 2).sum())


def pack_words(word_ids: Sequence[Sequence[int]]) -> Packed:
    """Lists of ids -> rows int64 [N]. Raises InputError if there is no list, or one lacks a start and an end word."""
    if not word_ids or min(map(len, word_ids)) < 2:
        raise InputError("give at least one text, each with its start and end word")
    return Packed.of([torch.tensor(list(ids), dtype=torch.int64) for ids in word_ids])


class TemporalTransformer(nn.Module):
    """Learned positions and CLIP's blocks over a clip's frozen frame features, then their mean.

    Without layers the mean of the raw features, as the release has it: no positions either.
    """

    def __init__(self, width: int, frames: int, layers: int, heads: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(frames, width)
        self.transformer = Transformer(width, layers, heads)
        with torch.no_grad():
            self.positions.weight.mul_(DEVIATION)

    def forward(self, frames: Packed) -> Tensor:
        """Features of B clips, rows [N, W] -> [B, W]. Raises InputError for a clip with more frames than positions."""
        return torch.stack([rows.mean(0) for rows in self.hidden(frames).split()])

    def hidden(self, frames: Packed) -> Packed:
        """One output a frame, rows [N, W]."""
        if not len(self.transformer.resblocks):
            return frames
        if int(frames.lengths.max()) > len(self.positions.weight):
            raise InputError(
                f"a clip of {int(frames.lengths.max())} frames; this model takes {len(self.positions.weight)}: "
                "sample them first"
            )
        places = (torch.arange(len(frames.rows)) - frames.starts[frames.owners]).to(frames.rows.device)
        x, order = frames.with_rows(frames.rows + self.positions(places)).by_length()
        return self.transformer(x).take(torch.argsort(order))
