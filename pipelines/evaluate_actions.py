"""Zero-shot evaluation with labels as queries: COIN, CrossTask, and MSR-VTT's multiple-choice questions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.evaluate import ZeroShotConfig, load_model_and_shards, write_results
from pipelines.figures import Figures
from videoclip.errors import InputError
from videoclip.evaluation.prompts import embed_texts


@dataclass(frozen=True)
class COINConfig(ZeroShotConfig):
    """Action segmentation on COIN: which label does each second have? Frame accuracy beside the best single label."""

    annotations: Path
    """COIN.json."""
    output: Path = Path("runs/evaluation/coin/metrics.json")
    subset: str = "testing"
    outside: str = "auto"
    """Where no action is seen: labels (the public release's rule, for embeddings that are not normalised), threshold
    (of each video's scores), or never; auto is the one of the first two that suits the model."""


@dataclass(frozen=True)
class CrossTaskConfig(ZeroShotConfig):
    """Localisation of a task's steps on CrossTask: recall beside steps that are spread evenly over the video."""

    annotations: Path
    """The folder crosstask_release, with tasks_primary.txt and annotations/."""
    output: Path = Path("runs/evaluation/crosstask/metrics.json")
    videos: Path | None = None
    """Only the videos that this csv (task,video_id,url) lists, for instance videos_val.csv; by default all."""


@dataclass(frozen=True)
class QuestionConfig(ZeroShotConfig):
    """MSR-VTT's multiple-choice questions: which of five sentences describes the video? Accuracy beside chance."""

    annotations: Path
    """The tab-separated file with vid_key, a1 ... a5 and answer."""
    output: Path = Path("runs/evaluation/msrvtt-qa/metrics.json")


def evaluate_coin(config: COINConfig) -> Figures:
    """Run COIN; returns the metrics that it writes.

    Raises InputError if files do not fit each other or no annotated video is in the shards.
    """
    from tqdm import tqdm

    from videoclip.data.coin import read_coin
    from videoclip.evaluation.actions import frame_accuracy, label_scores, outside_level, segment_actions

    videos, names = read_coin(config.annotations, config.subset)
    model, shards = load_model_and_shards(config.model, config.shards)
    labels = embed_texts(model, list(names.values()), config.templates)
    suits = "threshold" if model.config.normalize else "labels"
    rule = suits if config.outside == "auto" else config.outside
    # Column 0 of the answer is "outside"; the others are the labels' own numbers.
    numbers = np.array([0, *names])
    rows, true, predicted = [], [], []
    known, dropped = _known(videos, shards, config.shards)
    for video, row in tqdm(known, desc="segmenting", unit="video"):
        scores = label_scores(model, shards.tokens(row), labels)
        best = segment_actions(scores, outside_level(scores, labels, rule))
        predicted.append(numbers[best])
        true.append(video.per_second(len(scores)))
        rows.append({"video_id": video.video_id, "labels": predicted[-1].tolist()})
    accuracy = frame_accuracy(predicted, true)
    most_frequent = Counter(np.concatenate(true).tolist()).most_common(1)[0][0]
    single = frame_accuracy([np.full(len(labels_of), most_frequent) for labels_of in true], true)
    metrics = {
        "videos": len(known),
        "labels": len(names),
        "outside": rule,
        "frame_accuracy": round(accuracy, 2),
        "baseline_one_label": round(single, 2),
        "dropped": dropped,
    }
    return write_results(config.output, metrics, rows)


def evaluate_crosstask(config: CrossTaskConfig) -> Figures:
    """Run CrossTask; returns the metrics that it writes.

    Raises InputError if files do not fit each other or no annotated video is in the shards.
    """
    from tqdm import tqdm

    from videoclip.data.crosstask import read_crosstask
    from videoclip.evaluation.actions import label_scores, log_softmax, place_steps, step_recall

    tasks, videos = read_crosstask(config.annotations, config.videos)
    model, shards = load_model_and_shards(config.model, config.shards)
    labels = {task: embed_texts(model, steps, config.templates) for task, steps in tasks.items()}
    temperature = model.temperature.item()
    hits, blind_hits, totals = Counter[str](), Counter[str](), Counter[str]()
    rows = []
    known, dropped = _known(videos, shards, config.shards)
    for video, row in tqdm(known, desc="placing steps", unit="video"):
        tokens, steps = shards.tokens(row), labels[video.task]
        if len(tokens) < len(steps):
            dropped += 1
            continue
        places = place_steps(log_softmax(label_scores(model, tokens, steps) / temperature))
        evenly = ((np.arange(len(steps)) + 0.5) * len(tokens) / len(steps)).astype(np.int64)
        happens = video.assignment(len(tokens), len(steps))
        totals[video.task] += int(happens.any(0).sum())
        hits[video.task] += int(happens[places, np.arange(len(steps))].sum())
        blind_hits[video.task] += int(happens[evenly, np.arange(len(steps))].sum())
        rows.append({"task": video.task, "video_id": video.video_id, "seconds": places.tolist()})
    if not any(totals.values()):
        raise InputError(f"{config.annotations}: none of its steps happens in a video of {config.shards}")
    recall, of_tasks = step_recall(hits, totals)
    metrics = {
        "videos": len(rows),
        "recall": round(recall, 2),
        "baseline_evenly_spread": round(step_recall(blind_hits, totals)[0], 2),
        "tasks": {task: round(value, 2) for task, value in of_tasks.items()},
        "dropped": dropped,
    }
    return write_results(config.output, metrics, rows)


def evaluate_questions(config: QuestionConfig) -> Figures:
    """Answer MSR-VTT's questions; returns the metrics that it writes.

    Raises InputError if files do not fit each other or no video is in the shards.
    """
    from videoclip.data.msrvtt import CHOICES, read_questions
    from videoclip.evaluation.localization import embed_windows
    from videoclip.evaluation.retrieval import windows_of_lengths

    questions = read_questions(config.annotations)
    model, shards = load_model_and_shards(config.model, config.shards)
    known, dropped = _known(questions, shards, config.shards)
    tokens = [shards.tokens(row)[: model.config.max_seconds] for _, row in known]
    windows = windows_of_lengths(np.array([len(of_video) for of_video in tokens]))
    videos = embed_windows(model, np.concatenate(tokens), windows)
    sentences = [choice for question, _ in known for choice in question.choices]
    texts = embed_texts(model, sentences, config.templates).reshape(len(known), len(CHOICES), -1)
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
    return write_results(config.output, metrics, rows)


def _known(items: list[Any], shards: Any, where: Path) -> tuple[list[tuple[Any, int]], int]:
    """Those items whose video is in the shards, with its row; and how many are not.

    Raises InputError if none is.
    """
    rows = shards.rows_by_id()
    known = [(item, rows[item.video_id]) for item in items if item.video_id in rows]
    if not known:
        raise InputError(f"{where}: holds none of the {len(items)} annotated videos")
    return known, len(items) - len(known)
