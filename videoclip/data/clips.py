"""Overlapping positives (VideoCLIP, section 3.2): which seconds and which words make a training pair.

A text clip is a run of consecutive captions within a budget of words. A time inside its span is drawn, and a video
clip of random length is grown around it. The two overlap in time but need not start or end together, because
narrators speak before or after what they show.

All pairs of a batch are drawn together with a few array operations.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from videoclip.data.shards import Shards
from videoclip.data.words import CaptionWords, WordTokenizer
from videoclip.errors import InputError
from videoclip.packed import Packed

ALL = slice(None)


@dataclass(frozen=True)
class ClipConfig:
    """How pairs are drawn. The defaults are the public release's pretraining configuration."""

    positives: str = "overlap"
    """`overlap` as in the paper, or `exact`: the video clip is the span of the text clip's captions."""
    clips_per_video: int = 16
    min_words: int = 8
    """A text clip's word budget is uniform in [min_words, max_words]; a longer single caption is cut."""
    max_words: int = 64
    min_seconds: int = 3
    """A video clip's length is uniform in [min_seconds, max_seconds]."""
    max_seconds: int = 32

    def __post_init__(self) -> None:
        if self.positives not in ("overlap", "exact"):
            raise InputError(f"positives must be 'overlap' or 'exact', not {self.positives!r}")
        if not 1 <= self.min_words <= self.max_words or not 1 <= self.min_seconds <= self.max_seconds:
            raise InputError("clip lengths must be positive, and a minimum at most its maximum")
        if self.clips_per_video < 1:
            raise InputError("clips_per_video must be at least 1")


@dataclass(frozen=True)
class ClipPairs:
    """Where P pairs lie. Seconds and captions count from the start of their own video; all int64 [P].

    Pair p joins the seconds [a, b) with the captions [i, j), cut to `words` words, of the video at place `video` in
    the list that was sampled from.
    """

    video: np.ndarray
    a: np.ndarray
    b: np.ndarray
    i: np.ndarray
    j: np.ndarray
    words: np.ndarray

    def __getitem__(self, share: slice) -> ClipPairs:
        """Some of the pairs."""
        columns = (self.video, self.a, self.b, self.i, self.j, self.words)
        return ClipPairs(*(column[share] for column in columns))


@dataclass(frozen=True)
class ClipBatch:
    """P pairs of clips.

    `video_tokens`: rows float16 [N, D]; `word_ids`: rows int32 [M], each text `[CLS] … [SEP]`; both P sequences.
    `video`: int64 [P], a pair's row in the shards. In training also `labels`, int64 [P, 3], which say whose negative
    a pair is (`videoclip.retrieval.false_negatives`), and `rows_per_rank`, the pairs of every worker in this step.
    """

    video_tokens: Packed
    word_ids: Packed
    video: Tensor
    labels: Tensor | None = None
    rows_per_rank: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.video)

    @classmethod
    def together(cls, parts: Sequence[ClipBatch]) -> ClipBatch:
        """The pairs of several, one after the other, without labels; at least one part."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            Packed.together([part.video_tokens for part in parts]),
            Packed.together([part.word_ids for part in parts]),
            torch.cat([part.video for part in parts]),
        )


def sample_pairs(
    starts: np.ndarray,
    ends: np.ndarray,
    words: np.ndarray,
    captions: np.ndarray,
    seconds: np.ndarray,
    config: ClipConfig,
    generator: np.random.Generator,
) -> ClipPairs:
    """Draw `clips_per_video` pairs from each of V videos.

    `starts`, `ends` (float [C], seconds) and `words` (int [C], words a caption) describe all captions of the videos,
    one video after the other; `captions` and `seconds` (int [V]) count those of each video, both at least 1. Every
    video has a word: see `ClipSampler.usable_rows`.
    """
    video = np.repeat(np.arange(len(captions)), config.clips_per_video)
    first = (np.cumsum(captions) - captions)[video]
    last = first + captions[video] - 1
    i = j = first + (generator.random(len(video)) * captions[video]).astype(np.int64)
    budget = generator.integers(config.min_words, config.max_words + 1, len(video))
    total = words[i]
    growing = np.ones(len(video), bool)
    while growing.any():
        forward = generator.random(len(video)) < 0.5
        forward = np.where(j == last, False, np.where(i == first, True, forward))
        candidate = np.clip(np.where(forward, j + 1, i - 1), first, last)
        # A caption without a word takes any neighbour, which is then cut to the budget: no text is empty.
        fits = (total == 0) | (total + words[candidate] <= budget)
        growing &= ~((i == first) & (j == last)) & fits
        total = total + np.where(growing, words[candidate], 0)
        i, j = np.where(growing & ~forward, candidate, i), np.where(growing & forward, candidate, j)
    begin, finish = starts[i].astype(np.float64), _latest_end(ends, i, j)
    a, b = _video_clips(begin, finish, seconds[video], config, generator)
    return ClipPairs(video, a, b, i - first, j - first + 1, np.minimum(total, budget))


def _latest_end(ends: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The latest end among captions i … j: they are sorted by start, but a long one may end after its successors."""
    bounds = np.stack([i, j + 1], 1).ravel()
    padded = np.append(ends, -np.inf)  # reduceat wants every bound to be an index
    return np.maximum.reduceat(padded, bounds)[::2].astype(np.float64)


