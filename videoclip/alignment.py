"""Sentences put where they are shown, and left out where they are of nothing that is shown.

A sentence is compared with every second of its video near to where it is said. It is moved to where as many seconds as
it lasts answer it best, less what a move costs. Whether it is of anything that is shown is told by other videos, of
which nearly all do not show it: its best second stands out of theirs, and these differ.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from videoclip.data.captions import Captions
from videoclip.data.shards import Shards, VideoRecord
from videoclip.embedding import TwoTowers, embed_seconds, embed_texts
from videoclip.errors import InputError
from videoclip.evaluation.absence import PEAK_SMOOTHING, Usual
from videoclip.evaluation.curves import smooth
from videoclip.evaluation.sentences import Reading, sentence_curves

MOVED = 0.5  # seconds from which on a caption counts as moved
SPREAD = 6.0  # weight of how much it matters to a sentence what is shown; chosen on the kitchen of seed 0
APART = 2.0  # deviations between two means from which on there are two kinds of sentences
MOST = 1e9  # a limit that is none


@dataclass(frozen=True)
class Moves:
    """How sentences may be moved. Times in seconds."""

    reach: float = 8.0
    """A sentence is moved at most so far."""
    by: Reading = "towers"
    """What compares captions with seconds: towers, or of the recipe `alignment` also together, or both (the mean)."""
    cost: float = 4.0
    """A move of so far must gain one unit of similarity by the model's own temperature, one of twice as far four."""

    def __post_init__(self) -> None:
        if not (0 <= self.reach < np.inf and 0 < self.cost < np.inf):
            raise InputError("reach cannot be negative, and cost must be more than zero")


def best_shifts(curves: np.ndarray, captions: Captions, temperature: float, moves: Moves) -> np.ndarray:
    """By how many seconds each caption is to be moved, float64 [S], given its similarities with seconds, [S, T].

    A whole number, or what it takes to stay inside the video; 0 where nowhere is better than where it is said.
    """
    duration, centre = curves.shape[1], int(moves.reach)
    start = captions.start.astype(np.float64)
    length = np.clip(captions.end - start, min(1, duration), duration)[:, None]  # at least a second is looked at
    begin = np.clip(start[:, None] + np.arange(-centre, centre + 1), 0, duration - length)  # (S, places)
    moved = begin - start[:, None]
    moved[:, centre] = 0
    finite = np.isfinite(curves)
    known = np.where(finite, curves, curves[finite].min())
    running = np.pad(np.cumsum(known, 1, dtype=np.float64), ((0, 0), (1, 0)))
    mean = (_at(running, begin + length) - _at(running, begin)) / length
    score = mean / temperature - (moved / moves.cost) ** 2
    score[:, centre] += 1e-9  # of equal places the one where it is
    best = score.argmax(1)
    return moved[np.arange(len(best)), best]


