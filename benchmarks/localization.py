"""Ways to find moments without training for it, side by side, and the time that a two-hour video takes.

Needs one or more finished demos (`make demo`, or `videoclip demo --seed N --output DIR`). The first line, sliding
windows with suppression, is what the others are measured against; `threshold` is what the library does by default.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from videoclip.data.qvhighlights import MomentQuery, read_qvhighlights
from videoclip.data.shards import Shards
from videoclip.embedding import embed_clips, embed_seconds
from videoclip.evaluation.absence import Presence, absence_metrics, ask
from videoclip.evaluation.curves import largest_sums, otsu_windows, proposals, runs, smooth
from videoclip.evaluation.inputs import load_model_and_shards
from videoclip.evaluation.localization import (
    LocalizationConfig,
    candidate_windows,
    excess_over_threshold,
    find_moments,
    sliding_windows,
    suppress_overlaps,
    window_sums,
)
from videoclip.evaluation.moments import MAX_WINDOWS, MomentPrediction, moment_metrics, overlap
from videoclip.model import VideoCLIP
from videoclip.retrieval.index import unit

FIGURES = ("MR-full-R1@0.5", "MR-full-R1@0.7", "MR-full-mAP")
CONFIG = LocalizationConfig()
Answers = list[np.ndarray]  # of each query: windows float [W, 3], start, end and score, best first
Method = Callable[[VideoCLIP, np.ndarray, np.ndarray], Answers]


def library(config: LocalizationConfig) -> Method:
    """What `find_moments` does."""
    return lambda model, tokens, texts: [windows for windows, _ in find_moments(model, tokens, texts, config)]


def sliding_with_soft_suppression(model: VideoCLIP, tokens: np.ndarray, texts: np.ndarray) -> Answers:
    """Sliding windows whose scores fade with their overlap with better ones, instead of being dropped."""
    windows = sliding_windows(len(tokens), CONFIG)
    scores = texts @ embed_clips(model, tokens, windows).T
    answers = []
    for score in scores - scores.min():
        score, kept = score.copy(), []
        for _ in range(min(MAX_WINDOWS, len(windows))):
            best = int(score.argmax())
            kept.append([*windows[best], score[best]])
            score *= np.exp(-(overlap(windows.astype(float), windows[best].astype(float)) ** 2) / 0.5)
            score[best] = -np.inf
        answers.append(np.array(kept))
    return answers


def sliding_minus_context(model: VideoCLIP, tokens: np.ndarray, texts: np.ndarray) -> Answers:
    """Sliding windows from whose embeddings the video's mean embedding is taken off."""
    windows = sliding_windows(len(tokens), CONFIG)
    features = embed_clips(model, tokens, windows)
    return best_of(windows, texts @ unit(features - features.mean(0)).T)


