"""Which action is it, and when? Models of the recipe prompting on lists of named videos and on annotated windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from pipelines.evaluate import write_results
from pipelines.figures import Figures
from videoclip.data.action_clips import (
    ListedVideo,
    check_listed,
    read_class_names,
    read_split,
    read_spoken_names,
)
from videoclip.data.shards import Shards
from videoclip.errors import InputError
from videoclip.evaluation.detection import (
    AMBIGUOUS,
    LabelledWindow,
    Rule,
    detection_metrics,
    read_proposals,
    read_true_windows,
)
from videoclip.evaluation.inputs import load_model_and_shards
from videoclip.evaluation.recognition import (
    ListedClips,
    RecognitionConfig,
    class_probabilities,
    label_proposals,
    listed_clips,
    propose,
    recognition_metrics,
)
from videoclip.packed import Packed
from videoclip.recipes.prompting import Recipe


@dataclass(frozen=True)
class ActionsConfig:
    """Recognition: which of the named classes does each listed video show? Top-1 and top-5 beside chance."""

    model: Path
    """Folder of a model of the recipe prompting, trained here or converted from the Efficient-Prompt release."""
    shards: Path
    """Folder of shards with the videos' frames, a row a frame; `convert features` makes them of .npy arrays."""
    classes: Path
    """All classes, one name a line (HMDB51_action.list)."""
    annotations: Path
    """Videos and their classes: class/video or class/video.avi a line (test_split01.txt)."""
    names: Path | None = None
    """What each class is called in a text (HMDB51_clsname.json); without it its own name, _ read as a blank."""
    passes: int = 5
    """Random samples of every video, as the release validates; 0: one, evenly spaced."""
    seed: int = 0
    output: Path = Path("runs/evaluation/actions/metrics.json")
    """Metrics; the answer for each video goes to predictions.jsonl beside it."""


@dataclass(frozen=True)
class DetectionConfig:
    """Localisation of named actions: class-agnostic proposals are classified by their frames. mAP beside a baseline."""

    model: Path
    """Folder of a model of the recipe prompting."""
    shards: Path
    """Folder of shards with the annotated videos, a row a second."""
    classes: Path
    """The classes to be told apart, one name a line; in an open set those that were not trained on."""
    annotations: Path
    """ActivityNet's json, which is also the usual form of THUMOS14's."""
    rule: Rule = "activitynet"
    """Whose rule of mean average precision; the two differ."""
    trained_classes: Path | None = None
    """Open set: the classes that were trained on, the only ones that proposals may know; by default --classes."""
    proposals: Path | None = None
    """Proposals of a detector in place of our own: {"results": {video: [{"segment": …, "score": …}, …]}}."""
    names: Path | None = None
    """What each class is called in a text; without it its own name, _ read as a blank."""
    subset: str = "validation"
    labels_each: int = 2
    """Likeliest classes that each proposal is given."""
    output: Path = Path("runs/evaluation/detection/metrics.json")
    """Metrics; all labelled windows go to predictions.jsonl beside it."""


def evaluate_actions(config: ActionsConfig) -> Figures:
    """Recognise the listed videos; returns the metrics that it writes.

    Raises InputError if files do not fit each other, or a listed video is not in the shards.
    """
    classes, videos = read_class_names(config.classes), read_split(config.annotations)
    model, shards = load_prompting(config.model, config.shards)
    ids = class_words(model, classes, config.names)
    clips = read_listed(model, shards, videos, classes, config.annotations)
    sampling = RecognitionConfig(model.config.frames, config.passes, config.seed)
    probabilities = class_probabilities(model, clips.features, ids, sampling)
    rows = [
        {"video_id": video.video_id, "class": video.class_name, "answer": classes[answer], "probability": float(sure)}
        for video, answer, sure in zip(videos, probabilities.argmax(1), probabilities.max(1))
    ]
    return write_results(config.output, recognition_metrics(probabilities, clips.labels), rows)


