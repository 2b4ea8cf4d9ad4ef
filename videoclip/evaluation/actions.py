"""What is done when: zero-shot action segmentation (COIN) and step localisation (CrossTask), labels as queries.

Every second's output of the video transformer is compared with the embeddings of the label names.
"""

from __future__ import annotations

import numpy as np

from videoclip.data.coin import OUTSIDE
from videoclip.errors import InputError
from videoclip.evaluation.localization import LocalizationConfig, second_features
from videoclip.model import VideoCLIP

OUTSIDE_RULES = ("labels", "threshold", "never")


def label_scores(model: VideoCLIP, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float32 [T, K]: similarity of every second of tokens [T, D] with the label embeddings [K, H]."""
    return second_features(model, tokens, LocalizationConfig()) @ labels.T


def segment_actions(scores: np.ndarray, outside: float | None) -> np.ndarray:
    """int64 [T]: for every second the best label, as 1 + its column in `scores` [T, K], or OUTSIDE (0).

    A second is OUTSIDE where its best score is not above `outside`; with None, nowhere.
    """
    best = scores.argmax(1) + 1
    if outside is not None:
        best[scores.max(1) <= outside] = OUTSIDE
    return best


def outside_level(scores: np.ndarray, labels: np.ndarray, rule: str, deviations: float = 0.5) -> float | None:
    """Below which score no action is seen, for `segment_actions`.

    `labels`: the highest similarity of two different labels, as the public release has it; made for embeddings that
    are not normalised. `threshold`: this video's own mean best score plus so many standard deviations. `never`: None.
    Raises InputError if the rule is unknown.
    """
    if rule == "never":
        return None
    if rule == "threshold":
        best = scores.max(1)
        return float(best.mean() + deviations * best.std())
    if rule != "labels":
        raise InputError(f"unknown rule {rule!r} for seconds without action; choose one of {', '.join(OUTSIDE_RULES)}")
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
