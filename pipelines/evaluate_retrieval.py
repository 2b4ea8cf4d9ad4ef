"""Zero-shot retrieval of annotated clips by their descriptions: YouCook2, MSR-VTT, DiDeMo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.evaluate import ZeroShotConfig, write_results
from pipelines.figures import Figures
from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.data.didemo import read_didemo
from videoclip.data.frame_shards import FrameShards, holds_frames
from videoclip.data.howto100m import read_topics
from videoclip.data.msrvtt import read_msrvtt
from videoclip.data.templates import PLAIN
from videoclip.data.youcook2 import read_youcook2
from videoclip.errors import InputError
from videoclip.evaluation.frames import check_size, load_frame_model, retrieve_from_frames
from videoclip.evaluation.inputs import load_model_and_shards
from videoclip.evaluation.retrieval import retrieve_clips


@dataclass(frozen=True)
class GalleryConfig(ZeroShotConfig):
    """What retrieval evaluations have in common."""

    gallery: Path | None = None
    """What each video is about, a json object {video_id: topic} or HowTo100M_v1.csv: texts and clips of one topic are
    ranked among themselves, which asks for near things to be told apart. Without it all are ranked together."""
    rerank: int = 0
    """So many of the best clips of every text are put in order by matching, by models that have it (recipes fusion and
    alpro); 0: none, or, on shards of frames, all pairs. What the figures are without stands beside them."""


@dataclass(frozen=True)
class RetrievalConfig(GalleryConfig):
    """Text-to-video retrieval over YouCook2's annotated clips: R@K and ranks, beside chance."""

    annotations: Path
    """youcookii_annotations_trainval.json, or the csv that MIL-NCE distributes."""
    output: Path = Path("runs/evaluation/youcook2/metrics.json")
    subset: str = "validation"


@dataclass(frozen=True)
class MSRVTTConfig(GalleryConfig):
    """Text-to-video retrieval over whole MSR-VTT videos: R@K and ranks, beside chance."""

    annotations: Path
    """MSRVTT_JSFUSION_test.csv (1k-A), or the full json with twenty sentences a video."""
    output: Path = Path("runs/evaluation/msrvtt/metrics.json")
    split: str = "test"
    """Of the json."""


@dataclass(frozen=True)
class DiDeMoConfig(GalleryConfig):
    """Text-to-video retrieval over whole DiDeMo videos: R@K and ranks, beside chance."""

    annotations: Path
    """test_data.json, or val_data.json."""
    output: Path = Path("runs/evaluation/didemo/metrics.json")
    queries: Literal["paragraph", "sentence"] = "paragraph"
    """A paragraph is all descriptions of a video joined, as the field reports it."""


def evaluate_retrieval(config: RetrievalConfig) -> Figures:
    """Run YouCook2 retrieval; returns the metrics that it writes.

    Raises InputError if files do not fit each other or no annotated clip is in the shards.
    """
    return _retrieve(config, read_youcook2(config.annotations, config.subset))


def evaluate_msrvtt(config: MSRVTTConfig) -> Figures:
    """Run MSR-VTT retrieval; as `evaluate_retrieval`."""
    return _retrieve(config, read_msrvtt(config.annotations, config.split))


def evaluate_didemo(config: DiDeMoConfig) -> Figures:
    """Run DiDeMo retrieval; as `evaluate_retrieval`."""
    return _retrieve(config, read_didemo(config.annotations, config.queries))


def _retrieve(config: GalleryConfig, annotated: list[AnnotatedClip]) -> Figures:
    topics = None if config.gallery is None else read_topics(config.gallery)
    if config.rerank < 0:
        raise InputError(f"--rerank {config.rerank}: must be 0 (none) or how many clips of every text are re-ranked")
    if holds_frames(config.shards):
        if topics is not None or config.templates != PLAIN:
            raise InputError("--gallery and --templates are for shards of tokens; these hold frames")
        frames, on_frames = FrameShards(config.shards), load_frame_model(config.model)
        check_size(on_frames, frames)
        best = config.rerank or None
        return write_results(config.output, *retrieve_from_frames(on_frames, frames, annotated, best=best))
    model, shards = load_model_and_shards(config.model, config.shards)
    return write_results(
        config.output, *retrieve_clips(model, shards, annotated, config.templates, topics, config.rerank)
    )