def _video_clips(
    begin: np.ndarray, finish: np.ndarray, seconds: np.ndarray, config: ClipConfig, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds [a, b) of each pair, inside its video, that overlap the text clip's span [begin, finish)."""
    if config.positives == "exact":
        a = np.clip(np.floor(begin).astype(np.int64), 0, seconds - 1)
        b = np.clip(np.ceil(finish).astype(np.int64), a + 1, seconds)
        return a, np.minimum(b, a + config.max_seconds)
    # Captions may outlast the last token row by a fraction of a second; the centre may not.
    centre = begin + generator.random(len(begin)) * (finish - begin)
    centre = np.clip(np.floor(centre).astype(np.int64), 0, seconds - 1)
    length = generator.integers(config.min_seconds, config.max_seconds + 1, len(begin))
    length = np.minimum(length, seconds)
    a = np.clip(centre - length // 2, 0, seconds - length)
    return a, a + length


class ClipSampler:
    """Draws batches of pairs from shards. Rows of videos without captions cannot be sampled; see `usable_rows`."""

    def __init__(self, shards: Shards, tokenizer: WordTokenizer, config: ClipConfig, cache: Path) -> None:
        """`cache` is a folder for the captions' word ids, made on first use."""
        self.shards = shards
        self.config = config
        self.cls_id, self.sep_id = tokenizer.cls_id, tokenizer.sep_id
        self._words = CaptionWords(shards, tokenizer, cache)

    def with_clips(self, config: ClipConfig) -> ClipSampler:
        """The same shards and words, other clips."""
        other = copy.copy(self)
        other.config = config
        return other

    def usable_rows(self) -> np.ndarray:
        """int64 [N]: rows of the videos that have at least one caption of at least one word."""
        return np.concatenate([self.usable_rows_of_part(part) for part in range(len(self.shards.parts))])

    def usable_rows_of_part(self, part: int) -> np.ndarray:
        """`usable_rows` that lie in one part; no other is opened."""
        offsets = self._words.parts[part][1][self.shards.parts[part].caption_offsets]
        return self.shards.first_rows[part] + np.flatnonzero(np.diff(offsets) > 0)

    def batch(self, rows: np.ndarray, generator: np.random.Generator, share: slice = ALL) -> ClipBatch:
        """Pairs from the videos at `rows` (int64 [V]), `clips_per_video` of each, in that order.

        All are drawn; only those of `share` are read and returned.

        Of every video a copy is taken: what viewed its part would keep it open, and a batch may touch hundreds.
        """
        places = [self.shards.locate(int(row)) for row in rows]
        captions, seconds = np.zeros((2, len(places)), np.int64)
        starts, ends, word_offsets = [], [], []
        for v, (p, r) in enumerate(places):
            part = self.shards.parts[p]
            first, last = part.caption_offsets[r : r + 2]
            captions[v], seconds[v] = last - first, part.token_offsets[r + 1] - part.token_offsets[r]
            starts.append(part.caption_start[first:last].copy())
            ends.append(part.caption_end[first:last].copy())
            word_offsets.append(self._words.parts[p][1][first : last + 1])
        words = np.concatenate([np.diff(offsets) for offsets in word_offsets])
        pairs = sample_pairs(
            np.concatenate(starts), np.concatenate(ends), words, captions, seconds, self.config, generator
        )[share]
        texts = []
        for v, i, count in zip(*(column.tolist() for column in (pairs.video, pairs.i, pairs.words))):
            begin = int(word_offsets[v][i])
            texts.append(self._words.parts[places[v][0]][0][begin : begin + count])
        return ClipBatch(
            Packed(self._tokens(places, pairs), torch.from_numpy(pairs.b - pairs.a)),
            Packed(torch.from_numpy(np.concatenate(texts)), torch.from_numpy(pairs.words)).wrapped(
                torch.tensor([self.cls_id], dtype=torch.int32), torch.tensor([self.sep_id], dtype=torch.int32)
            ),
            torch.from_numpy(rows[pairs.video]),
        )

    def _tokens(self, places: list[tuple[int, int]], pairs: ClipPairs) -> Tensor:
        """float16 [N, D]: the pairs' seconds, end to end, of videos at `places` (part, row inside it)."""
        ends = np.cumsum(pairs.b - pairs.a)
        tokens = np.empty((int(ends[-1]) if len(ends) else 0, self.shards.manifest.dimension), np.float16)
        for v, a, b, end in zip(*(column.tolist() for column in (pairs.video, pairs.a, pairs.b, ends))):
            p, r = places[v]
            part = self.shards.parts[p]
            first = int(part.token_offsets[r])
            tokens[end - (b - a) : end] = part.flat_tokens[first + a : first + b]
        return torch.from_numpy(tokens)
