"""Models on frames at MSR-VTT, DiDeMo and MSVD: retrieval, by matching where they have it, and open questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.data.frame_shards import FrameShards
from videoclip.data.questions import OpenQuestion
from videoclip.errors import InputError
from videoclip.evaluation.matching import answer_metrics, matching_matrix, ranks_of_columns
from videoclip.evaluation.retrieval import retrieval_metrics
from videoclip.parts.fused_towers import FusedTowers
from videoclip.parts.pixels import normalised
from videoclip.recipes import from_pretrained
from videoclip.recipes.frozen_in_time import Recipe as FrozenInTime

CLIPS_AT_ONCE = 16


def load_frame_model(folder: Path) -> FusedTowers | FrozenInTime:
    """A model on frames, on the GPU if there is one. Raises InputError if the folder holds another, or none."""
    model = from_pretrained(folder)
    if not isinstance(model, FusedTowers | FrozenInTime):
        raise InputError(f"{folder}: a {model.recipe}, which reads tokens, and the shards hold frames")
    return model.to("cuda") if torch.cuda.is_available() else model


def check_size(model: FusedTowers | FrozenInTime, shards: FrameShards) -> None:
    """Raises InputError if the shards hold frames of another size than the model's."""
    size = model.vision.size
    if size != shards.size:
        raise InputError(
            f"{shards.folder}: frames of {shards.size} x {shards.size} pixels; the model reads {size} x {size}: "
            f"extract frames with --size {size}"
        )


@torch.inference_mode()
def retrieve_from_frames(
    model: FusedTowers | FrozenInTime,
    shards: FrameShards,
    clips: Sequence[AnnotatedClip],
    sampler: str = "uniform",
    best: int | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Texts to videos, every sentence a query, and what was found first for each.

    A model that matches judges every pair, or with `best` the so many videos of each text that are nearest by
    contrast; its figures by contrast are "by_contrast". "video_to_text" is only given where every clip has one
    sentence: ALPRO's own figure keeps a video's last caption and is no measure otherwise.
    Clips of videos that are not in the shards are dropped and counted. Raises InputError if none is left.
    """
    rows = {name: row for row, name in enumerate(shards.video_ids())}
    known = [clip for clip in clips if clip.video_id in rows]
    if not known:
        raise InputError(f"none of the {len(clips)} annotated clips belongs to a video in {shards.folder}")
    blocks = [known[first : first + CLIPS_AT_ONCE] for first in range(0, len(known), CLIPS_AT_ONCE)]
    sentences = [sentence for clip in known for sentence in clip.sentences]
    owners = np.repeat(np.arange(len(known)), [len(clip.sentences) for clip in known])
    ids = model.tokenizer().clip_ids(sentences, model.config.max_words)
    if isinstance(model, FusedTowers):
        video = torch.cat([model.video_tokens(read_clips(model, shards, rows, block, sampler)) for block in blocks])
        words = model.text_states(ids)
        similarity = model.projected_text(words) @ model.projected_video(video).T
    else:
        features = [model.video_features(read_clips(model, shards, rows, block, sampler)) for block in blocks]
        similarity = model.embed_text(ids) @ torch.cat(features).T
    contrast = scores = similarity.float().cpu().numpy()
    if isinstance(model, FusedTowers) and "vtm" in model.config.losses:
        scores = matching_matrix(model, words, video, similarity, best)
    ranks = ranks_of_columns(scores, owners)
    metrics: dict[str, Any] = retrieval_metrics(ranks, len(known))
    metrics |= {"clips": len(known), "dropped": len(clips) - len(known)}
    if scores is not contrast:
        metrics["by_contrast"] = retrieval_metrics(ranks_of_columns(contrast, owners), len(known))
    if len(sentences) == len(known):
        metrics["video_to_text"] = retrieval_metrics(ranks_of_columns(scores.T), len(known))
    first = [known[int(column)].video_id for column in scores.argmax(1)]
    listed = [
        {"video_id": known[owner].video_id, "sentence": sentence, "rank": float(rank), "found": found}
        for owner, sentence, rank, found in zip(owners, sentences, ranks, first)
    ]
    return metrics, listed


@torch.inference_mode()
def answer_open_questions(
    model: FusedTowers,
    shards: FrameShards,
    questions: Sequence[OpenQuestion],
    sampler: str = "uniform",
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Top-1 accuracy over all questions and by kind, and every answer given.

    Questions about videos that are not in the shards are dropped and counted. Raises InputError if none is left, or
    the model answers no questions, or its answers are not known in words.
    """
    names = model.config.answer_names
    if not model.config.answers:
        raise InputError("this model answers no questions: it has no classifier; fine-tune it with finetune questions")
    if len(names) != model.config.answers:
        raise InputError(
            f"the model chooses from {model.config.answers} answers and knows {len(names)} of them in words: "
            "give the file that numbers them"
        )
    rows = {name: row for row, name in enumerate(shards.video_ids())}
    known = [question for question in questions if question.video_id in rows]
    if not known:
        raise InputError(f"none of the {len(questions)} questions is about a video in {shards.folder}")
    given: list[str] = []
    for first in range(0, len(known), CLIPS_AT_ONCE):
        block = known[first : first + CLIPS_AT_ONCE]
        frames = read_clips(model, shards, rows, [AnnotatedClip(q.video_id, 0.0, None, ()) for q in block], sampler)
        ids = model.tokenizer().clip_ids([question.question for question in block], model.config.max_words)
        scores = model.answer_scores(frames, ids.to(frames.device, torch.int64))
        given += [names[int(number)] for number in scores.argmax(1)]
    metrics = {**answer_metrics(known, given), "dropped": float(len(questions) - len(known))}
    listed = [{"video_id": q.video_id, "question": q.question, "answer": a} for q, a in zip(known, given)]
    return metrics, listed


def read_clips(
    model: FusedTowers | FrozenInTime,
    shards: FrameShards,
    rows: Mapping[str, int],
    clips: Sequence[AnnotatedClip],
    sampler: str,
) -> Tensor:
    """Normalised frames [B, T, 3, S, S] of annotated clips, as many as the model looks at.

    A clip that begins behind the video's end shows its last frame.
    """
    frames = []
    for clip in clips:
        row = rows[clip.video_id]
        start = min(clip.start, (shards.count(row) - 1) / shards.fps(row))
        end = None if clip.end is None or clip.end <= start else clip.end
        frames.append(shards.clip(row, model.frames, sampler, start=start, end=end))
    return normalised(torch.from_numpy(np.stack(frames)).to(next(model.parameters()).device))
