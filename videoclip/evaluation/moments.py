"""QVHighlights' figures, as its official evaluation computes them: moment retrieval (MR) and highlights (HL).

All queries are scored together with array operations; definitions are those of the official script, ties included.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.data.qvhighlights import MomentQuery, read_windows
from videoclip.errors import InputError
from videoclip.files import read_json_lines

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
LENGTHS = {"full": (0, 150), "long": (30, 150), "middle": (10, 30), "short": (0, 10)}  # seconds, (from, to]
MAX_WINDOWS = 10  # listed windows of a query that count
SALIENCY = {"Fair": 2, "Good": 3, "VeryGood": 4}  # lowest rating that makes a clip positive
Figures = dict[str, Any]


@dataclass(frozen=True)
class MomentPrediction:
    """One query's answer: `windows` float64 [W, 3] (start, end, score; best first), `saliency` float64 [C] or None."""

    query_id: int | str
    query: str
    video_id: str
    windows: np.ndarray
    saliency: np.ndarray | None

    def as_json(self) -> dict[str, Any]:
        """A line of an official submission."""
        row: dict[str, Any] = {"qid": self.query_id, "query": self.query, "vid": self.video_id}
        row["pred_relevant_windows"] = [[*map(float, window)] for window in self.windows]
        if self.saliency is not None:
            row["pred_saliency_scores"] = [float(score) for score in self.saliency]
        return row


def read_predictions(path: Path) -> list[MomentPrediction]:
    """Read a submission file.

    Windows that end where or before they start are kept: they overlap nothing, as in the official evaluation. A
    warning counts them.
    Raises InputError, with file and line, for lines that do not parse, repeated query ids, and windows or scores that
    are not finite.
    """
    predictions = []
    empty: list[str] = []  # where windows stand that overlap nothing
    seen = set()
    for number, row in enumerate(read_json_lines(path), 1):
        where = f"{path}:{number}"
        if not isinstance(row.get("qid"), (int, str)) or not isinstance(row.get("pred_relevant_windows"), list):
            raise InputError(f"{where}: needs qid and pred_relevant_windows")
        if row["qid"] in seen:
            raise InputError(f"{where}: query id {row['qid']!r} appears twice")
        seen.add(row["qid"])
        windows = read_windows(row["pred_relevant_windows"], where, columns=3)
        empty += [where] * int((windows[:, 1] <= windows[:, 0]).sum())
        saliency = None
        if "pred_saliency_scores" in row:
            saliency = _read_scores(row["pred_saliency_scores"], where)
        predictions.append(
            MomentPrediction(row["qid"], str(row.get("query", "")), str(row.get("vid", "")), windows, saliency)
        )
    if empty:
        message = "%d predicted windows end where or before they start and so overlap nothing, the first in %s"
        logging.getLogger(__name__).warning(message, len(empty), empty[0])
    return predictions


def _read_scores(value: Any, where: str) -> np.ndarray:
    try:
        scores = np.array(value, np.float64).reshape(len(value))
    except (TypeError, ValueError):
        raise InputError(f"{where}: pred_saliency_scores must be a list of numbers") from None
    if not np.isfinite(scores).all():
        raise InputError(f"{where}: a saliency score is not finite")
    return scores


def moment_metrics(predictions: Sequence[MomentPrediction], queries: Sequence[MomentQuery]) -> Figures:
    """All official figures, in percent with two decimals: `brief`, then the tables by length and by saliency.

    Raises InputError if the two do not hold the same query ids, or a query has no ground truth.
    """
    paired = _pair(predictions, queries)
    tables = {name: _moment_tables(paired, *limits) for name, limits in LENGTHS.items()}
    brief = {
        "MR-full-R1@0.5": tables["full"]["MR-R1"]["0.5"],
        "MR-full-R1@0.7": tables["full"]["MR-R1"]["0.7"],
        "MR-full-mAP": tables["full"]["MR-mAP"]["average"],
        "MR-full-mAP@0.5": tables["full"]["MR-mAP"]["0.5"],
        "MR-full-mAP@0.75": tables["full"]["MR-mAP"]["0.75"],
        "MR-long-mAP": tables["long"]["MR-mAP"]["average"],
        "MR-middle-mAP": tables["middle"]["MR-mAP"]["average"],
        "MR-short-mAP": tables["short"]["MR-mAP"]["average"],
    }
    highlights = {}
    if all(p.saliency is not None and q.ratings is not None for p, q in paired):
        highlights = {f"HL-min-{name}": table for name, table in _highlight_tables(paired).items()}
        for name, table in highlights.items():
            brief[f"{name}-mAP"], brief[f"{name}-Hit1"] = table["HL-mAP"], table["HL-Hit1"]
    return {"brief": brief, **highlights, **tables}


