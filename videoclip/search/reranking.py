"""Answers of an archive in the order of matching: a model that judges pairs reads the query with every moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from videoclip.data.shards import Shards, check_encoder
from videoclip.embedding import TwoTowers
from videoclip.errors import InputError
from videoclip.evaluation.reranking import judge_of, matching_scores
from videoclip.packed import Packed
from videoclip.search.answers import Answer


def rerank_answers(model: TwoTowers, query: str, answers: Sequence[Answer], folder: Path) -> list[Answer]:
    """The same answers, best first by matching; each then also says its place there, in the channel "matching".

    `folder`: shards with the tokens of the answers' videos; an archive keeps vectors alone. Of a moment that is
    longer than the model's longest clip, the beginning is judged. `score` stays the cosine.
    Raises InputError if the model does not match, or the shards lack a video or are of another encoder.
    """
    judge = judge_of(model)
    shards = Shards(folder)
    if model.config.video_encoder:
        check_encoder(shards.manifest, model.config.video_encoder, "the encoder the model was trained on", folder)
    if not answers:
        return []
    rows = shards.rows_by_id()
    moments = []
    for answer in answers:
        row = rows.get(answer.video_id)
        tokens = None if row is None else shards.tokens(row)
        if tokens is None or len(tokens) <= int(answer.start):
            raise InputError(f"{folder}: has no tokens of {answer.video_id!r}; give the shards that the index is of")
        end = min(math.ceil(answer.end), int(answer.start) + model.config.max_seconds)
        moments.append(torch.from_numpy(np.array(tokens[int(answer.start) : max(end, int(answer.start) + 1)])))
    numbers = np.arange(len(moments))
    scores = matching_scores(judge, [query], Packed.of(moments), 0 * numbers, numbers, model.config.max_words)
    order = np.argsort(-scores, kind="stable").tolist()
    return [
        replace(answers[number], channels={**answers[number].channels, "matching": place})
        for place, number in enumerate(order, 1)
    ]
