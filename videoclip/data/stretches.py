"""Long stretches of video with everything that is said in them: what a model learns alignment from.

Where overlapping clips (`clips.py`) pair a moment with a few words, a stretch is a minute with all of its sentences,
each with the time at which it is said, which may be seconds away from where it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from videoclip.data.clips import ALL, ClipConfig, ClipSampler
from videoclip.data.shards import Shards
from videoclip.data.words import WordTokenizer
from videoclip.packed import Packed

MOST_SENTENCES = 64  # of one stretch; of more, as many at random


@dataclass(frozen=True)
class StretchBatch:
    """P stretches of video and the S sentences that are said in them.

    `video_tokens`: rows float16 [N, D], P sequences; `word_ids`: rows int32 [M], S sequences `[CLS] … [SEP]`, those of
    the first stretch first; `sentences`: int64 [P], on the CPU, how many each has, at least one; `said`: float32
    [S, 2], start and end in seconds of the stretch; `video`: int64 [P], rows in the shards.
    """

    video_tokens: Packed
    word_ids: Packed
    sentences: tuple[int, ...]
    said: Tensor
    video: Tensor
    labels: Tensor | None = None
    rows_per_rank: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Number of stretches."""
        return len(self.video)

    @classmethod
    def together(cls, parts: Sequence[StretchBatch]) -> StretchBatch:
        """The stretches of several, one after the other; at least one part."""
        return cls(
            Packed.together([part.video_tokens for part in parts]),
            Packed.together([part.word_ids for part in parts]),
            tuple(count for part in parts for count in part.sentences),
            torch.cat([part.said for part in parts]),
            torch.cat([part.video for part in parts]),
        )


class StretchSampler(ClipSampler):
    """Draws one stretch of at most `seconds` from every video; with other clips (`with_clips`), clips as before."""

    def __init__(
        self, shards: Shards, tokenizer: WordTokenizer, clips: ClipConfig, cache: Path, seconds: int, max_words: int
    ) -> None:
        """Sentences are cut to `max_words`; `cache` as `ClipSampler` has it."""
        super().__init__(shards, tokenizer, replace(clips, clips_per_video=1), cache)
        self.seconds, self.max_words = seconds, max_words

    def with_clips(self, config: ClipConfig) -> ClipSampler:
        """The same shards and words, as pairs of clips: what videos are compared by."""
        clips = ClipSampler.__new__(ClipSampler)
        clips.__dict__.update(self.__dict__, config=config)
        return clips

    def batch(self, rows: np.ndarray, generator: np.random.Generator, share: slice = ALL) -> StretchBatch:  # type: ignore[override]
        """A stretch of each of the videos at `rows`, int64 [V]; all are drawn, those of `share` are read."""
        draws = generator.random((len(rows), 2 + MOST_SENTENCES))
        return StretchBatch.together([self._stretch(int(row), draw) for row, draw in zip(rows[share], draws[share])])

    def _stretch(self, row: int, draw: np.ndarray) -> StretchBatch:
        """One stretch around a sentence: `draw`, uniform in [0, 1), says which, and where in the stretch it lies."""
        p, inside = self.shards.locate(row)
        part, (ids, offsets) = self.shards.parts[p], self._words.parts[p]
        first, last = (int(offset) for offset in part.caption_offsets[inside : inside + 2])
        tokens = part.tokens(inside)
        start, end = part.caption_start[first:last].astype(np.float64), part.caption_end[first:last].astype(np.float64)
        words = np.diff(offsets[first : last + 1])
        middle = np.minimum((start + end) / 2, len(tokens) - 1e-3)
        spoken = np.flatnonzero(words)
        length = min(self.seconds, len(tokens))
        chosen = middle[spoken[int(draw[0] * len(spoken))]]
        lowest, highest = max(0, int(np.ceil(chosen - length + 1e-3))), min(int(chosen), len(tokens) - length)
        a = lowest + int(draw[1] * (highest - lowest + 1))
        inner = spoken[(middle[spoken] >= a) & (middle[spoken] < a + length)]
        if len(inner) > MOST_SENTENCES:
            inner = np.sort(np.random.default_rng(draw[2:].view(np.uint64)).choice(inner, MOST_SENTENCES, False))
        texts = [ids[offsets[first + i] :][: min(int(words[i]), self.max_words)] for i in inner]
        wrapped = [[self.cls_id, *text.tolist(), self.sep_id] for text in texts]
        return StretchBatch(
            Packed(torch.from_numpy(tokens[a : a + length].copy()), torch.tensor([length])),
            Packed.of([torch.tensor(text, dtype=torch.int32) for text in wrapped]),
            (len(inner),),
            torch.from_numpy(np.stack([start[inner], end[inner]], 1) - a).float(),
            torch.tensor([row]),
        )