def _pair(
    predictions: Sequence[MomentPrediction], queries: Sequence[MomentQuery]
) -> list[tuple[MomentPrediction, MomentQuery]]:
    by_id = {query.query_id: query for query in queries}
    predicted = [prediction.query_id for prediction in predictions]
    if len(set(predicted)) != len(predicted):
        raise InputError("a query id appears twice among the predictions")
    missing, unknown = set(by_id) - set(predicted), set(predicted) - set(by_id)
    if missing or unknown:
        example = sorted(missing or unknown, key=str)[0]
        what = "queries without a prediction" if missing else "predictions for unknown queries"
        raise InputError(f"{len(missing or unknown)} {what}, for instance query id {example!r}")
    for prediction in predictions:
        truth = by_id[prediction.query_id].windows
        if truth is None or not len(truth):
            raise InputError(f"query id {prediction.query_id!r} has no relevant_windows; a test split cannot be scored")
        if not len(prediction.windows):
            raise InputError(f"query id {prediction.query_id!r}: the prediction lists no window")
    return [(prediction, by_id[prediction.query_id]) for prediction in predictions]


# --- Moment retrieval ---------------------------------------------------------------------------------------------


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Temporal intersection over union of windows [..., 2] with windows [..., 2], broadcast; 0 for empty unions."""
    common = np.minimum(first[..., 1], second[..., 1]) - np.maximum(first[..., 0], second[..., 0])
    common = np.clip(common, 0, None)
    union = (first[..., 1] - first[..., 0]) + (second[..., 1] - second[..., 0]) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def _moment_tables(paired: list[tuple[MomentPrediction, MomentQuery]], shortest: float, longest: float) -> Figures:
    """MR-mAP and MR-R1 over the ground-truth windows whose length lies in (shortest, longest] seconds."""
    kept = []
    for prediction, query in paired:
        assert query.windows is not None
        length = query.windows[:, 1] - query.windows[:, 0]
        # "full" keeps every window, also one longer than the longest video that the benchmark has.
        inside = (length > shortest) & (length <= longest) if (shortest, longest) != LENGTHS["full"] else length > 0
        if inside.any():
            kept.append((prediction.windows, query.windows[inside]))
    names = [f"{threshold:g}" for threshold in THRESHOLDS]
    if not kept:
        empty = dict.fromkeys(names, 0.0)
        return {"MR-mAP": {**empty, "average": 0.0}, "MR-R1": empty}
    precision = _average_precisions(kept)
    first = np.array([overlap(windows[0, :2], truth).max() for windows, truth in kept])
    mean_precision = dict(zip(names, map(_percent, precision.mean(0))))
    recall = {name: _percent((first >= threshold).mean()) for name, threshold in zip(names, THRESHOLDS)}
    return {"MR-mAP": {**mean_precision, "average": _percent(precision.mean(0).mean())}, "MR-R1": recall}


def _average_precisions(kept: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Average precision of every query at every threshold: float64 [Q, 10]."""
    count, most = len(kept), max(len(truth) for _, truth in kept)
    listed = np.full((count, MAX_WINDOWS, 2), np.nan)
    wanted = np.full((count, most, 2), np.nan)
    for row, (windows, truth) in enumerate(kept):
        first = windows[:MAX_WINDOWS]
        listed[row, : len(first)] = first[np.argsort(-first[:, 2], kind="stable"), :2]
        wanted[row, : len(truth)] = truth
    overlaps = np.nan_to_num(overlap(listed[:, :, None], wanted[:, None]))  # [Q, 10, G]; padding overlaps nothing
    hits = _claims(overlaps)  # [Q, 10 windows, 10 thresholds]
    valid = np.isfinite(listed[:, :, :1])
    true_positives = np.cumsum(hits, 1)
    false_positives = np.cumsum(valid & ~hits, 1)
    total = np.array([len(truth) for _, truth in kept])[:, None, None]
    precision = true_positives / np.maximum(true_positives + false_positives, 1)
    recall = true_positives / total
    # Precision made monotone from the right, then the area under its steps.
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    steps = np.diff(recall, axis=1, prepend=0)
    return (steps * precision).sum(1)


