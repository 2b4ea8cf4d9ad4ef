"""Which action is it? Closed sets, few shots, open sets; and when, by classifying class-agnostic proposals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from videoclip.data.action_clips import (
    ActionBatch,
    ListedVideo,
    action_batch,
    check_listed,
    evenly_sampled,
    sample_frames,
)
from videoclip.errors import InputError
from videoclip.evaluation.detection import LabelledWindow
from videoclip.evaluation.localization import (
    LocalizationConfig,
    candidate_windows,
    excess_over_threshold,
    suppress_overlaps,
)
from videoclip.packed import Packed

VIDEOS_AT_ONCE = 128
MOST_PROPOSALS = 100  # of a video
PROPOSALS = LocalizationConfig()


class Classifier(Protocol):
    """What recognition asks of a model: clips of frame features and names of classes, to compare by cosine."""

    def clip_features(self, frames: Packed) -> Tensor:
        """Rows [N, D] of B clips -> [B, H]."""
        ...

    def text_features(self, word_ids: Packed) -> Tensor:
        """Rows int [M] of C names -> [C, H]."""
        ...

    @property
    def temperature(self) -> Tensor:
        """Divides cosines."""
        ...


@dataclass(frozen=True)
class RecognitionConfig:
    """How clips are taken out of videos."""

    frames: int = 16
    passes: int = 5
    """Times that every video is sampled at random, as the release validates; their probabilities are averaged. 0: once,
    evenly spaced, which is not what the release reports, but the same every time."""
    seed: int = 0


@torch.inference_mode()
def class_probabilities(
    model: Classifier,
    features: Sequence[np.ndarray],
    classes: Packed,
    config: RecognitionConfig = RecognitionConfig(),
) -> np.ndarray:
    """float32 [V, C]: how likely videos, frame features [T, D] each, show each class; names are embedded once."""
    text = F.normalize(model.text_features(classes), dim=-1)
    generator = np.random.default_rng(config.seed)
    total = np.zeros((len(features), len(text)), np.float32)
    for _ in range(max(1, config.passes)):
        for first in range(0, len(features), VIDEOS_AT_ONCE):
            block = features[first : first + VIDEOS_AT_ONCE]
            places = [
                sample_frames(len(video), config.frames, generator)
                if config.passes
                else evenly_sampled(len(video), config.frames)
                for video in block
            ]
            clips = action_batch(block, [0] * len(block), classes, places).frames
            logits = F.normalize(model.clip_features(clips), dim=-1) @ text.T / model.temperature
            total[first : first + len(block)] += logits.softmax(1).float().cpu().numpy()
    return total / max(1, config.passes)


def recognition_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1 and top-5 in percent of probabilities [V, C] for labels int64 [V], beside chance and the commonest."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    return {
        "videos": len(labels),
        "top1": _percent((order[:, 0] == labels).mean()),
        "top5": _percent((order[:, :5] == labels[:, None]).any(1).mean()),
        "chance": _percent(1 / probabilities.shape[1]),
        "commonest": _percent(counts.max() / len(labels)),
    }


@dataclass(frozen=True)
class ListedClips:
    """The videos of a split: features of each, and its class's number in `names`."""

    features: list[np.ndarray]
    labels: np.ndarray
    names: list[str]


def listed_clips(
    videos: Sequence[ListedVideo], features: Mapping[str, np.ndarray], names: Sequence[str], where: str
) -> ListedClips:
    """Bring a split, features by video id, and the classes together.

    Raises InputError if a listed video has no features, or a class is not among the names.
    """
    check_listed(videos, dict.fromkeys(features, 0), where)
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted({video.class_name for video in videos} - numbers.keys())
    if unknown:
        raise InputError(f"{where}: the class {unknown[0]!r} is not among the {len(names)} known ones")
    labels = np.array([numbers[video.class_name] for video in videos], np.int64)
    return ListedClips([features[video.video_id] for video in videos], labels, list(names))


