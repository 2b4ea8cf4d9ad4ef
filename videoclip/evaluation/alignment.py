"""Which second does a sentence belong to, and can it be seen at all? HTM-Align's two figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from videoclip.data.htm_align import AlignedVideo
from videoclip.data.shards import Shards
from videoclip.data.templates import PLAIN
from videoclip.embedding import TwoTowers, embed_texts
from videoclip.errors import InputError
from videoclip.evaluation.inputs import known_videos
from videoclip.evaluation.sentences import NEAR, Reading, sentence_curves


def align_videos(
    model: TwoTowers,
    shards: Shards,
    videos: Sequence[AlignedVideo],
    templates: Sequence[str] = PLAIN,
    near: float | None = NEAR,
    by: Reading = "towers",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Place every sentence at the second of its video that it is nearest to; metrics, and the places.

    `recall`: percent of the alignable sentences whose second lies in [floor(start), ceil(end)] of their true times.
    `AUC`: how well the similarity of that second tells alignable sentences from others, in percent. Seconds further
    than `near` from where a sentence is expected (`expected_times`) are not looked at; None looks at all. `by`: what
    compares them, towers or also the joint encoder of the recipe `alignment`.
    Raises InputError if no annotated video is in the shards, or none of their sentences can be aligned.
    """
    known, dropped = known_videos(videos, shards)
    hits, chance, score, alignable, rows = [], [], [], [], []
    for video, row in tqdm(known, desc="aligning", unit="video", disable=len(known) < 20):
        texts = embed_texts(model, video.text, templates)
        curves = sentence_curves(model, shards.tokens(row), texts, expected_times(video), near, by=by)  # (S, T)
        place = curves.argmax(1)
        inside = (np.floor(video.start) <= place) & (place <= np.ceil(video.end))
        looked_at = np.isfinite(curves)
        every = np.arange(curves.shape[1])
        right = (np.floor(video.start)[:, None] <= every) & (every <= np.ceil(video.end)[:, None])
        hits.append(inside[video.alignable])
        chance.append(((right & looked_at).sum(1) / looked_at.sum(1))[video.alignable])
        score.append(curves.max(1))
        alignable.append(video.alignable)
        rows.append({"video_id": video.video_id, "seconds": place.tolist(), "similarity": curves.max(1).tolist()})
    if not np.concatenate(alignable).any():
        raise InputError("none of the sentences of these videos can be aligned")
    metrics = {
        "videos": len(known),
        "sentences": sum(map(len, alignable)),
        "recall": round(100 * float(np.concatenate(hits).mean()), 2),
        "chance_recall": round(100 * float(np.concatenate(chance).mean()), 2),
        "AUC": round(100 * area_under_curve(np.concatenate(score), np.concatenate(alignable)), 2),
        "dropped": dropped,
    }
    return metrics, rows


def expected_times(video: AlignedVideo) -> np.ndarray:
    """Where each sentence is said, as far as that may be known: float64 [S], seconds.

    The times of alignable sentences are the answer and are not looked at; those of the others, which are spoken in
    between, are interpolated. Where no other is left, sentences are spread evenly up to the last end.
    """
    places = np.arange(len(video.text))
    others = ~video.alignable
    middle = (video.start + video.end) / 2
    if not others.any():
        return (places + 0.5) / len(places) * float(video.end.max())
    return np.interp(places, places[others], np.maximum.accumulate(middle[others]))


def area_under_curve(score: np.ndarray, positive: np.ndarray) -> float:
    """Share of pairs of a positive [N] and another whose positive has the higher score; ties count half.

    1 if there is nothing to tell apart.
    """
    above, below = score[positive], np.sort(score[~positive])
    if not len(above) or not len(below):
        return 1.0
    lower, at_most = np.searchsorted(below, above, "left"), np.searchsorted(below, above, "right")
    return float((lower + at_most).mean() / (2 * len(below)))
