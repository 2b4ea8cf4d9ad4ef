"""MSR-VTT's multiple-choice questions: which of five sentences describes the video?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from videoclip.data.msrvtt import CHOICES, Question
from videoclip.data.shards import Shards
from videoclip.data.templates import PLAIN
from videoclip.embedding import TwoTowers, embed_clips, embed_texts
from videoclip.evaluation.inputs import known_videos
from videoclip.evaluation.retrieval import windows_of_lengths


def answer_questions(
    model: TwoTowers, shards: Shards, questions: Sequence[Question], templates: Sequence[str] = PLAIN
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Choose the nearest sentence for each question's video; metrics beside chance, and the answers.

    Raises InputError if no video is in the shards.
    """
    known, dropped = known_videos(questions, shards)
    tokens = [shards.tokens(row)[: model.config.max_seconds] for _, row in known]
    windows = windows_of_lengths(np.array([len(of_video) for of_video in tokens]))
    videos = embed_clips(model, np.concatenate(tokens), windows)  # (V, H)
    sentences = [choice for question, _ in known for choice in question.choices]
    texts = embed_texts(model, sentences, templates).reshape(len(known), len(CHOICES), -1)
    answers = np.einsum("vh,vch->vc", videos, texts).argmax(1)
    right = np.array([question.answer for question, _ in known])
    rows = [
        {"video_id": question.video_id, "answer": int(answer), "right": question.answer}
        for (question, _), answer in zip(known, answers)
    ]
    metrics = {
        "questions": len(known),
        "accuracy": round(100 * float((answers == right).mean()), 2),
        "chance": round(100 / len(CHOICES), 2),
        "dropped": dropped,
    }
    return metrics, rows
