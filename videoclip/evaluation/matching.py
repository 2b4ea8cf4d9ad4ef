"""Retrieval by matching: pairs are judged by the fusion encoder, all of them, or the best k by contrast first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from videoclip.data.questions import OpenQuestion
from videoclip.errors import InputError
from videoclip.packed import Packed
from videoclip.parts.fusion import from_even

LEFT_OUT = float("-inf")


class Matcher(Protocol):
    """What is asked of a model: so a video and a text are encoded once and not once a pair."""

    def matching_logits(self, words: Packed, clips: Packed) -> Tensor:
        """States of B texts and tokens of B videos -> logits [B, 2]."""
        ...


@torch.inference_mode()
def matching_matrix(
    model: Matcher,
    words: Packed,
    video: Tensor,
    similarity: Tensor | None = None,
    best: int | None = None,
    pairs_at_once: int = 256,
) -> np.ndarray:
    """float32 [Q, V]: how surely text q and video v belong together, the difference of the two logits.

    `words`: states of Q texts; `video`: tokens [V, 1 + K, W] of V videos. With `best` only the `best` videos of each
    text by `similarity` [Q, V] are judged; all others come after them, in the order of their similarity.
    Not the release's probability rounded to four decimals, which makes ties: the order is the same but for those.
    Raises InputError if `best` is given without `similarity`.
    """
    queries, videos = len(words), len(video)
    if best is None or best >= videos:
        chosen = torch.ones(queries, videos, dtype=torch.bool)
    elif similarity is None or similarity.shape != (queries, videos) or best < 1:
        raise InputError(f"the best {best} videos of a text need similarities [{queries}, {videos}]")
    else:
        chosen = torch.zeros(queries, videos, dtype=torch.bool)
        chosen.scatter_(1, similarity.topk(best, 1).indices.cpu(), True)
    texts, columns = chosen.nonzero(as_tuple=True)
    scores = torch.full((queries, videos), LEFT_OUT)
    for first in range(0, len(texts), pairs_at_once):
        rows, places = texts[first : first + pairs_at_once], columns[first : first + pairs_at_once]
        pairs = words.take(rows), from_even(video[places.to(video.device)])
        logits = model.matching_logits(*pairs).float().cpu()
        scores[rows, places] = logits[:, 1] - logits[:, 0]
    if similarity is not None and not bool(chosen.all()):
        lowest = scores.masked_fill(~chosen, float("inf")).amin(1, keepdim=True)
        behind = lowest - 1 - (similarity.amax(1, keepdim=True) - similarity).cpu().float()
        scores = torch.where(chosen, scores, behind)
    return scores.numpy()


def release_scores(logits: np.ndarray) -> np.ndarray:
    """The release's own score of logits [..., 2]: the probability of "matched", rounded to four decimals."""
    difference = logits[..., 1].astype(np.float64) - logits[..., 0]
    return np.round(1 / (1 + np.exp(-difference)), 4)


def ranks_of_columns(scores: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
    """int64 [Q]: place, from 1, of column `right[q]` (q itself if left out) of each row; ties count half of them."""
    right = np.arange(len(scores)) if right is None else right
    own = scores[np.arange(len(scores)), right][:, None]
    return 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) // 2


def answer_metrics(questions: Sequence[OpenQuestion], answers: Sequence[str]) -> dict[str, float]:
    """Top-1 accuracy in percent, over all questions and by their kind: exactly the same words.

    "majority" is what always giving the most frequent right answer would score.
    Raises InputError unless there is one answer for every question.
    """
    if len(questions) != len(answers) or not questions:
        raise InputError(f"{len(answers)} answers to {len(questions)} questions")
    right = np.array([question.answer == answer for question, answer in zip(questions, answers)])
    metrics = {"questions": float(len(questions)), "accuracy": round(100 * float(right.mean()), 2)}
    for kind in dict.fromkeys(sorted(question.kind for question in questions)):
        of_kind = np.array([question.kind == kind for question in questions])
        metrics[f"accuracy_{kind}"] = round(100 * float(right[of_kind].mean()), 2)
    _, counts = np.unique([question.answer for question in questions], return_counts=True)
    metrics["majority"] = round(100 * float(counts.max()) / len(questions), 2)
    return metrics
