"""Zero-shot evaluation with labels or sentences as queries: COIN, CrossTask, MSR-VTT's questions, HTM-Align."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.evaluate import ZeroShotConfig, write_results
from pipelines.figures import Figures
from videoclip.data.coin import read_coin
from videoclip.data.crosstask import read_crosstask
from videoclip.data.htm_align import read_htm_align
from videoclip.data.msrvtt import read_questions
from videoclip.evaluation.actions import OutsideRule, place_steps_of_videos, segment_videos
from videoclip.evaluation.alignment import align_videos
from videoclip.evaluation.inputs import load_model_and_shards
from videoclip.evaluation.questions import answer_questions
from videoclip.evaluation.sentences import NEAR, Reading


@dataclass(frozen=True)
class COINConfig(ZeroShotConfig):
    """Action segmentation on COIN: which label does each second have? Frame accuracy beside the best single label."""

    annotations: Path
    """COIN.json."""
    output: Path = Path("runs/evaluation/coin/metrics.json")
    subset: str = "testing"
    outside: OutsideRule | Literal["auto"] = "auto"
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


@dataclass(frozen=True)
class AlignmentConfig(ZeroShotConfig):
    """Alignment of sentences on HTM-Align: at which second is each shown (recall, beside chance), if at all (AUC)?"""

    annotations: Path
    """htm_align.json."""
    output: Path = Path("runs/evaluation/htm-align/metrics.json")
    near: float | None = NEAR
    """Seconds around where a sentence is expected that are looked at; None: the whole video."""
    by: Reading = "towers"
    """What compares sentences with seconds: towers, or of the recipe `alignment` also together, or both (the mean)."""


def evaluate_coin(config: COINConfig) -> Figures:
    """Run COIN; returns the metrics that it writes.

    Raises InputError if files do not fit each other or no annotated video is in the shards.
    """
    videos, names = read_coin(config.annotations, config.subset)
    model, shards = load_model_and_shards(config.model, config.shards)
    results = segment_videos(model, shards, videos, names, config.templates, config.outside)
    return write_results(config.output, *results)


def evaluate_crosstask(config: CrossTaskConfig) -> Figures:
    """Run CrossTask; as `evaluate_coin`."""
    tasks, videos = read_crosstask(config.annotations, config.videos)
    model, shards = load_model_and_shards(config.model, config.shards)
    return write_results(config.output, *place_steps_of_videos(model, shards, tasks, videos, config.templates))


def evaluate_questions(config: QuestionConfig) -> Figures:
    """Answer MSR-VTT's questions; as `evaluate_coin`."""
    questions = read_questions(config.annotations)
    model, shards = load_model_and_shards(config.model, config.shards)
    return write_results(config.output, *answer_questions(model, shards, questions, config.templates))


def evaluate_htm_align(config: AlignmentConfig) -> Figures:
    """Run HTM-Align; as `evaluate_coin`."""
    videos = read_htm_align(config.annotations)
    model, shards = load_model_and_shards(config.model, config.shards)
    return write_results(config.output, *align_videos(model, shards, videos, config.templates, config.near, config.by))