def _claims(overlaps: np.ndarray) -> np.ndarray:
    """Which listed window claims a ground-truth window, at every threshold: bool [Q, W, 10].

    Windows take turns, best score first; each claims the unclaimed window it overlaps most, if that is enough.
    """
    queries, windows, truths = overlaps.shape
    thresholds = np.array(THRESHOLDS)[None, :, None]
    free = np.ones((queries, len(THRESHOLDS), truths), bool)
    hits = np.zeros((queries, windows, len(THRESHOLDS)), bool)
    for window in range(windows):
        candidate = np.where(free & (overlaps[:, window, None] >= thresholds), overlaps[:, window, None], 0.0)
        best = candidate.argmax(2)[..., None]
        hit = np.take_along_axis(candidate, best, 2)[..., 0] > 0
        hits[:, window] = hit
        np.put_along_axis(free, best, np.take_along_axis(free, best, 2) & ~hit[..., None], 2)
    return hits


# --- Highlights ---------------------------------------------------------------------------------------------------


def _highlight_tables(paired: list[tuple[MomentPrediction, MomentQuery]]) -> dict[str, Figures]:
    counts = np.array([math.floor(query.duration / 2) for _, query in paired])
    scores = np.full((len(paired), counts.max()), -np.inf)
    ratings = np.zeros((len(paired), 3, counts.max()), np.int64)
    top = np.empty(len(paired), np.int64)
    for row, (prediction, query) in enumerate(paired):
        assert prediction.saliency is not None and query.ratings is not None and query.relevant_clips is not None
        cut = prediction.saliency[: counts[row]]
        scores[row, : counts[row]] = np.pad(cut, (0, counts[row] - len(cut)))
        ratings[row][:, query.relevant_clips] = query.ratings.T
        top[row] = prediction.saliency.argmax() if len(prediction.saliency) else counts[row]
    inside = top < counts
    tables = {}
    for name, minimum in SALIENCY.items():
        positive = ratings >= minimum
        hit = positive[np.arange(len(paired)), :, np.minimum(top, counts - 1)].any(1) & inside
        precision = _interpolated_precisions(scores, positive, counts)
        tables[name] = {"HL-mAP": _percent(precision.mean()), "HL-Hit1": _percent(hit.mean())}
    return tables


def _interpolated_precisions(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Interpolated average precision, float64 [Q, 3], of scores [Q, C] against raters [Q, 3, C].

    A point of the precision-recall curve stands at every distinct score. Its interpolated precision is the best
    at that recall or a higher one; the mean is taken over the points where recall rises.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    ordered = np.take_along_axis(scores, order, 1)
    valid = np.arange(scores.shape[1]) < counts[:, None]
    is_point = np.append(ordered[:, 1:] != ordered[:, :-1], np.ones((len(scores), 1), bool), 1) & valid
    found = np.cumsum(np.take_along_axis(positive, order[:, None], 2), 2)
    precision = np.where(is_point[:, None], found / np.arange(1, scores.shape[1] + 1), 0.0)
    interpolated = np.maximum.accumulate(precision[:, :, ::-1], 2)[:, :, ::-1]
    at_point = np.maximum.accumulate(np.where(is_point[:, None], found, 0), 2)
    rises = is_point[:, None] & (np.diff(at_point, axis=2, prepend=0) > 0)
    mean = (interpolated * rises).sum(2) / np.maximum(rises.sum(2), 1)
    positives = (positive & valid[:, None]).sum(2)
    return np.where(positives == counts[:, None], 1.0, np.where(positives == 0, 0.0, mean))


def _percent(share: float) -> float:
    return float(f"{100 * share:.2f}")
