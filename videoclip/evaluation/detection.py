"""Mean average precision of windows with a class: temporal action localisation, by THUMOS' and ActivityNet's rules.

The two differ. ActivityNet: detections take turns, best first; each claims the free window it overlaps most, if that is
at least the threshold; precision is made monotone and the area under it summed. THUMOS14: every true window takes the
free detection that overlaps it most, if by more than the threshold; detections that touch an `Ambiguous` window are no
errors; precision is the mean over eleven recalls. Open-set papers often measure THUMOS14 by ActivityNet's rule: say
which one a figure is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from videoclip.errors import InputError
from videoclip.evaluation.moments import overlap
from videoclip.files import read_json

Rule = Literal["thumos", "activitynet"]
THRESHOLDS: dict[Rule, tuple[float, ...]] = {
    "thumos": (0.3, 0.4, 0.5, 0.6, 0.7),
    "activitynet": tuple(round(0.5 + 0.05 * i, 2) for i in range(10)),
}
AMBIGUOUS = "Ambiguous"  # THUMOS' class of windows that annotators could not decide on


@dataclass(frozen=True)
class LabelledWindow:
    """[start, end) seconds of a video with the name of a class; `score` of a detection, 1 of a true window."""

    video_id: str
    start: float
    end: float
    label: str
    score: float = 1.0


def detection_metrics(
    detections: Sequence[LabelledWindow],
    truth: Sequence[LabelledWindow],
    rule: Rule,
    thresholds: Sequence[float] | None = None,
) -> dict[str, float]:
    """mAP in percent at each threshold of overlap, `mAP@0.5` and so on, and their mean, `mAP`.

    The mean is over the classes that truly happen; detections of other classes, and of videos without annotation,
    count as errors of their class only. Raises InputError if nothing truly happens.
    """
    thresholds = THRESHOLDS[rule] if thresholds is None else tuple(thresholds)
    labels = sorted({window.label for window in truth} - {AMBIGUOUS})
    if not labels:
        raise InputError("there are no true windows to detect")
    ambiguous = [window for window in truth if window.label == AMBIGUOUS]
    precision = np.array(
        [
            _average_precisions(
                [window for window in detections if window.label == label],
                [window for window in truth if window.label == label],
                ambiguous,
                rule,
                thresholds,
            )
            for label in labels
        ]
    )  # (classes, thresholds)
    figures = {f"mAP@{threshold:g}": _percent(value) for threshold, value in zip(thresholds, precision.mean(0))}
    return {**figures, "mAP": _percent(precision.mean())}


def _average_precisions(
    detections: list[LabelledWindow],
    truth: list[LabelledWindow],
    ambiguous: list[LabelledWindow],
    rule: Rule,
    thresholds: Sequence[float],
) -> np.ndarray:
    """Average precision of one class at every threshold, float64."""
    order = np.argsort([-window.score for window in detections], kind="stable")
    ranked = [detections[place] for place in order]
    of_video: dict[str, list[int]] = {}
    for place, window in enumerate(ranked):
        of_video.setdefault(window.video_id, []).append(place)
    true_windows, unclear = _by_video(truth), _by_video(ambiguous)
    result = np.zeros(len(thresholds))
    for number, threshold in enumerate(thresholds):
        hit, ignored = np.zeros(len(ranked), bool), np.zeros(len(ranked), bool)
        for video_id, places in of_video.items():
            windows = _times([ranked[place] for place in places])
            overlaps = _overlaps(windows, true_windows.get(video_id))
            claim = _claimed_by_truth if rule == "thumos" else _claimed_in_turn
            hit[places] = claim(overlaps, threshold)
            if rule == "thumos" and video_id in unclear:
                ignored[places] = (_overlaps(windows, unclear[video_id]) > 0).any(1) & ~hit[places]
        counted = hit[~ignored]
        score = _eleven_points if rule == "thumos" else _area
        result[number] = score(counted, len(truth))
    return result


def _claimed_in_turn(overlaps: np.ndarray, threshold: float) -> np.ndarray:
    """ActivityNet: which detections [W], best first, claim a free true window of overlaps [W, G]."""
    free, hit = np.ones(overlaps.shape[1], bool), np.zeros(len(overlaps), bool)
    for place, row in enumerate(overlaps):
        candidates = np.where(free & (row >= threshold), row, -1.0)
        if len(candidates) and candidates.max() >= 0:
            free[candidates.argmax()] = False
            hit[place] = True
    return hit


def _claimed_by_truth(overlaps: np.ndarray, threshold: float) -> np.ndarray:
    """THUMOS: every true window in the file's order takes the free detection that overlaps it most."""
    hit = np.zeros(len(overlaps), bool)
    for column in overlaps.T:
        candidates = np.where(hit, -1.0, column)
        best = candidates.argmax()
        if candidates[best] > threshold:
            hit[best] = True
    return hit


