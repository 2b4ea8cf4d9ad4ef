"""Text-to-video and video-to-text retrieval: which place among all does the right one take?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.data.shards import Shards
from videoclip.data.templates import PLAIN
from videoclip.embedding import TwoTowers, embed_clips, embed_texts
from videoclip.errors import InputError

BLOCK = 1024  # rows scored at once: against a gallery of 50,000 that is 200 MB, not 10 GB


def ranks_of_positives(queries: np.ndarray, gallery: np.ndarray, positives: np.ndarray | None = None) -> np.ndarray:
    """int64 [Q]: place, from 1, of row `positives[q]` of `gallery` [N, H] for each row of `queries` [Q, H].

    By inner product; `positives` int64 [Q] is the row's own number if left out. The place is the number of strictly
    better rows plus one. The full Q x N matrix is never held.
    Raises InputError if the shapes do not fit or values are not finite.
    """
    positives = _check(queries, gallery, positives)
    ranks = np.empty(len(queries), np.int64)
    for first in range(0, len(queries), BLOCK):
        scores = queries[first : first + BLOCK] @ gallery.T
        own = scores[np.arange(len(scores)), positives[first : first + BLOCK]]
        ranks[first : first + BLOCK] = (scores > own[:, None]).sum(1) + 1
    return ranks


def ranks_of_best_query(queries: np.ndarray, gallery: np.ndarray, positives: np.ndarray | None = None) -> np.ndarray:
    """The other direction, int64 [N]: place, among all queries, of the best of those that belong to a gallery row.

    Arguments as for `ranks_of_positives`; every row of the gallery needs a query.
    """
    positives = _check(queries, gallery, positives)
    order = np.argsort(positives, kind="stable")
    queries, owners = queries[order], positives[order]
    bounds = np.searchsorted(owners, np.arange(len(gallery) + 1))
    if (np.diff(bounds) == 0).any():
        raise InputError(f"clip {int(np.flatnonzero(np.diff(bounds) == 0)[0])} of the gallery has no query")
    ranks = np.empty(len(gallery), np.int64)
    for first in range(0, len(gallery), BLOCK):
        scores = gallery[first : first + BLOCK] @ queries.T
        for row, values in enumerate(scores, first):
            best = values[bounds[row] : bounds[row + 1]].max()
            ranks[row] = (values > best).sum() + 1
    return ranks


def _check(queries: np.ndarray, gallery: np.ndarray, positives: np.ndarray | None) -> np.ndarray:
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1] or not len(queries):
        raise InputError(f"queries {queries.shape} and gallery {gallery.shape} must be [rows, width] of one width")
    positives = np.arange(len(queries)) if positives is None else positives
    if len(positives) != len(queries) or positives.min() < 0 or positives.max() >= len(gallery):
        raise InputError(f"every one of {len(queries)} queries needs a row of the gallery of {len(gallery)}")
    if not (np.isfinite(queries).all() and np.isfinite(gallery).all()):
        raise InputError("embeddings hold values that are not finite")
    return positives


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


def retrieval_metrics(ranks: np.ndarray, gallery: int) -> dict[str, float]:
    """R@1, R@5, R@10 in percent, median and mean rank, and what R@1 a random order would give.

    `gallery` is the number of clips, which is also the chance of video to text: a clip has Q / N of Q queries.
    """
    metrics: dict[str, float] = {"queries": len(ranks)}
    for k in (1, 5, 10):
        metrics[f"R@{k}"] = round(100 * float((ranks <= k).mean()), 2)
    metrics["MedR"] = float(np.median(ranks))
    metrics["MeanR"] = round(float(ranks.mean()), 2)
    metrics["chance_R@1"] = round(100 / gallery, 2)
    return metrics


@dataclass(frozen=True)
class ClipTokens:
    """Clips that can be evaluated: their tokens, concatenated [N, D] with lengths [C], and their annotations."""

    tokens: np.ndarray
    lengths: np.ndarray
    clips: list[AnnotatedClip]
    dropped: int


def windows_of_lengths(lengths: np.ndarray) -> np.ndarray:
    """int64 [C, 2]: where each of the clips begins and ends that follow one another with these lengths."""
    ends = np.cumsum(lengths)
    return np.stack([ends - lengths, ends], 1)


def gather_clips(shards: Shards, clips: list[AnnotatedClip], max_seconds: int) -> ClipTokens:
    """Cut each annotated clip's tokens, `tokens[start:end]`, at most `max_seconds` of them, out of its video.

    Clips of videos that are not in the shards, or that start behind their end, are dropped and counted.
    Raises InputError if none is left.
    """
    rows = shards.rows_by_id()
    kept, tokens = [], []
    for clip in clips:
        row = rows.get(clip.video_id)
        if row is None:
            continue
        of_video = shards.tokens(row)
        start, end = int(clip.start), len(of_video) if clip.end is None else int(clip.end)
        piece = of_video[start : max(start + 1, end)][:max_seconds]
        if len(piece):
            kept.append(clip if clip.end is not None else replace(clip, end=float(end)))
            tokens.append(piece)
    if not kept:
        raise InputError(f"none of the {len(clips)} annotated clips belongs to a video in {shards.folder}")
    lengths = np.array([len(piece) for piece in tokens], np.int64)
    return ClipTokens(np.concatenate(tokens), lengths, kept, len(clips) - len(kept))


def retrieve(
    model: TwoTowers, shards: Shards, annotated: list[AnnotatedClip], templates: Sequence[str] = PLAIN
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Embed clips and sentences and rank each for the other: metrics, and what was found for every sentence.

    Raises InputError if no annotated clip is in the shards.
    """
    gathered = gather_clips(shards, annotated, model.config.max_seconds)
    clips = gathered.clips
    videos = embed_clips(model, gathered.tokens, windows_of_lengths(gathered.lengths))  # (C, H)
    positives = np.repeat(np.arange(len(clips)), [len(clip.sentences) for clip in clips])
    sentences = [sentence for clip in clips for sentence in clip.sentences]
    texts = embed_texts(model, sentences, templates)  # (Q, H)
    ranks = ranks_of_positives(texts, videos, positives)
    metrics = {
        **retrieval_metrics(ranks, len(clips)),
        "clips": len(clips),
        "dropped": gathered.dropped,
        "video_to_text": retrieval_metrics(ranks_of_best_query(texts, videos, positives), len(clips)),
    }
    rows = [
        {**_as_row(clips[own], sentence), "rank": int(rank), "found": [_as_row(clips[i]) for i in best]}
        for own, sentence, rank, best in zip(positives, sentences, ranks, best_matches(texts, videos, 3))
    ]
    return metrics, rows


def _as_row(clip: AnnotatedClip, sentence: str | None = None) -> dict[str, Any]:
    said = clip.sentences[0] if sentence is None else sentence
    return {"video_id": clip.video_id, "start": clip.start, "end": clip.end, "sentence": said}
