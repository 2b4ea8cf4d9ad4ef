"""Is one model better than another, or lucky? Intervals of R@K over queries, and paired comparisons.

A model is its ranks of the same queries, float [S, Q]: one row a training seed. What a query counts is the share of
the seeds that answer it within the first K places. Queries are drawn anew for intervals (percentile bootstrap); for
p, the two models change places at random, query by query. Values of queries are few, so that both are drawn as counts
of each value, whatever the number of queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from videoclip.errors import InputError

Query = tuple[tuple[str, str, str, str], int]  # (video, start, end, sentence), how many times seen before


@dataclass(frozen=True)
class Estimate:
    """A figure in percent with its interval; `seeds`: the figure of each seed."""

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """R@K of the second model minus the first's, in points, with its interval; `p`: how often as large by chance."""

    value: float
    low: float
    high: float
    p: float


def recall_at(ranks: np.ndarray, k: int, seed: int = 0, draws: int = 10_000, level: float = 0.95) -> Estimate:
    """R@K of `ranks` [S, Q] with the interval that holds `level` of the draws.

    Raises InputError for fewer than two queries, which have no interval.
    """
    hits = _hits(ranks, k)
    low, high = _interval(hits.mean(0), np.random.default_rng(seed), draws, level)
    return Estimate(100 * float(hits.mean()), low, high, tuple((100 * hits.mean(1)).tolist()))


def recall_difference(
    first: np.ndarray, second: np.ndarray, k: int, seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> Difference:
    """R@K of `second` [S', Q] minus that of `first` [S, Q] on the same queries, with interval and two-sided p.

    Raises InputError if the numbers of queries differ or are below two.
    """
    if first.shape[1] != second.shape[1]:
        raise InputError(f"{first.shape[1]} and {second.shape[1]} queries cannot be compared one by one")
    generator = np.random.default_rng(seed)
    gains = _hits(second, k).mean(0) - _hits(first, k).mean(0)  # [Q]
    low, high = _interval(gains, generator, draws, level)
    return Difference(100 * float(gains.mean()), low, high, _permutation_p(gains, generator, draws))


def _hits(ranks: np.ndarray, k: int) -> np.ndarray:
    if ranks.ndim != 2 or ranks.shape[1] < 2 or not len(ranks):
        raise InputError(f"ranks of shape {ranks.shape} have no interval; it takes at least two queries")
    return np.asarray(ranks <= k, np.float64)


def _interval(values: np.ndarray, generator: np.random.Generator, draws: int, level: float) -> tuple[float, float]:
    """Percentile interval, in percent, of the mean of `values` [Q] when Q of them are drawn with replacement."""
    levels, counts = np.unique(values, return_counts=True)
    means = generator.multinomial(len(values), counts / len(values), draws) @ levels / len(values)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return 100 * float(low), 100 * float(high)


def _permutation_p(gains: np.ndarray, generator: np.random.Generator, draws: int) -> float:
    """Share of random sign changes of `gains` [Q] whose mean is at least as far from zero; never zero itself."""
    sizes, counts = np.unique(np.abs(gains).round(12), return_counts=True)
    sums = (2 * generator.binomial(counts, 0.5, (draws, len(counts))) - counts) @ sizes
    as_far = int((np.abs(sums) >= abs(gains.sum()) - 1e-9).sum())
    return (1 + as_far) / (1 + draws)


def ranks_by_query(rows: Sequence[dict[str, Any]], where: str) -> dict[Query, float]:
    """Ranks from the rows of a retrieval evaluation's predictions.jsonl; `where` names it in errors.

    The same sentence of the same clip may be there several times: each counts.
    Raises InputError for rows without ranks, as other evaluations leave them.
    """
    ranks: dict[Query, float] = {}
    seen: Counter[tuple[str, str, str, str]] = Counter()
    for number, row in enumerate(rows, 1):
        rank = row.get("rank")
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not rank >= 1 or "sentence" not in row:
            raise InputError(f"{where}: row {number} has no rank; compare takes the results of retrieval evaluations")
        clip = (str(row.get("video_id")), str(row.get("start")), str(row.get("end")), str(row["sentence"]))
        ranks[(clip, seen[clip])] = float(rank)
        seen[clip] += 1
    if not ranks:
        raise InputError(f"{where}: holds no queries")
    return ranks


def on_same_queries(runs: Sequence[dict[Query, float]], names: Sequence[str]) -> np.ndarray:
    """float64 [runs, Q]: ranks of all runs, in the order of the first one's queries.

    Raises InputError, naming the run, if one has other queries than the first.
    """
    order = list(runs[0])
    for run, name in zip(runs, names):
        differing = run.keys() ^ runs[0].keys()
        if differing:
            raise InputError(
                f"{name}: {len(differing)} queries differ from those of {names[0]}; "
                "evaluate both on the same annotations"
            )
    return np.array([[run[query] for query in order] for run in runs], np.float64)