def _area(hit: np.ndarray, positives: int) -> float:
    """Area under precision made monotone from the right."""
    found = np.cumsum(hit)
    precision = found / np.arange(1, len(hit) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((precision * np.diff(found / positives, prepend=0)).sum())


def _eleven_points(hit: np.ndarray, positives: int) -> float:
    """Mean over recalls 0, 0.1, …, 1 of the best precision at that recall or a higher one; 0 without any hit."""
    if not hit.any():
        return 0.0
    found = np.cumsum(hit)
    recall, precision = found / positives, found / np.arange(1, len(hit) + 1)
    # Tenths as the recalls of ten, twenty, … windows round, so that 3 of 10 reach 0.3.
    points = [precision[recall >= point / 10 - 1e-12] for point in range(11)]
    return float(np.mean([values.max() if len(values) else 0.0 for values in points]))


def _by_video(windows: Sequence[LabelledWindow]) -> dict[str, np.ndarray]:
    grouped: dict[str, list[LabelledWindow]] = {}
    for window in windows:
        grouped.setdefault(window.video_id, []).append(window)
    return {video_id: _times(those) for video_id, those in grouped.items()}


def _times(windows: Sequence[LabelledWindow]) -> np.ndarray:
    return np.array([(window.start, window.end) for window in windows], np.float64).reshape(-1, 2)


def _overlaps(windows: np.ndarray, others: np.ndarray | None) -> np.ndarray:
    """Intersection over union, float64 [W, G]; windows without length overlap nothing."""
    if others is None:
        return np.zeros((len(windows), 0))
    return np.nan_to_num(overlap(windows[:, None], others[None]))


def _percent(share: float) -> float:
    return round(100 * float(share), 2)


# --- Files --------------------------------------------------------------------------------------------------------


def read_true_windows(path: Path, subset: str = "validation") -> list[LabelledWindow]:
    """ActivityNet's annotation json, which is also the usual form of THUMOS14's:
    `{"database": {video: {"subset": …, "annotations": [{"segment": [start, end], "label": …}, …]}}}`.

    Raises InputError, with the video, for another form, or if the subset is empty.
    """
    database = _database(path, "database")
    windows = []
    for video_id, video in database.items():
        if not isinstance(video, Mapping):
            raise InputError(f"{path}: video {video_id!r}: expected an object")
        if str(video.get("subset", "")).lower() == subset.lower():
            windows += [_window(path, video_id, row, 1.0) for row in video.get("annotations", [])]
    if not windows:
        raise InputError(f"{path}: holds no annotated video of the subset {subset!r}")
    return windows


def read_proposals(path: Path) -> dict[str, np.ndarray]:
    """Class-agnostic proposals of a detector: `{"results": {video: [{"segment": [start, end], "score": …}, …]}}`.

    Returns float64 [P, 3] (start, end, score) of every video, best first.
    Raises InputError, with the video, for another form.
    """
    proposals = {}
    for video_id, rows in _database(path, "results").items():
        if not isinstance(rows, list):
            raise InputError(f"{path}: video {video_id!r}: expected a list of proposals")
        windows = [_window(path, video_id, row, None) for row in rows]
        found = np.array([(w.start, w.end, w.score) for w in windows], np.float64).reshape(-1, 3)
        proposals[video_id] = found[np.argsort(-found[:, 2], kind="stable")]
    return proposals


def _database(path: Path, key: str) -> Mapping[str, Any]:
    values = read_json(path)
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, dict):
        raise InputError(f'{path}: expected {{"{key}": {{video: …}}}}')
    return found


def _window(path: Path, video_id: str, row: Any, score: float | None) -> LabelledWindow:
    try:
        start, end = (float(value) for value in row["segment"])
        value = float(row["score"]) if score is None else score
        label = str(row.get("label", "")) if score is None else str(row["label"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(
            f"{path}: video {video_id!r}: {row!r} has no segment [start, end] with what belongs to it"
        ) from None
    if not np.isfinite([start, end, value]).all():
        raise InputError(f"{path}: video {video_id!r}: {row!r} holds a value that is not finite")
    return LabelledWindow(video_id, start, end, label, value)
