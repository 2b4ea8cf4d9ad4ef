"""Models on frames at MSR-VTT, DiDeMo and MSVD: retrieval by matching, and questions with open answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.data.frame_shards import FrameShards
from videoclip.data.questions import OpenQuestion
from videoclip.errors import InputError
from videoclip.evaluation.matching import answer_metrics, matching_matrix, ranks_of_columns
from videoclip.evaluation.retrieval import retrieval_metrics
from videoclip.parts.pixels import normalised

if TYPE_CHECKING:
    from videoclip.recipes.alpro import Recipe

CLIPS_AT_ONCE = 16


@torch.inference_mode()
def retrieval_by_matching(
    model: Recipe,
    shards: FrameShards,
    clips: Sequence[AnnotatedClip],
    sampler: str = "uniform",
    best: int | None = None,
) -> dict[str, dict[str, float]]:
    """Texts to videos (`text_to_video`) and back, every sentence a query, judged by matching, and by contrast.

    `best`: judge only so many videos of each text, the nearest by contrast. The way back is only given where every
    clip has one sentence: the release's own figure keeps a video's last caption and is no measure otherwise.
    Clips of videos that are not in the shards are dropped and counted. Raises InputError if none is left.
    """
    rows = {name: row for row, name in enumerate(shards.video_ids())}
    known = [clip for clip in clips if clip.video_id in rows]
    if not known:
        raise InputError(f"none of the {len(clips)} annotated clips belongs to a video in {shards.folder}")
    video = torch.cat(
        [
            model.video_tokens(read_clips(model, shards, rows, known[first : first + CLIPS_AT_ONCE], sampler))
            for first in range(0, len(known), CLIPS_AT_ONCE)
        ]
    )
    sentences = [sentence for clip in known for sentence in clip.sentences]
    owners = np.repeat(np.arange(len(known)), [len(clip.sentences) for clip in known])
    ids = model.tokenizer().clip_ids(sentences, model.config.max_words).to(video.device, torch.int64)
    words = model.text_tokens(ids)
    similarity = model.projected_text(words) @ model.projected_video(video).T
    scores = matching_matrix(model, words, video, similarity, best)
    found = {
        "text_to_video": retrieval_metrics(ranks_of_columns(scores, owners), len(known)),
        "text_to_video_by_contrast": retrieval_metrics(ranks_of_columns(similarity.cpu().numpy(), owners), len(known)),
    }
    if len(sentences) == len(known):
        found["video_to_text"] = retrieval_metrics(ranks_of_columns(scores.T), len(known))
    found["text_to_video"]["dropped"] = len(clips) - len(known)
    return found


@torch.inference_mode()
def answer_open_questions(
    model: Recipe,
    shards: FrameShards,
    questions: Sequence[OpenQuestion],
    answers: Mapping[str, int],
    sampler: str = "uniform",
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Top-1 accuracy over all questions and by kind, and every answer given.

    `answers`: the numbers of the model's answers, as it was trained with. Questions about videos that are not in the
    shards are dropped and counted. Raises InputError if none is left, or the model has other answers.
    """
    if len(answers) != model.config.answers:
        raise InputError(f"{len(answers)} answers are given, the model chooses from {model.config.answers}")
    rows = {name: row for row, name in enumerate(shards.video_ids())}
    known = [question for question in questions if question.video_id in rows]
    if not known:
        raise InputError(f"none of the {len(questions)} questions is about a video in {shards.folder}")
    words_of = {number: answer for answer, number in answers.items()}
    given: list[str] = []
    for first in range(0, len(known), CLIPS_AT_ONCE):
        block = known[first : first + CLIPS_AT_ONCE]
        frames = read_clips(model, shards, rows, [AnnotatedClip(q.video_id, 0.0, None, ()) for q in block], sampler)
        ids = model.tokenizer().clip_ids([question.question for question in block], model.config.max_words)
        scores = model.answer_scores(frames, ids.to(frames.device, torch.int64))
        given += [words_of[int(number)] for number in scores.argmax(1)]
    metrics = {**answer_metrics(known, given), "dropped": float(len(questions) - len(known))}
    listed = [{"video_id": q.video_id, "question": q.question, "answer": a} for q, a in zip(known, given)]
    return metrics, listed


def read_clips(
    model: Recipe, shards: FrameShards, rows: Mapping[str, int], clips: Sequence[AnnotatedClip], sampler: str
) -> Tensor:
    """Normalised frames [B, T, 3, S, S] of annotated clips, as many as the model looks at."""
    count = model.shape.vision.frames
    frames = [shards.clip(rows[clip.video_id], count, sampler, start=clip.start, end=clip.end) for clip in clips]
    return normalised(torch.from_numpy(np.stack(frames)).to(model.temp.device))
