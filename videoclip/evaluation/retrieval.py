"""Text-to-video and video-to-text retrieval: which place among all does the right one take?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.data.shards import Shards
from videoclip.data.templates import PLAIN
from videoclip.embedding import TwoTowers, embed_clips, embed_texts
from videoclip.errors import InputError
from videoclip.evaluation.reranking import judge_of, rerank, reranked_ranks
from videoclip.packed import Packed

BLOCK = 1024  # rows scored at once: against a gallery of 50,000 that is 200 MB, not 10 GB


def ranks_of_positives(queries: np.ndarray, gallery: np.ndarray, positives: np.ndarray | None = None) -> np.ndarray:
    """float64 [Q]: place, from 1, of row `positives[q]` of `gallery` [N, H] for each row of `queries` [Q, H].

    By inner product; `positives` int64 [Q] is the row's own number if left out. Rows with equal scores share the mean
    of their places, which may be x.5: a model that maps everything to one point does no better than chance.
    The full Q x N matrix is never held.
    Raises InputError if the shapes do not fit or values are not finite.
    """
    positives = _check(queries, gallery, positives)
    ranks = np.empty(len(queries), np.float64)
    rounding = _rounding(queries, gallery)
    for first in range(0, len(queries), BLOCK):
        scores = queries[first : first + BLOCK] @ gallery.T  # [block, N]
        own = scores[np.arange(len(scores)), positives[first : first + BLOCK]][:, None]
        within = rounding[first : first + BLOCK, None]
        better = (scores > own + within).sum(1)
        equal = (scores >= own - within).sum(1) - better  # the own row among them
        ranks[first : first + BLOCK] = better + (equal + 1) / 2
    return ranks


def ranks_of_best_query(queries: np.ndarray, gallery: np.ndarray, positives: np.ndarray | None = None) -> np.ndarray:
    """The other direction, float64 [N]: place, among all queries, of the best of those that belong to a gallery row.

    Arguments as for `ranks_of_positives`; every row of the gallery needs a query. Where queries of other rows score the
    same as the best own ones, the place is the mean over all orders that these could come in.
    """
    positives = _check(queries, gallery, positives)
    order = np.argsort(positives, kind="stable")
    queries, owners = queries[order], positives[order]
    bounds = np.searchsorted(owners, np.arange(len(gallery) + 1))
    if (np.diff(bounds) == 0).any():
        raise InputError(f"clip {int(np.flatnonzero(np.diff(bounds) == 0)[0])} of the gallery has no query")
    ranks = np.empty(len(gallery), np.float64)
    rounding = _rounding(gallery, queries)
    for first in range(0, len(gallery), BLOCK):
        scores = gallery[first : first + BLOCK] @ queries.T  # [block, Q]
        for row, values in enumerate(scores, first):
            own = values[bounds[row] : bounds[row + 1]]
            best, within = own.max(), rounding[row]
            better = int((values > best + within).sum())
            own_equal = int((own >= best - within).sum())
            others = int((values >= best - within).sum()) - better - own_equal
            # The first of m own among t others stands, on average, behind t / (m + 1) of them.
            ranks[row] = better + 1 + others / (own_equal + 1)
    return ranks


def _rounding(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float [rows, ]: by how much inner products with `others` may differ for no other reason than their rounding.

    Matrix products add in an order that depends on the place in the matrix, so that equal vectors do not give equal
    scores to the last bit.
    """
    precision = np.finfo(np.result_type(rows, others, np.float32)).eps
    longest = np.linalg.norm(others, axis=1).max()
    return 4 * precision * longest * np.linalg.norm(rows, axis=1)


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


@dataclass(frozen=True)
class Retrieved:
    """Ranks of every text among clips float64 [Q], of every clip among texts float64 [C], and what was found.

    `found`: for each text the rows of the first clips, best first; `size`: the clips of its gallery, int64 [Q];
    `clip_size`: of every clip's own gallery, int64 [C].
    """

    ranks: np.ndarray
    clip_ranks: np.ndarray
    found: list[np.ndarray]
    size: np.ndarray
    clip_size: np.ndarray


def retrieve(
    texts: np.ndarray, videos: np.ndarray, positives: np.ndarray, galleries: Sequence[str] | None = None, count: int = 3
) -> Retrieved:
    """Rank texts [Q, H] and clips [C, H] for each other; text q belongs to clip `positives[q]`.

    `galleries` names the gallery of each clip, for instance its topic: only clips and texts of the same one meet.
    Without it all do. Raises InputError as `ranks_of_positives`.
    """
    names = np.zeros(len(videos), np.int64) if galleries is None else np.unique(list(galleries), return_inverse=True)[1]
    ranks, clip_ranks = np.empty(len(texts)), np.empty(len(videos))
    found: list[np.ndarray] = [np.zeros(0, np.int64)] * len(texts)
    sizes = np.bincount(names)[names]
    place = np.empty(len(videos), np.int64)  # of a clip in its gallery
    for name in np.unique(names):
        clips, asked = np.flatnonzero(names == name), np.flatnonzero(names[positives] == name)
        place[clips] = np.arange(len(clips))
        own = place[positives[asked]]
        ranks[asked] = ranks_of_positives(texts[asked], videos[clips], own)
        clip_ranks[clips] = ranks_of_best_query(texts[asked], videos[clips], own)
        for query, best in zip(asked.tolist(), best_matches(texts[asked], videos[clips], count)):
            found[query] = clips[best]
    return Retrieved(ranks, clip_ranks, found, sizes[positives], sizes)