def draw_batch(
    clips: ListedClips,
    classes: Packed,
    size: int,
    frames: int,
    generator: np.random.Generator,
    most_classes: int | None = None,
) -> ActionBatch:
    """A training batch as the release draws it: videos at random, `sample_frames` of each, against all classes.

    Of more than `most_classes` (at least 2) only those of the batch, and others at random up to that number.
    """
    chosen = generator.choice(len(clips.features), size, replace=len(clips.features) < size)
    videos = [clips.features[place] for place in chosen]
    places = [sample_frames(len(video), frames, generator) for video in videos]
    labels = clips.labels[chosen]
    if most_classes is not None and len(classes) > most_classes:
        own = np.unique(labels)
        others = generator.permutation(np.setdiff1d(np.arange(len(classes)), own))
        kept = np.concatenate([own, others[: max(0, most_classes - len(own))]])
        classes, labels = classes.take(torch.from_numpy(kept)), np.searchsorted(own, labels)
    return action_batch(videos, labels.tolist(), classes, places)


def few_shot_metrics(top1: Sequence[float]) -> dict[str, float]:
    """Mean over splits in percent, and its standard error."""
    values = np.array(top1, np.float64)
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
    return {"splits": len(values), "top1": round(float(values.mean()), 2), "standard_error": round(error, 2)}


# --- Localisation ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def propose(
    model: Classifier, frames: np.ndarray, classes: Packed, config: LocalizationConfig = PROPOSALS
) -> np.ndarray:
    """Class-agnostic proposals of one video, frame features [T, D], one a second: float64 [P, 3], best first.

    Windows where the similarity with the mean of all class embeddings exceeds the video's own threshold. Give the
    classes that were trained on: in an open set the proposals must not know the others.
    """
    seconds = Packed(torch.from_numpy(np.asarray(frames, np.float32)), torch.ones(len(frames), dtype=torch.int64))
    video = F.normalize(model.clip_features(seconds), dim=-1)  # every second as a clip of its own
    query = F.normalize(model.text_features(classes), dim=-1).mean(0)
    curve = (video @ query).float().cpu().numpy()[None]
    windows = candidate_windows(len(frames), config)
    score = excess_over_threshold(curve, windows, config.threshold)[0]
    kept = suppress_overlaps(windows, score, config.suppress, MOST_PROPOSALS)
    highest = max(float(score[kept].max()), 1e-6)
    positive = np.clip(score[kept] / highest, 1e-3, None)  # so that the product with a probability keeps their order
    return np.column_stack([windows[kept], positive]).astype(np.float64)


@torch.inference_mode()
def label_proposals(
    model: Classifier,
    video_id: str,
    frames: np.ndarray,
    proposals: np.ndarray,
    classes: Packed,
    names: Sequence[str],
    labels_each: int = 2,
) -> list[LabelledWindow]:
    """Every proposal float64 [P, 3] with its likeliest classes; score = the proposal's times the class probability.

    Frame features [T, D], one a second; a proposal is pooled over the seconds inside it, at most as many as the model
    takes, evenly spaced. Proposals outside the video are left out.
    """
    limit = getattr(getattr(model, "config", None), "frames", 16)
    inside = [row for row in proposals if row[0] < len(frames) and row[1] > row[0]]
    if not inside:
        return []
    clips = []
    for start, end, _ in inside:
        first = max(0, int(start))
        rows = frames[first : max(first + 1, min(len(frames), round(end)))]
        clips.append(torch.from_numpy(np.asarray(rows[evenly_sampled(len(rows), min(limit, len(rows)))], np.float32)))
    video = F.normalize(model.clip_features(Packed.of(clips)), dim=-1)
    text = F.normalize(model.text_features(classes), dim=-1)
    probabilities = (video @ text.T / model.temperature).softmax(1).float().cpu().numpy()
    windows = []
    for (start, end, score), row in zip(inside, probabilities):
        for number in np.argsort(-row, kind="stable")[:labels_each]:
            windows.append(
                LabelledWindow(video_id, float(start), float(end), names[number], float(score * row[number]))
            )
    return windows


def _percent(share: float) -> float:
    return round(100 * float(share), 2)
