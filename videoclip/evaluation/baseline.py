"""The best answer that never looks at the query: what every score has to be compared with."""

from __future__ import annotations

import numpy as np

from videoclip.data.qvhighlights import CLIP_SECONDS, MomentQuery
from videoclip.errors import InputError
from videoclip.evaluation.moments import MAX_WINDOWS, THRESHOLDS, MomentPrediction, overlap

GRID = 24  # candidate windows start and end at multiples of 1/24 of the video


def query_blind_predictions(train: list[MomentQuery], queries: list[MomentQuery]) -> list[MomentPrediction]:
    """Give every query the same windows, as shares of its video's length: those that do best on training queries.

    The first window is the one that answers most training queries at IoU 0.5; each further one adds most to what
    the listed ones reach, averaged over the official thresholds. Saliency is the mean training rating by place.
    Raises InputError if no training query has windows.
    """
    known = [(query, query.windows) for query in train if query.windows is not None and len(query.windows)]
    if not known:
        raise InputError("the query-blind baseline needs training queries with windows")
    candidates = np.array([[a, b] for a in range(GRID) for b in range(a + 1, GRID + 1)]) / GRID
    best = np.stack(
        [overlap(candidates[:, None], windows[None] / query.duration).max(1) for query, windows in known]
    )  # [queries, candidates]
    # Among windows that answer equally many queries, the one that overlaps them most.
    chosen = [int(((best >= 0.5).mean(0) + 1e-3 * best.mean(0)).argmax())]
    reached = best[:, chosen[0]]
    while len(chosen) < MAX_WINDOWS:
        together = np.maximum(best, reached[:, None])
        value = np.mean([(together >= threshold).mean(0) for threshold in THRESHOLDS], 0)
        chosen.append(int(value.argmax()))
        reached = together[:, chosen[-1]]
    shares = candidates[chosen]
    saliency = _mean_rating_by_place(train)
    predictions = []
    for query in queries:
        scores = 1 - np.arange(len(shares)) / len(shares)
        windows = np.column_stack([shares * query.duration, scores])
        clips = int(query.duration // CLIP_SECONDS)
        places = np.minimum((np.arange(clips) + 0.5) / max(clips, 1) * GRID, GRID - 1).astype(int)
        predictions.append(MomentPrediction(query.query_id, query.query, query.video_id, windows, saliency[places]))
    return predictions


def _mean_rating_by_place(queries: list[MomentQuery]) -> np.ndarray:
    """float64 [GRID]: mean rating of training clips at each 1/24 of their video, unrated clips counting zero."""
    total, count = np.zeros(GRID), np.zeros(GRID)
    for query in queries:
        clips = int(query.duration // CLIP_SECONDS)
        rating = np.zeros(clips)
        if query.ratings is not None and query.relevant_clips is not None:
            rating[query.relevant_clips] = query.ratings.mean(1)
        places = np.minimum((np.arange(clips) + 0.5) / max(clips, 1) * GRID, GRID - 1).astype(int)
        np.add.at(total, places, rating)
        np.add.at(count, places, 1)
    return total / np.maximum(count, 1)
