"""Zero-shot retrieval of annotated clips by their descriptions: YouCook2, MSR-VTT, DiDeMo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.evaluate import ZeroShotConfig, write_results
from pipelines.figures import Figures
from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.data.didemo import read_didemo
from videoclip.data.msrvtt import read_msrvtt
from videoclip.data.youcook2 import read_youcook2
from videoclip.evaluation.inputs import load_model_and_shards
from videoclip.evaluation.retrieval import retrieve


@dataclass(frozen=True)
class RetrievalConfig(ZeroShotConfig):
    """Text-to-video retrieval over YouCook2's annotated clips: R@K and ranks, beside chance."""

    annotations: Path
    """youcookii_annotations_trainval.json, or the csv that MIL-NCE distributes."""
    output: Path = Path("runs/evaluation/youcook2/metrics.json")
    subset: str = "validation"


@dataclass(frozen=True)
class MSRVTTConfig(ZeroShotConfig):
    """Text-to-video retrieval over whole MSR-VTT videos: R@K and ranks, beside chance."""

    annotations: Path
    """MSRVTT_JSFUSION_test.csv (1k-A), or the full json with twenty sentences a video."""
    output: Path = Path("runs/evaluation/msrvtt/metrics.json")
    split: str = "test"
    """Of the json."""


@dataclass(frozen=True)
class DiDeMoConfig(ZeroShotConfig):
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


def _retrieve(config: ZeroShotConfig, annotated: list[AnnotatedClip]) -> Figures:
    model, shards = load_model_and_shards(config.model, config.shards)
    return write_results(config.output, *retrieve(model, shards, annotated, config.templates))