def evaluate_detection(config: DetectionConfig) -> Figures:
    """Localise and name actions; returns the metrics that it writes, mAP of the commonest class everywhere beside.

    Raises InputError if files do not fit each other, or no annotated video of these classes is in the shards.
    """
    classes = read_class_names(config.classes)
    every = [w for w in read_true_windows(config.annotations, config.subset) if w.label in {*classes, AMBIGUOUS}]
    model, shards = load_prompting(config.model, config.shards)
    rows = shards.rows_by_id()
    truth = [window for window in every if window.video_id in rows]
    named = [window.label for window in truth if window.label != AMBIGUOUS]
    if not named:
        raise InputError(f"{config.shards}: holds no video with windows of the {len(classes)} classes")
    ids = class_words(model, classes, config.names)
    known = ids
    if config.trained_classes is not None:
        known = class_words(model, read_class_names(config.trained_classes), config.names)
    proposals = None if config.proposals is None else read_proposals(config.proposals)
    commonest = Counter(named).most_common(1)[0][0]
    found: list[LabelledWindow] = []
    baseline: list[LabelledWindow] = []
    videos = sorted({window.video_id for window in truth})
    for video in tqdm(videos, "localising", unit="video", disable=len(videos) < 100):
        frames = frame_features(model, shards, [video])[0]
        windows = propose(model, frames, known) if proposals is None else proposals.get(video, np.zeros((0, 3)))
        found += label_proposals(model, video, frames, windows, ids, classes, config.labels_each)
        baseline += [LabelledWindow(video, start, end, commonest, score) for start, end, score in windows.tolist()]
    metrics = Figures({"videos": len(videos), "dropped": len({window.video_id for window in every}) - len(videos)})
    metrics |= detection_metrics(found, truth, config.rule)
    metrics["commonest class everywhere"] = {"mAP": detection_metrics(baseline, truth, config.rule)["mAP"]}
    return write_results(config.output, metrics, [vars(window) for window in found])


def load_prompting(model_folder: Path, shards_folder: Path) -> tuple[Recipe, Shards]:
    """A model of the recipe prompting and the shards that it reads. Raises InputError if it is of another recipe."""
    model, shards = load_model_and_shards(model_folder, shards_folder)
    module = cast(nn.Module, model)
    if not isinstance(module, Recipe):
        raise InputError(f"{model_folder}: not a model of the recipe prompting; train one with `videoclip prompt`")
    return module, shards


def class_words(model: Recipe, classes: Sequence[str], names: Path | None) -> Packed:
    """Word ids of what the classes are called, start and end words included.

    Raises InputError, with the class, if it has no name or its name does not fit the text side beside the prompts.
    """
    spoken = {name: name.replace("_", " ") for name in classes} if names is None else read_spoken_names(names, classes)
    tokenizer, room = model.tokenizer(), model.prompts.room
    for name, ids in zip(classes, tokenizer.word_ids([spoken[name] for name in classes])):
        if len(ids) > room:
            raise InputError(
                f"the class {name!r} has {len(ids)} words, but beside prompts of {model.prompts.prefix} and "
                f"{model.prompts.postfix} there is room for {room}: shorten its name with --names"
            )
    return tokenizer.clip_ids([spoken[name] for name in classes], room)


def read_listed(
    model: Recipe, shards: Shards, videos: Sequence[ListedVideo], classes: Sequence[str], where: Path
) -> ListedClips:
    """The features of listed videos and their classes' numbers. Raises InputError for unknown videos or classes."""
    check_listed(videos, shards.rows_by_id(), where)
    wanted = list(dict.fromkeys(video.video_id for video in videos))
    return listed_clips(videos, dict(zip(wanted, frame_features(model, shards, wanted))), classes, str(where))


def frame_features(model: Recipe, shards: Shards, video_ids: Iterable[str]) -> list[np.ndarray]:
    """Frozen features float32 [T, H] of videos' frames."""
    rows = shards.rows_by_id()
    features = []
    for video in video_ids:
        tokens = torch.from_numpy(shards.tokens(rows[video]).astype(np.float32))
        frames = model.frame_features(Packed(tokens, torch.tensor([len(tokens)])))
        features.append(frames.rows.cpu().numpy())
    return features
