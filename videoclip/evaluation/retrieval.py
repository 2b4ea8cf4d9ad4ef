"""Text-to-video retrieval: which place among all clips does the right one take?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from videoclip.data.shards import Shards
from videoclip.data.youcook2 import AnnotatedClip
from videoclip.errors import InputError

BLOCK = 1024  # queries scored at once: a 50,000-clip gallery then needs 200 MB, not 10 GB


def ranks_of_positives(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """int64 [N]: place, from 1, of row n of `gallery` for row n of `queries`, both float [N, H], by inner product.

    The place is the number of strictly better rows plus one. The full N x N matrix is never held.
    Raises InputError if the two differ in shape or hold values that are not finite.
    """
    if queries.shape != gallery.shape or queries.ndim != 2 or not len(queries):
        raise InputError(f"queries {queries.shape} and gallery {gallery.shape} must be the same [clips, width]")
    if not (np.isfinite(queries).all() and np.isfinite(gallery).all()):
        raise InputError("embeddings hold values that are not finite")
    ranks = np.empty(len(queries), np.int64)
    for first in range(0, len(queries), BLOCK):
        scores = queries[first : first + BLOCK] @ gallery.T
        rows = np.arange(len(scores))
        ranks[first : first + BLOCK] = (scores > scores[rows, first + rows][:, None]).sum(1) + 1
    return ranks


def best_matches(queries: np.ndarray, gallery: np.ndarray, count: int) -> np.ndarray:
    """int64 [Q, count]: rows of `gallery` with the highest inner products, best first."""
    count = min(count, len(gallery))
    found = np.empty((len(queries), count), np.int64)
    for first in range(0, len(queries), BLOCK):
        scores = queries[first : first + BLOCK] @ gallery.T
        top = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable")
        found[first : first + BLOCK] = np.take_along_axis(top, order, 1)
    return found


def retrieval_metrics(ranks: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10 in percent, median and mean rank, and what R@1 a random order would give."""
    metrics: dict[str, float] = {"queries": len(ranks)}
    for k in (1, 5, 10):
        metrics[f"R@{k}"] = round(100 * float((ranks <= k).mean()), 2)
    metrics["MedR"] = float(np.median(ranks))
    metrics["MeanR"] = round(float(ranks.mean()), 2)
    metrics["chance_R@1"] = round(100 / len(ranks), 2)
    return metrics


@dataclass(frozen=True)
class ClipTokens:
    """Clips that can be evaluated: their tokens, concatenated [N, D] with lengths [C], and their annotations."""

    tokens: np.ndarray
    lengths: np.ndarray
    clips: list[AnnotatedClip]
    dropped: int


def gather_clips(shards: Shards, clips: list[AnnotatedClip], max_seconds: int) -> ClipTokens:
    """Cut each annotated clip's tokens, `tokens[start:end]`, at most `max_seconds` of them, out of its video.

    Clips of videos that are not in the shards, or that start behind their end, are dropped and counted.
    Raises InputError if none is left.
    """
    rows = {video_id: row for row, video_id in enumerate(shards.video_ids())}
    kept, tokens = [], []
    for clip in clips:
        row = rows.get(clip.video_id)
        if row is None:
            continue
        start = int(clip.start)
        piece = shards.tokens(row)[start : max(start + 1, int(clip.end))][:max_seconds]
        if len(piece):
            kept.append(clip)
            tokens.append(piece)
    if not kept:
        raise InputError(f"none of the {len(clips)} annotated clips belongs to a video in {shards.folder}")
    lengths = np.array([len(piece) for piece in tokens], np.int64)
    return ClipTokens(np.concatenate(tokens), lengths, kept, len(clips) - len(kept))
