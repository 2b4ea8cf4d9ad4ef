"""Two ranked lists made one: reciprocal rank fusion, with weights that held-out descriptions can fit.

Cosines and bm25 have no common scale, and adding them, however normalised, loses against the better one alone. Ranks
have: a window's score is the sum, over the channels that found it, of weight / (K + rank).

A video in which nothing is said cannot be found by words, which says nothing against it. Left at that, its windows
would stand behind all that both channels found; given their rank in the picture for the words, too, they would stand
before windows whose words fit less well. They get a rank for the words that lies between: SILENT times theirs in the
picture, if so many windows say anything of the query. `benchmarks/search_channels.py` has rows for such videos.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

K = 60.0  # as published (Cormack et al., 2009): the first ranks count nearly alike; with 10 they count for more
CHANNELS = ("picture", "words")
SILENT = 3


@dataclass(frozen=True)
class FusionConfig:
    """Weights of the two channels, and how flat ranks are. The defaults were fitted on the demo's channel, seed 0."""

    picture: float = 0.6
    words: float = 0.4
    k: float = 10.0


class Fused(NamedTuple):
    """One window: its fused score, and its rank in each channel that found it (the first is 1)."""

    window: int
    score: float
    ranks: dict[str, int]


def fuse(
    ranked: dict[str, Sequence[int]], config: FusionConfig = FusionConfig(), silent: Collection[int] = ()
) -> list[Fused]:
    """Windows of `ranked` lists, by channel, best first. A channel with weight 0 adds nothing.

    `silent`: windows of videos in which nothing is said at all.
    """
    weights = {"picture": config.picture, "words": config.words}
    scores: dict[int, float] = {}
    ranks: dict[int, dict[str, int]] = {}
    for channel, windows in ranked.items():
        for rank, window in enumerate(windows, 1):
            scores[window] = scores.get(window, 0.0) + weights[channel] / (config.k + rank)
            ranks.setdefault(window, {})[channel] = rank
    if "words" in ranked:
        for rank, window in enumerate(ranked.get("picture", ()), 1):
            if window in silent and SILENT * rank <= len(ranked["words"]):
                scores[window] += config.words / (config.k + SILENT * rank)
    order = sorted((window for window in scores if scores[window] > 0), key=lambda w: (-scores[w], w))
    return [Fused(window, scores[window], ranks[window]) for window in order]


@dataclass(frozen=True)
class Fit:
    """What fitting found: the best weights, their score, and the scores of each channel alone."""

    config: FusionConfig
    score: float
    alone: dict[str, float]

    def __str__(self) -> str:
        channel, best = max(self.alone.items(), key=lambda item: item[1])
        verdict = (
            f"{self.score - best:.1f} more than {channel} alone"
            if self.score > best
            else f"no more than {channel} alone, which is as good here"
        )
        return (
            f"picture {self.config.picture:g}, words {self.config.words:g}, k {self.config.k:g}: "
            f"mean of R@1 and R@5 {self.score:.1f}, {verdict}"
        )


SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def fit(score: Callable[[FusionConfig], float]) -> Fit:
    """Try weights of both channels, that of picture from 0 to 1 and that of words the rest, at two flatnesses.

    `score` says how good a setting is; of equals the one nearest to even weights is taken.
    """
    tried: list[tuple[float, float, FusionConfig]] = []
    for k in (10.0, K):
        for share in SHARES:
            config = FusionConfig(share, round(1 - share, 3), k)
            tried.append((score(config), -abs(share - 0.5), config))
    best = max(tried, key=lambda item: item[:2])
    alone = {
        "picture": max(value for value, _, config in tried if config.words == 0),
        "words": max(value for value, _, config in tried if config.picture == 0),
    }
    return Fit(best[2], best[0], alone)
