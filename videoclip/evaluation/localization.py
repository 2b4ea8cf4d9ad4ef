"""Find the moments of a video that a query describes, without any training for it.

`threshold`, the default: the video transformer runs once over overlapping contexts; each second's output is compared
with the query, which gives a similarity curve; a window's score is the sum, over its seconds, of what the curve
exceeds an adaptive threshold by, 0.6 of the way from the curve's mean to its highest value. Such a sum grows with
every second that answers the query and shrinks with every one that does not, so windows find their own ends; and the
threshold is the same whether a moment fills a fifth of the video or a thousandth.

`sliding`: windows of several lengths are embedded as clips and compared with the query, the plain way. It prefers
short windows from the middle of the true ones. `benchmarks/localization.py` compares these and others.

Either way, windows that overlap a better one too much are dropped (non-maximum suppression).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from videoclip.data.qvhighlights import CLIP_SECONDS, MomentQuery
from videoclip.data.shards import Shards
from videoclip.data.templates import PLAIN
from videoclip.embedding import TwoTowers, embed_clips, embed_seconds, embed_texts
from videoclip.errors import InputError
from videoclip.evaluation.moments import MAX_WINDOWS, MomentPrediction, overlap

FIRST_LOOK = 20_000  # windows that suppression sorts before it looks at all of them


@dataclass(frozen=True)
class LocalizationConfig:
    """How moments are found. Times in seconds."""

    method: Literal["threshold", "sliding"] = "threshold"
    threshold: float = 0.6
    """How far from the mean (0) to the highest value (1) of a video's similarity curve."""
    context_stride: int = 8
    """Contexts of the model's longest clip start this far apart; a second's outputs in several are averaged."""
    shortest: int = 3
    longest: int = 150
    """Windows that are considered, for `threshold`."""
    sliding_lengths: tuple[int, ...] = (4, 6, 8, 10, 12, 16, 24)
    sliding_stride: int = 2
    suppress: float = 0.5
    """Windows that overlap a better one by more than this are dropped."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise InputError(f"the threshold must lie in [0, 1), not {self.threshold}")


def localize(
    model: TwoTowers,
    shards: Shards,
    queries: list[MomentQuery],
    config: LocalizationConfig = LocalizationConfig(),
    templates: Sequence[str] = PLAIN,
) -> tuple[list[MomentPrediction], int]:
    """Answer every query whose video is in the shards; also returns how many were not."""
    rows = shards.rows_by_id()
    known = [query for query in queries if query.video_id in rows]
    if not known:
        return [], len(queries)
    texts = embed_texts(model, [query.query for query in known], templates)
    by_video: dict[str, list[int]] = {}
    for place, query in enumerate(known):
        by_video.setdefault(query.video_id, []).append(place)
    predictions: dict[int, MomentPrediction] = {}
    few = len(by_video) < 100  # a second or two
    for video_id, places in tqdm(by_video.items(), desc="localising", unit="video", disable=few):
        answers = find_moments(model, shards.tokens(rows[video_id]), texts[places], config)
        for place, (windows, curve) in zip(places, answers):
            query = known[place]
            saliency = _mean_of_clips(curve, int(query.duration // CLIP_SECONDS))
            predictions[place] = MomentPrediction(query.query_id, query.query, video_id, windows, saliency)
    return [predictions[place] for place in range(len(known))], len(queries) - len(known)


def find_moments(
    model: TwoTowers, tokens: np.ndarray, texts: np.ndarray, config: LocalizationConfig = LocalizationConfig()
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Moments of one video, tokens [T, D], for each of several queries, embeddings float32 [Q, H].

    Returns for each query windows float64 [W, 3] (start, end, score; at most ten, best first) and its similarity
    curve float32 [T], one value a second.
    """
    curves = texts @ embed_seconds(model, tokens, config.context_stride).T
    if config.method == "sliding":
        windows = sliding_windows(len(tokens), config)
        scores = texts @ embed_clips(model, tokens, windows).T
    else:
        windows = candidate_windows(len(tokens), config)
        scores = excess_over_threshold(curves, windows, config.threshold)
    answers = []
    for curve, score in zip(curves, scores):
        kept = suppress_overlaps(windows, score, config.suppress)
        answers.append((np.column_stack([windows[kept], score[kept]]).astype(np.float64), curve))
    return answers


def excess_over_threshold(curves: np.ndarray, windows: np.ndarray, threshold: float) -> np.ndarray:
    """Sum over each window [W, 2] of what curves [Q, T] exceed their own threshold by: [Q, W].

    It lies the share `threshold` of the way from a curve's mean to its highest value.
    """
    mean = curves.mean(1, keepdims=True)
    level = mean + threshold * (curves.max(1, keepdims=True) - mean)
    return window_sums(curves - level, windows)


def window_sums(curves: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Sum of each curve [Q, T] over each window [W, 2]: float64 [Q, W]."""
    running = np.zeros((curves.shape[0], curves.shape[1] + 1))
    np.cumsum(curves, 1, np.float64, out=running[:, 1:])
    return running[:, windows[:, 1]] - running[:, windows[:, 0]]


def candidate_windows(seconds: int, config: LocalizationConfig) -> np.ndarray:
    """int64 [W, 2]: every start; every length up to 30 seconds and lengths 5% apart above, so that hours stay cheap."""
    longest = min(config.longest, seconds)
    lengths = list(range(min(config.shortest, longest), min(30, longest) + 1))
    while lengths[-1] < longest:
        lengths.append(min(int(lengths[-1] * 1.05) + 1, longest))
    return _all_starts(seconds, lengths, 1)


def sliding_windows(seconds: int, config: LocalizationConfig) -> np.ndarray:
    """int64 [W, 2]: windows of the configured lengths and stride inside [0, seconds); a short video is one window."""
    lengths = [length for length in config.sliding_lengths if length < seconds]
    return _all_starts(seconds, lengths or [seconds], config.sliding_stride)


def _all_starts(seconds: int, lengths: list[int], stride: int) -> np.ndarray:
    starts = [np.arange(0, seconds - length + 1, stride) for length in lengths]
    return np.concatenate([np.stack([s, s + length], 1) for s, length in zip(starts, lengths)])


def suppress_overlaps(windows: np.ndarray, scores: np.ndarray, most: float, keep: int = MAX_WINDOWS) -> np.ndarray:
    """Rows of the best windows [W, 2], best first, at most `keep`; none overlaps a better one by more than `most`."""
    if len(scores) > FIRST_LOOK:  # hours of video: ten windows are nearly always among the best few thousand
        best_ones = np.sort(np.argpartition(-scores, FIRST_LOOK)[:FIRST_LOOK])
        found = best_ones[suppress_overlaps(windows[best_ones], scores[best_ones], most, keep)]
        if len(found) == keep:
            return found
    remaining = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(remaining) and len(kept) < keep:
        best, remaining = remaining[0], remaining[1:]
        kept.append(int(best))
        remaining = remaining[overlap(windows[remaining].astype(np.float64), windows[best].astype(np.float64)) <= most]
    return np.array(kept)


def _mean_of_clips(curve: np.ndarray, clips: int) -> np.ndarray:
    """Average a per-second curve over clips of two seconds; clips behind the video's end get its lowest value."""
    padded = np.full(clips * CLIP_SECONDS, curve.min(), np.float64)
    count = min(len(curve), len(padded))
    padded[:count] = curve[:count]
    return padded.reshape(clips, CLIP_SECONDS).mean(1)
