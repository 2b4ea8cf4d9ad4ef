"""Similarity curves, one value a second, and the moments that stand out of them.

Three ways that others found good beside `localization.excess_over_threshold`: Otsu's threshold on a smoothed curve, for
several moments; the interval of the largest sum, for one; and proposals between changes of the frozen tokens.
"""

from __future__ import annotations

import numpy as np

from videoclip.retrieval.index import unit

SMOOTHING = 3.0  # seconds, the standard deviation of the Gaussian
AROUND = 4  # seconds on either side of a change that are compared


def smooth(curves: np.ndarray, deviation: float = SMOOTHING) -> np.ndarray:
    """Curves [..., T] after a Gaussian of `deviation` seconds; beyond their ends they count as mirrored."""
    reach = min(int(3 * deviation + 0.5), curves.shape[-1])
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    padded = np.pad(curves, [(0, 0)] * (curves.ndim - 1) + [(reach, reach)], mode="symmetric")
    shifted = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=-1)  # (..., T, weights)
    return shifted @ (weights / weights.sum())


def otsu_threshold(curve: np.ndarray, levels: int = 128) -> float:
    """The level that parts the values of a curve [T] into two classes whose means lie furthest apart, after Otsu.

    Between-class variance is the measure; a constant curve has its own value as threshold.
    """
    low, high = float(curve.min()), float(curve.max())
    if high <= low:
        return high
    candidates = np.linspace(low, high, levels + 1)[:-1]
    above = curve > candidates[:, None]  # (levels, T)
    count = above.sum(1)
    upper = above @ curve / np.maximum(count, 1)
    lower = (~above) @ curve / np.maximum(len(curve) - count, 1)
    variance = count * (len(curve) - count) * (upper - lower) ** 2
    best = np.flatnonzero(variance >= variance.max() * (1 - 1e-9))
    return float(candidates[best].mean())  # in the middle of a gap that has no values


def runs(inside: np.ndarray) -> np.ndarray:
    """int64 [R, 2]: [start, end) of every run of true values of a mask [T]."""
    return np.flatnonzero(np.diff(np.pad(inside.astype(np.int8), 1))).reshape(-1, 2)


def otsu_windows(curve: np.ndarray, shortest: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Runs of a curve [T], smoothed, above Otsu's threshold: windows int64 [W, 2] and what they exceed it by, [W].

    Runs of less than `shortest` seconds are left out; where nothing else is left the window is the whole video.
    """
    smoothed = smooth(curve)
    level = otsu_threshold(smoothed)
    windows = runs(smoothed > level)
    windows = windows[windows[:, 1] - windows[:, 0] >= shortest]
    if not len(windows):
        windows = np.array([[0, len(curve)]])
    return windows, np.array([(smoothed[start:end] - level).sum() for start, end in windows])


def largest_sums(curve: np.ndarray, most: int, shortest: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The interval over which a curve [T], about its mean, has the largest sum; then the next beside it, and so on.

    Returns windows int64 [W, 2], at most `most` and none overlapping, and their sums [W], largest first.
    """
    values = curve - curve.mean()
    windows: list[tuple[int, int]] = []
    sums: list[float] = []
    for _ in range(most):
        running = np.concatenate([[0.0], np.cumsum(values)])
        lowest = np.minimum.accumulate(running)
        end = int((running[1:] - lowest[:-1]).argmax()) + 1
        start = int(running[:end].argmin())
        total = running[end] - running[start]
        if windows and (total <= 0 or end - start < shortest):
            break
        windows.append((start, end))
        sums.append(float(total))
        values[start:end] = -np.abs(curve - curve.mean()).sum() - 1  # no later interval crosses this one
    return np.array(windows), np.array(sums)


def change_points(tokens: np.ndarray, around: int = AROUND) -> np.ndarray:
    """Seconds at which the frozen tokens [T, D] of a video change most, int64, with 0 and T.

    A change is a local peak, higher than the median, of the distance between the means of the seconds before and after.
    """
    x = unit(tokens.astype(np.float32) - tokens.mean(0, dtype=np.float32))
    running = np.concatenate([np.zeros((1, x.shape[1]), np.float32), np.cumsum(x, 0)])
    places = np.arange(1, len(x))
    before, after = np.maximum(places - around, 0), np.minimum(places + around, len(x))
    distance = 1 - (unit(running[places] - running[before]) * unit(running[after] - running[places])).sum(1)
    if len(distance) < 3:
        return np.array([0, len(x)])
    padded = np.pad(distance, 1, constant_values=-np.inf)
    peak = (distance >= padded[:-2]) & (distance > padded[2:]) & (distance > np.median(distance))
    return np.concatenate([[0], places[peak], [len(x)]])


def proposals(tokens: np.ndarray, shortest: int = 3, longest: int = 150) -> np.ndarray:
    """int64 [W, 2]: windows from one change of the tokens [T, D] to another; the whole video where none fits."""
    points = change_points(tokens)
    start, end = np.triu_indices(len(points), 1)
    windows = np.stack([points[start], points[end]], 1)
    length = windows[:, 1] - windows[:, 0]
    kept = windows[(length >= shortest) & (length <= longest)]
    return kept if len(kept) else np.array([[0, len(tokens)]])