def retrieval_metrics(ranks: np.ndarray, gallery: int | np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10 in percent, median and mean rank, and what R@1 a random order would give.

    `ranks` count from 1 and may be x.5 where scores are equal: within the first k is a rank of at most k.
    `gallery` is the number of clips, one for all or int64 [Q]. It is also the chance of video to text: a clip has Q / N
    of Q queries.
    """
    metrics: dict[str, float] = {"queries": len(ranks)}
    for k in (1, 5, 10):
        metrics[f"R@{k}"] = round(100 * float((ranks <= k).mean()), 2)
    metrics["MedR"] = float(np.median(ranks))
    metrics["MeanR"] = round(float(ranks.mean()), 2)
    metrics["chance_R@1"] = round(100 * float(np.mean(1 / np.asarray(gallery))), 2)
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
        piece = clip.seconds(of_video)[:max_seconds]
        if len(piece):
            kept.append(clip if clip.end is not None else replace(clip, end=float(len(of_video))))
            tokens.append(piece)
    if not kept:
        raise InputError(f"none of the {len(clips)} annotated clips belongs to a video in {shards.folder}")
    lengths = np.array([len(piece) for piece in tokens], np.int64)
    return ClipTokens(np.concatenate(tokens), lengths, kept, len(clips) - len(kept))


def retrieve_clips(
    model: TwoTowers,
    shards: Shards,
    annotated: list[AnnotatedClip],
    templates: Sequence[str] = PLAIN,
    topics: Mapping[str, str] | None = None,
    best: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Embed clips and sentences and rank each for the other: metrics, and what was found for every sentence.

    With `topics`, video id -> topic, texts and clips of one topic are ranked among themselves. With `best`, a model
    that matches puts the `best` clips of every text in order by matching; the metrics before that are "by_contrast",
    and "video_to_text" stays by contrast.
    Raises InputError if no annotated clip is in the shards, a video has no topic, or the model cannot match.
    """
    judge = judge_of(model) if best else None
    gathered = gather_clips(shards, annotated, model.config.max_seconds)
    clips = gathered.clips
    galleries = None if topics is None else _galleries(clips, topics)
    videos = embed_clips(model, gathered.tokens, windows_of_lengths(gathered.lengths))  # (C, H)
    positives = np.repeat(np.arange(len(clips)), [len(clip.sentences) for clip in clips])
    sentences = [sentence for clip in clips for sentence in clip.sentences]
    result = retrieve(embed_texts(model, sentences, templates), videos, positives, galleries, best or 3)
    ranks, found = result.ranks, result.found
    if judge is not None:
        tokens = Packed(torch.from_numpy(gathered.tokens), torch.from_numpy(gathered.lengths))
        found, scores = rerank(judge, sentences, tokens, found, model.config.max_words, templates)
        ranks = reranked_ranks(ranks, found, scores, positives)
    metrics = {
        **retrieval_metrics(ranks, result.size),
        "clips": len(clips),
        "dropped": gathered.dropped,
        "video_to_text": retrieval_metrics(result.clip_ranks, result.clip_size),
    }
    if galleries is not None:
        metrics["galleries"] = len(set(galleries))
    if best:
        metrics |= {"reranked": best, "by_contrast": retrieval_metrics(result.ranks, result.size)}
    rows = [
        {**_as_row(clips[own], sentence), "rank": float(rank), "found": [_as_row(clips[i]) for i in rows[:3]]}
        for own, sentence, rank, rows in zip(positives, sentences, ranks, found)
    ]
    return metrics, rows


def _galleries(clips: list[AnnotatedClip], topics: Mapping[str, str]) -> list[str]:
    """The topic of every clip's video; one without is refused, for the others' ranks would be of other galleries."""
    missing = sorted({clip.video_id for clip in clips} - topics.keys())
    if missing:
        raise InputError(
            f"there is no topic for {len(missing)} of the evaluated videos, for instance {missing[0]!r}; add them"
        )
    return [topics[clip.video_id] for clip in clips]


def _as_row(clip: AnnotatedClip, sentence: str | None = None) -> dict[str, Any]:
    said = clip.sentences[0] if sentence is None else sentence
    return {"video_id": clip.video_id, "start": clip.start, "end": clip.end, "sentence": said}
