"""What is done when: zero-shot action segmentation (COIN) and step localisation (CrossTask), labels as queries.

Every second's output of the video transformer is compared with the embeddings of the label names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from tqdm import tqdm

from videoclip.data.coin import OUTSIDE, ActionSegments
from videoclip.data.crosstask import TaskVideo
from videoclip.data.shards import Shards
from videoclip.data.templates import PLAIN
from videoclip.embedding import TwoTowers, embed_seconds, embed_texts
from videoclip.errors import InputError
from videoclip.evaluation.inputs import known_videos

OutsideRule = Literal["labels", "threshold", "never"]


def label_scores(model: TwoTowers, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float32 [T, K]: similarity of every second of tokens [T, D] with the label embeddings [K, H]."""
    return embed_seconds(model, tokens) @ labels.T


def segment_actions(scores: np.ndarray, outside: float | None) -> np.ndarray:
    """int64 [T]: for every second the best label, as 1 + its column in `scores` [T, K], or OUTSIDE (0).

    A second is OUTSIDE where its best score is not above `outside`; with None, nowhere.
    """
    best = scores.argmax(1) + 1
    if outside is not None:
        best[scores.max(1) <= outside] = OUTSIDE
    return best


def outside_level(scores: np.ndarray, labels: np.ndarray, rule: OutsideRule, deviations: float = 0.5) -> float | None:
    """Below which score no action is seen, for `segment_actions`.

    `labels`: the highest similarity of two different labels, as the public release has it; made for embeddings that
    are not normalised. `threshold`: this video's own mean best score plus so many standard deviations. `never`: None.
    """
    if rule == "never":
        return None
    if rule == "threshold":
        best = scores.max(1)
        return float(best.mean() + deviations * best.std())
    if rule != "labels":
        raise InputError(
            f"unknown rule {rule!r} for seconds without action; choose one of {', '.join(get_args(OutsideRule))}"
        )
    similarity = labels @ labels.T
    np.fill_diagonal(similarity, -np.inf)
    return float(similarity.max()) if len(labels) > 1 else None


def frame_accuracy(predicted: list[np.ndarray], true: list[np.ndarray]) -> float:
    """Percentage of all seconds, of all videos together, whose label is right; outside counts like a label."""
    return 100 * float((np.concatenate(predicted) == np.concatenate(true)).mean())


def place_steps(scores: np.ndarray) -> np.ndarray:
    """int64 [K]: one second for every step, in the given order, with the largest sum of `scores` [T, K].

    CrossTask's dynamic programme (Zhukov et al., 2019): each step happens in exactly one second, later steps later.
    Raises InputError if there are fewer seconds than steps.
    """
    seconds, steps = scores.shape
    if seconds < steps:
        raise InputError(f"{steps} steps cannot happen one after the other in {seconds} seconds")
    best = np.full((steps, seconds), -np.inf)
    came_from = np.zeros((steps, seconds), np.int64)
    best[0] = scores[:, 0]
    for step in range(1, steps):
        reached = np.maximum.accumulate(best[step - 1])
        is_new = best[step - 1] >= reached
        place = np.maximum.accumulate(np.where(is_new, np.arange(seconds), 0))
        best[step, 1:] = scores[1:, step] + reached[:-1]
        came_from[step, 1:] = place[:-1]
    places = [int(best[-1].argmax())]
    for step in range(steps - 1, 0, -1):
        places.append(int(came_from[step, places[-1]]))
    return np.array(places[::-1], np.int64)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Logarithm of every row's softmax: how likely each step is, were one of them to happen in that second."""
    shifted = scores - scores.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def step_recall(hits: dict[str, int], totals: dict[str, int]) -> tuple[float, dict[str, float]]:
    """CrossTask's recall in percent, mean over tasks and of each task: steps placed inside one of their segments.

    `totals` counts the steps that happen in a task's videos; tasks whose videos show none are left out.
    """
    recalls = {task: 100 * hits[task] / total for task, total in totals.items() if total}
    return float(np.mean(list(recalls.values()))), recalls


def segment_videos(
    model: TwoTowers,
    shards: Shards,
    videos: Sequence[ActionSegments],
    names: Mapping[int, str],
    templates: Sequence[str] = PLAIN,
    rule: OutsideRule | Literal["auto"] = "auto",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """COIN: label every second of the annotated videos; metrics, and the labels of each video.

    `names`: number of a label -> its name. `rule` as in `outside_level`; auto is the one that suits the model.
    Raises InputError if no annotated video is in the shards.
    """
    labels = embed_texts(model, list(names.values()), templates)  # (K, H)
    if rule == "auto":
        rule = "threshold" if model.config.normalize else "labels"
    numbers = np.array([OUTSIDE, *names])  # of the columns of `segment_actions`
    rows, true, predicted = [], [], []
    known, dropped = known_videos(videos, shards)
    for video, row in tqdm(known, desc="segmenting", unit="video"):
        scores = label_scores(model, shards.tokens(row), labels)
        predicted.append(numbers[segment_actions(scores, outside_level(scores, labels, rule))])
        true.append(video.per_second(len(scores)))
        rows.append({"video_id": video.video_id, "labels": predicted[-1].tolist()})
    most_frequent = Counter(np.concatenate(true).tolist()).most_common(1)[0][0]
    single = frame_accuracy([np.full(len(of_video), most_frequent) for of_video in true], true)
    metrics = {
        "videos": len(known),
        "labels": len(names),
        "outside": rule,
        "frame_accuracy": round(frame_accuracy(predicted, true), 2),
        "baseline_one_label": round(single, 2),
        "dropped": dropped,
    }
    return metrics, rows


def place_steps_of_videos(
    model: TwoTowers,
    shards: Shards,
    tasks: Mapping[str, Sequence[str]],
    videos: Sequence[TaskVideo],
    templates: Sequence[str] = PLAIN,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """CrossTask: one second for each step of a video's task; metrics, and the seconds of each video.

    `tasks`: task -> its steps. Raises InputError if no annotated step happens in a video of the shards.
    """
    labels = {task: embed_texts(model, steps, templates) for task, steps in tasks.items()}  # (K, H) each
    temperature = model.temperature.item()
    hits, blind_hits, totals = Counter[str](), Counter[str](), Counter[str]()
    rows = []
    known, dropped = known_videos(videos, shards)
    for video, row in tqdm(known, desc="placing steps", unit="video"):
        tokens, steps = shards.tokens(row), labels[video.task]
        if len(tokens) < len(steps):
            dropped += 1
            continue
        places = place_steps(log_softmax(label_scores(model, tokens, steps) / temperature))
        evenly = ((np.arange(len(steps)) + 0.5) * len(tokens) / len(steps)).astype(np.int64)
        happens = video.assignment(len(tokens), len(steps))  # bool (T, K)
        totals[video.task] += int(happens.any(0).sum())
        hits[video.task] += int(happens[places, np.arange(len(steps))].sum())
        blind_hits[video.task] += int(happens[evenly, np.arange(len(steps))].sum())
        rows.append({"task": video.task, "video_id": video.video_id, "seconds": places.tolist()})
    if not any(totals.values()):
        raise InputError(f"{shards.folder}: none of the annotated steps happens in a video here")
    recall, of_tasks = step_recall(hits, totals)
    metrics = {
        "videos": len(rows),
        "recall": round(recall, 2),
        "baseline_evenly_spread": round(step_recall(blind_hits, totals)[0], 2),
        "tasks": {task: round(value, 2) for task, value in of_tasks.items()},
        "dropped": dropped,
    }
    return metrics, rows
