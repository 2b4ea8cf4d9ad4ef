""" "Not in this video": whether anything in a video answers a query at all, as a calibrated probability.

How near a query comes to a video depends on the query as much as on the video: some descriptions are near to
everything. So its best second is compared with its best seconds in other videos, of which nearly all do not show it,
and what that says is learned from queries whose videos are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from videoclip.data.qvhighlights import MomentQuery
from videoclip.data.shards import Shards
from videoclip.data.templates import PLAIN
from videoclip.embedding import TwoTowers, embed_seconds, embed_texts
from videoclip.errors import InputError
from videoclip.evaluation.curves import smooth

NEWTON_STEPS = 50
PEAK_SMOOTHING = 1.0  # seconds
USUAL_VIDEOS = 64  # that say what is usual for a query


def peaks(texts: np.ndarray, seconds: Sequence[np.ndarray]) -> np.ndarray:
    """Highest smoothed similarity of queries, [Q, H], in each of several videos, their seconds' embeddings [T, H].

    -> float64 [Q, V].
    """
    return np.stack([smooth(texts @ video.T, PEAK_SMOOTHING).max(1) for video in seconds], 1)


@dataclass(frozen=True)
class Usual:
    """Some videos of a folder of shards, `rows` int64 [V] and their seconds' embeddings, that tell what is usual."""

    rows: np.ndarray
    seconds: list[np.ndarray]

    @classmethod
    def of(cls, model: TwoTowers, shards: Shards, seed: int = 0, videos: int = USUAL_VIDEOS) -> Usual:
        """Videos drawn by `seed`. Raises InputError if the shards hold fewer than three."""
        if len(shards) < 3:
            raise InputError(f"{shards.folder}: what is usual for a query takes at least three videos")
        rows = np.random.default_rng([seed, 7]).permutation(len(shards))[:videos]
        return cls(rows, [embed_seconds(model, shards.tokens(int(row))) for row in rows])

    def of_texts(self, texts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of what texts, embeddings [Q, H], reach in these videos: float64 [Q] each.

        The videos that they belong to, at `rows` int64 [Q], say nothing about others and are left out.
        """
        reached = peaks(texts, self.seconds)
        reached[rows[:, None] == self.rows] = np.nan
        return np.nanmean(reached, 1), np.nanstd(reached, 1)

    def prominence(self, texts: np.ndarray, rows: np.ndarray, peak: np.ndarray) -> np.ndarray:
        """Of queries that have their `peak` [Q] in the videos at `rows`: float64 [Q], in deviations above the mean."""
        mean, deviation = self.of_texts(texts, rows)
        return (peak - mean) / np.maximum(deviation, 1e-6)


def ask(
    model: TwoTowers,
    shards: Shards,
    queries: Sequence[MomentQuery],
    seed: int = 0,
    templates: Sequence[str] = PLAIN,
) -> tuple[np.ndarray, np.ndarray]:
    """Prominence of every query in its own video, and in another one of the queries' videos: float64 [Q] each.

    The other one is drawn among those that no query of the same words belongs to. All videos are in the shards.
    Raises InputError if a query has no such video.
    """
    place = shards.rows_by_id()
    own = np.array([place[query.video_id] for query in queries])
    asked = np.unique(own)
    words = np.unique([query.query for query in queries], return_inverse=True)[1]
    generator = np.random.default_rng([seed, 8])
    other = np.empty_like(own)
    for q, same in enumerate(words[:, None] == words):
        elsewhere = np.setdiff1d(asked, own[same])
        if not len(elsewhere):
            raise InputError(f"every video has the query {queries[q].query!r}: nothing to ask it of where it is absent")
        other[q] = generator.choice(elsewhere)
    texts, usual = embed_texts(model, [query.query for query in queries], templates), Usual.of(model, shards, seed)
    peak = np.empty((2, len(queries)))
    for row in asked:
        seconds = embed_seconds(model, shards.tokens(int(row)))
        for kind, videos in enumerate((own, other)):
            here = np.flatnonzero(videos == row)
            if len(here):
                peak[kind, here] = peaks(texts[here], [seconds])[:, 0]
    return usual.prominence(texts, own, peak[0]), usual.prominence(texts, other, peak[1])


@dataclass(frozen=True)
class Presence:
    """Probability that a query with a given prominence is answered by a video: 1 / (1 + exp(-(slope x + offset)))."""

    slope: float
    offset: float

    @classmethod
    def fit(cls, present: np.ndarray, absent: np.ndarray) -> Presence:
        """Logistic regression on prominences [P] of queries that are answered and [A] of queries that are not.

        Both kinds weigh the same, however many there are; targets are drawn in a little, as Platt does, so that
        perfectly separable ones have a finite answer.
        Raises InputError if one of them is empty or not finite.
        """
        values = np.concatenate([present, absent]).astype(np.float64)
        if not len(present) or not len(absent) or not np.isfinite(values).all():
            raise InputError(
                "calibration needs finite prominences of queries that are answered and of some that are not"
            )
        x = np.stack([values, np.ones(len(values))], 1)
        target = np.repeat(
            [(len(present) + 1) / (len(present) + 2), 1 / (len(absent) + 2)], [len(present), len(absent)]
        )
        weight = np.repeat([0.5 / len(present), 0.5 / len(absent)], [len(present), len(absent)])
        parameters = np.zeros(2)
        for _ in range(NEWTON_STEPS):
            probability = 1 / (1 + np.exp(-np.clip(x @ parameters, -30, 30)))
            gradient = x.T @ (weight * (probability - target))
            curvature = (x * (weight * probability * (1 - probability))[:, None]).T @ x + 1e-9 * np.eye(2)
            parameters = parameters - np.clip(np.linalg.solve(curvature, gradient), -2, 2)
        return cls(float(parameters[0]), float(parameters[1]))

    def probability(self, prominence: np.ndarray) -> np.ndarray:
        """That a video answers queries of these prominences [Q]: float64 [Q]."""
        return 1 / (1 + np.exp(-np.clip(self.slope * prominence + self.offset, -30, 30)))


def absence_metrics(present: np.ndarray, absent: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """Precision and recall, in percent, of saying "not in this video" where the probability is below `threshold`.

    `present`, `absent`: probabilities of queries whose video answers them, and of queries whose video does not.
    `AUC`: how often an answered query has the higher probability of the two.
    """
    said, wrongly = (absent < threshold).sum(), (present < threshold).sum()
    auc = np.mean([(present > value).mean() + 0.5 * (present == value).mean() for value in absent])
    return {
        "precision": round(100 * float(said / max(1, said + wrongly)), 1),
        "recall": round(100 * float(said / len(absent)), 1),
        "AUC": round(100 * float(auc), 1),
    }
