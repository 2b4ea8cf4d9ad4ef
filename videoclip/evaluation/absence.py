""" "Not in this video": whether anything in a video answers a query at all, as a calibrated probability.

How near a query comes to a video depends on the query as much as on the video: some descriptions are near to
everything. So its best second is compared with its best seconds in other videos, of which nearly all do not show it,
and what that says is learned from queries whose videos are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from videoclip.errors import InputError
from videoclip.evaluation.curves import smooth

NEWTON_STEPS = 50
PEAK_SMOOTHING = 1.0  # seconds


def peaks(texts: np.ndarray, seconds: Sequence[np.ndarray]) -> np.ndarray:
    """Highest smoothed similarity of queries, [Q, H], in each of several videos, their seconds' embeddings [T, H].

    -> float64 [Q, V].
    """
    return np.stack([smooth(texts @ video.T, PEAK_SMOOTHING).max(1) for video in seconds], 1)


def prominence(peak: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Peaks [Q] of queries in their videos, in standard deviations above those in background videos [Q, V].

    Raises InputError if there are fewer than two background videos.
    """
    if background.ndim != 2 or background.shape[1] < 2:
        raise InputError("what is usual for a query takes at least two other videos")
    return (peak - background.mean(1)) / np.maximum(background.std(1), 1e-6)


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