def _at(running: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Running sums [S, T + 1], linear in between, at times [S, K]."""
    whole = np.minimum(time.astype(np.int64), running.shape[1] - 2)
    before, after = np.take_along_axis(running, whole, 1), np.take_along_axis(running, whole + 1, 1)
    return before + (time - whole) * (after - before)


@dataclass(frozen=True)
class Limit:
    """The standing below which sentences are dropped, and what is thought of them, as shares.

    `off_topic`: of all sentences, those of nothing that is shown; `dropped`: of all, those below the limit;
    `precision`: of the dropped, those of nothing that is shown. All as far as can be known without a label.
    """

    standing: float
    off_topic: float
    dropped: float
    precision: float

    @classmethod
    def fit(cls, standing: np.ndarray, precision: float) -> Limit:
        """The highest limit with at least that `precision`, given what sentences [N] have.

        Sentences of something and of nothing are taken for a mixture of two normal distributions. Where these are not
        clearly two, less than two deviations apart, nothing is dropped.
        Raises InputError if there are fewer than two sentences, or the precision is no share.
        """
        if not 0 < precision <= 1:
            raise InputError(f"precision must be more than 0 and at most 1, not {precision}")
        if len(standing) < 2:
            raise InputError("a limit for dropping captions needs at least two of them; or use --keep-all")
        values = np.sort(standing.astype(np.float64))
        share, mean, deviation, lower = two_normals(values)
        apart = (mean[1] - mean[0]) / np.sqrt((deviation**2).mean())
        lower[values > mean[1]] = 0  # a wide lower one would claim the far end, too
        expected = np.cumsum(lower) / np.arange(1, len(values) + 1)
        fits = np.flatnonzero(expected >= precision)
        if apart < APART or not len(fits):
            return cls(-MOST, float(share[0]) if apart >= APART else 0.0, 0.0, 1.0)
        last = int(fits[-1])
        limit = values[last + 1] if last + 1 < len(values) else MOST
        return cls(float(limit), float(share[0]), (last + 1) / len(values), float(expected[last]))


def two_normals(values: np.ndarray, rounds: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A mixture of two normal distributions fitted to sorted values [N] by expectation and maximisation.

    Shares, means and deviations, float64 [2] each, the lower mean first, and of every value the probability that it
    belongs to that one, [N].
    """
    share, mean = np.array([0.3, 0.7]), np.quantile(values, [0.1, 0.7])
    least = 1e-3 * values.std() + 1e-9
    deviation = np.full(2, values.std() / 2 + least)
    for _ in range(rounds):
        density = np.log(share / deviation) - 0.5 * ((values[:, None] - mean) / deviation) ** 2  # (N, 2)
        belongs = np.exp(density - density.max(1, keepdims=True))
        belongs /= belongs.sum(1, keepdims=True)
        count = belongs.sum(0) + 1e-9
        mean = (belongs * values[:, None]).sum(0) / count
        deviation = np.sqrt((belongs * (values[:, None] - mean) ** 2).sum(0) / count) + least
        share = count / count.sum()
    order = np.argsort(mean)
    return share[order], mean[order], deviation[order], belongs[:, order[0]]


@dataclass(frozen=True)
class Placed:
    """Of one video's captions: by how many seconds each is moved, and its `Aligner.standing`, float64 [S] each."""

    shift: np.ndarray
    standing: np.ndarray


@dataclass
class Aligner:
    """A model that aligns the captions of one video after the other; `counts` says what became of them.

    "moved": by half a second or more; "in place"; "dropped".
    """

    model: TwoTowers
    usual: Usual
    moves: Moves
    limit: Limit | None
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def fit(
        cls, model: TwoTowers, shards: Shards, moves: Moves, precision: float | None, seed: int = 0, videos: int = 256
    ) -> Aligner:
        """Find the limit for dropping on up to so many videos drawn by `seed`; without a precision nothing is dropped.

        Raises InputError if the shards have no captions, or with a precision fewer than three videos.
        """
        if not any(len(part.caption_text) for part in shards.parts):
            raise InputError(f"{shards.folder}: holds no captions to align; run `videoclip extract` with --captions")
        if precision is None:
            return cls(model, Usual(np.zeros(0, np.int64), []), moves, None)
        found = cls(model, Usual.of(model, shards, seed), moves, None)
        rows = np.random.default_rng([seed, 9]).permutation(len(shards))[:videos]
        standing = []
        for row in tqdm(rows.tolist(), desc="what is usual", unit="video", disable=len(rows) < 20):
            record = shards.record(row)
            if len(record.captions):
                texts, seconds = embed_texts(model, record.captions.text), embed_seconds(model, record.tokens)
                standing.append(found.standing(texts, record.captions, row, seconds))
        found.limit = Limit.fit(np.concatenate([np.zeros(0), *standing]), precision)
        return found

    def align(self, record: VideoRecord, row: int) -> Captions:
        """The captions of one video, `row` of the shards, moved and dropped: sorted by start, with the same words."""
        captions = record.captions
        if not len(captions):
            return captions
        placed = self.place(record, row)
        kept, moved = np.ones(len(captions), bool), np.abs(placed.shift) >= MOVED
        if self.limit is not None:
            kept = placed.standing >= self.limit.standing
        self.counts.update(
            {"moved": int((kept & moved).sum()), "in place": int((kept & ~moved).sum()), "dropped": int((~kept).sum())}
        )
        start, end = (np.maximum(x + placed.shift, 0).astype(np.float32) for x in (captions.start, captions.end))
        order = np.flatnonzero(kept)[np.argsort(start[kept], kind="stable")]
        return Captions(start[order], end[order], [captions.text[i] for i in order])

    def place(self, record: VideoRecord, row: int) -> Placed:
        """Where the captions of one video, at least one, belong, and how they stand."""
        captions = record.captions
        seconds = embed_seconds(self.model, record.tokens)
        texts = embed_texts(self.model, captions.text)
        middle = (captions.start + captions.end).astype(np.float64) / 2
        near = self.moves.reach + float((captions.end - captions.start).max())
        curves = sentence_curves(self.model, record.tokens, texts, middle, near, seconds, self.moves.by)
        shift = best_shifts(curves, captions, float(self.model.temperature.detach()), self.moves)
        if self.limit is None:
            return Placed(shift, np.full(len(captions), np.inf))
        return Placed(shift, self.standing(texts, captions, row, seconds))

    def standing(self, texts: np.ndarray, captions: Captions, row: int, seconds: np.ndarray) -> np.ndarray:
        """How much speaks for each caption being of something that is shown near to where it is said: float64 [S].

        What its best second there has over its best ones in other videos, and how much these differ: whatever is shown
        is as near to a sentence of nothing as to any other.
        """
        first = np.clip((captions.start - self.moves.reach).astype(np.int64), 0, len(seconds) - 1)
        last = np.clip(np.ceil(captions.end + self.moves.reach).astype(np.int64), first + 1, len(seconds))
        curves = smooth(texts @ seconds.T, PEAK_SMOOTHING)
        second = np.arange(len(seconds))
        near = (first[:, None] <= second) & (second < last[:, None])
        mean, deviation = self.usual.of_texts(texts, np.full(len(texts), row))
        return np.where(near, curves, -np.inf).max(1) - mean + SPREAD * deviation
