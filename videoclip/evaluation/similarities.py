"""Retrieval figures of a whole similarity matrix, as collaborative experts and TeachText compute them.

For models whose similarities are no inner products of one vector each. Every text is a query of its own; a video is
asked with the best of its own texts; a tie takes the mean of its places.
"""

from __future__ import annotations

import numpy as np

from videoclip.errors import InputError

LEVELS = (1, 5, 10, 50)


def text_ranks(similarities: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """float64 [Q]: place, from 1, of a text's own video among all, in `similarities` [Q, V]; `owners` int64 [Q]."""
    _check(similarities, owners)
    own = similarities[np.arange(len(owners)), owners][:, None]
    return _places(similarities, own)


def video_ranks(similarities: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """float64 [V]: place of the best of a video's own texts among all texts. Every video has a text."""
    _check(similarities, owners)
    if missing := set(range(similarities.shape[1])) - set(owners.tolist()):
        raise InputError(f"video {min(missing)} of {similarities.shape[1]} has no text")
    best = np.full(similarities.shape[1], -np.inf)
    np.maximum.at(best, owners, similarities[np.arange(len(owners)), owners])
    return _places(similarities.T, best[:, None])


def _places(rows: np.ndarray, own: np.ndarray) -> np.ndarray:
    better = (rows > own).sum(1)
    return better + ((rows == own).sum(1) + 1) / 2


def _check(similarities: np.ndarray, owners: np.ndarray) -> None:
    if similarities.ndim != 2 or len(owners) != len(similarities) or not len(owners):
        raise InputError(f"{len(owners)} owners of the rows of similarities {similarities.shape}")
    if not np.isfinite(similarities).all():
        raise InputError("similarities hold values that are not finite")
    if owners.min() < 0 or owners.max() >= similarities.shape[1]:
        raise InputError(f"a text belongs to video {owners.max()} of {similarities.shape[1]}")


def figures(ranks: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10, R@50 in percent, their geometric mean but for the last, median and mean rank.

    Of a tie around the k-th place, theirs counts the one whose mean place begins with k; the first place is no tie.
    """
    found = {f"R@{k}": 100 * float((ranks == 1 if k == 1 else ranks < k + 1).mean()) for k in LEVELS}
    mean = float(np.prod([found[f"R@{k}"] for k in (1, 5, 10)]) ** (1 / 3))
    return {**found, "geometric_mean": mean, "MedR": float(np.median(ranks)), "MeanR": float(ranks.mean())}


def retrieval_figures(similarities: np.ndarray, owners: np.ndarray) -> dict[str, dict[str, float]]:
    """`figures` of "text_to_video" and "video_to_text"."""
    return {
        "text_to_video": figures(text_ranks(similarities, owners)),
        "video_to_text": figures(video_ranks(similarities, owners)),
    }