def inside_minus_outside(model: VideoCLIP, tokens: np.ndarray, texts: np.ndarray) -> Answers:
    """Mean similarity of a window's seconds, less that of as many seconds around it."""
    windows = candidate_windows(len(tokens), CONFIG)
    curves = texts @ embed_seconds(model, tokens).T
    length = windows[:, 1] - windows[:, 0]
    wide = np.stack([windows[:, 0] - (length + 1) // 2, windows[:, 1] + (length + 1) // 2], 1).clip(0, len(tokens))
    inside = window_sums(curves, windows)
    around = window_sums(curves, wide) - inside
    return best_of(windows, inside / length - around / np.maximum(wide[:, 1] - wide[:, 0] - length, 1))


def watershed(model: VideoCLIP, tokens: np.ndarray, texts: np.ndarray) -> Answers:
    """Runs of seconds above a falling water level, scored by their mean height above the video's mean."""
    curves = texts @ embed_seconds(model, tokens).T
    answers = []
    for curve in curves:
        windows = {
            (int(start), int(end))
            for level in np.quantile(curve, np.linspace(0.5, 0.95, 10))
            for start, end in runs(curve >= level)
            if end - start >= CONFIG.shortest
        } or {(0, len(tokens))}
        of_query = np.array(sorted(windows))
        heights = np.array([curve[start:end].mean() for start, end in of_query]) - curve.mean()
        answers += best_of(of_query, heights[None])
    return answers


def threshold_on_clips(model: VideoCLIP, tokens: np.ndarray, texts: np.ndarray) -> Answers:
    """The default's windows, on a curve of whole-clip embeddings (eight seconds around each) instead of seconds'."""
    starts = np.clip(np.arange(len(tokens)) - 4, 0, max(0, len(tokens) - 8))
    around = np.stack([starts, np.minimum(starts + 8, len(tokens))], 1)
    curves = texts @ embed_clips(model, tokens, around).T
    windows = candidate_windows(len(tokens), CONFIG)
    return best_of(windows, excess_over_threshold(curves, windows, CONFIG.threshold))


def otsu(model: VideoCLIP, tokens: np.ndarray, texts: np.ndarray) -> Answers:
    """Runs of the smoothed curve above Otsu's threshold, by what they exceed it by."""
    return [best_of(w, score[None])[0] for w, score in (otsu_windows(curve) for curve in _curves(model, tokens, texts))]


def largest_sum(model: VideoCLIP, tokens: np.ndarray, texts: np.ndarray) -> Answers:
    """The interval of the largest sum of the curve about its mean, then the next ones beside it."""
    found = (largest_sums(curve, MAX_WINDOWS) for curve in _curves(model, tokens, texts))
    return [np.column_stack([windows, sums]).astype(np.float64) for windows, sums in found]


def between_changes(threshold: float) -> Method:
    """Windows between changes of the frozen tokens, scored as the default scores its own."""

    def method(model: VideoCLIP, tokens: np.ndarray, texts: np.ndarray) -> Answers:
        windows = proposals(tokens, CONFIG.shortest, CONFIG.longest)
        return best_of(windows, excess_over_threshold(_curves(model, tokens, texts), windows, threshold))

    return method


def smoothed_threshold(deviation: float, threshold: float) -> Method:
    """The default's windows, on a smoothed curve."""

    def method(model: VideoCLIP, tokens: np.ndarray, texts: np.ndarray) -> Answers:
        windows = candidate_windows(len(tokens), CONFIG)
        return best_of(
            windows, excess_over_threshold(smooth(_curves(model, tokens, texts), deviation), windows, threshold)
        )

    return method


def _curves(model: VideoCLIP, tokens: np.ndarray, texts: np.ndarray) -> np.ndarray:
    return texts @ embed_seconds(model, tokens).T


def threshold_by_deviation(deviations: float) -> Method:
    """The default's windows, above a threshold of so many standard deviations over the curve's mean."""

    def method(model: VideoCLIP, tokens: np.ndarray, texts: np.ndarray) -> Answers:
        curves = texts @ embed_seconds(model, tokens).T
        windows = candidate_windows(len(tokens), CONFIG)
        above = curves - curves.mean(1, keepdims=True) - deviations * curves.std(1, keepdims=True)
        return best_of(windows, window_sums(above, windows))

    return method


def best_of(windows: np.ndarray, scores: np.ndarray) -> Answers:
    """The windows [W, 2] that are left of each row of scores [Q, W] after suppression."""
    answers = []
    for score in scores:
        kept = suppress_overlaps(windows, score, CONFIG.suppress)
        answers.append(np.column_stack([windows[kept], score[kept]]).astype(np.float64))
    return answers


METHODS: dict[str, Method] = {
    "sliding windows": library(LocalizationConfig("sliding")),
    "sliding, soft suppression": sliding_with_soft_suppression,
    "sliding, less the video's mean": sliding_minus_context,
    "inside less outside": inside_minus_outside,
    "watershed": watershed,
    "threshold on clips": threshold_on_clips,
    "Otsu's threshold after 3 s": otsu,
    "largest sum about the mean": largest_sum,
    "between changes of tokens, 0.6": between_changes(0.6),
    "between changes of tokens, 0.3": between_changes(0.3),
    "threshold on a curve after 1 s, 0.6": smoothed_threshold(1.0, 0.6),
    "threshold, the mean": library(LocalizationConfig(threshold=0.0)),
    "threshold, mean + deviation / 2": threshold_by_deviation(0.5),
    "threshold, mean + deviation": threshold_by_deviation(1.0),
    "threshold, 0.4 of the way to the peak": library(LocalizationConfig(threshold=0.4)),
    "threshold, 0.6 of the way (default)": library(CONFIG),
    "threshold, 0.8 of the way": library(LocalizationConfig(threshold=0.8)),
}


def evaluate(method: Method, model: VideoCLIP, shards: Shards, queries: list[MomentQuery]) -> dict[str, float]:
    """Official figures of one method."""
    rows = shards.rows_by_id()
    predictions = []
    for video_id in dict.fromkeys(query.video_id for query in queries):
        of_video = [query for query in queries if query.video_id == video_id]
        texts = model.encode_text([query.query for query in of_video]).numpy()
        answers = method(model, shards.tokens(rows[video_id]), texts)
        for query, windows in zip(of_video, answers):
            predictions.append(MomentPrediction(query.query_id, query.query, video_id, windows, None))
    return moment_metrics(predictions, queries)["brief"]


def compare(demo: Path) -> None:
    """A table for one demo: figures, and R1@0.5 and mAP in units of the sliding window's."""
    model, shards = load_model_and_shards(demo / "model", demo / "tokens" / "test")
    queries = read_qvhighlights(demo / "corpus" / "qvhighlights_val.jsonl")
    print(f"{demo}: {len(queries)} queries\n| method | {' | '.join(FIGURES)} | R1@0.5 ratio | mAP ratio |")
    print("|---|" + "---|" * (len(FIGURES) + 2))
    first: dict[str, float] = {}
    for name, method in METHODS.items():
        figures = evaluate(method, model, shards, queries)
        first = first or figures
        ratios = [figures[figure] / first[figure] for figure in ("MR-full-R1@0.5", "MR-full-mAP")]
        cells = [f"{figures[figure]:.1f}" for figure in FIGURES] + [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def tell_absent(demo: Path) -> None:
    """Precision and recall of "not in this video" for held-out queries, each asked of its video and of another one.

    Calibrated on training videos and their queries. The other video has no query of the same words.
    """
    model, shards = load_model_and_shards(demo / "model", demo / "tokens" / "test")
    known = read_qvhighlights(demo / "corpus" / "qvhighlights_train.jsonl")
    presence = Presence.fit(*ask(model, Shards(demo / "tokens" / "train"), known))
    held_out = ask(model, shards, read_qvhighlights(demo / "corpus" / "qvhighlights_val.jsonl"))
    present, absent = (presence.probability(values) for values in held_out)
    for threshold in (0.5, 0.25, 0.1):
        print(f"not in this video, below {threshold:g}: {absence_metrics(present, absent, threshold)}")


def time_two_hours(demo: Path) -> None:
    """Seconds for 100 queries over two hours of tokens."""
    model, shards = load_model_and_shards(demo / "model", demo / "tokens" / "test")
    queries = read_qvhighlights(demo / "corpus" / "qvhighlights_val.jsonl")
    tokens = np.concatenate([shards.tokens(row) for row in range(len(shards))])
    tokens = np.tile(tokens, (2 * 3600 // len(tokens) + 1, 1))[: 2 * 3600]
    texts = model.encode_text([query.query for query in queries[:100]]).numpy()
    start = time.perf_counter()
    find_moments(model, tokens, texts)
    print(f"two hours of tokens, {len(texts)} queries: {time.perf_counter() - start:.2f} s")


def main() -> None:
    """Print a table for every demo, and the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, nargs="+", default=[Path("runs/demo")])
    demos = parser.parse_args().demo
    missing = [demo for demo in demos if not (demo / "model").exists()]
    if missing:
        print(f"{missing[0]}: no finished demo here; run `make demo` first. Skipped.")
        sys.exit(0)
    for demo in demos:
        compare(demo)
        tell_absent(demo)
    time_two_hours(demos[0])


if __name__ == "__main__":
    main()
