"""What the evaluations have in common: their options, and where results go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.figures import Figures
from videoclip.data.templates import PLAIN
from videoclip.files import write_json, write_json_lines


@dataclass(frozen=True)
class ZeroShotConfig:
    """What evaluations have in common."""

    model: Path
    """Folder of a trained model; or `frozen`: the two-tower model that made the shards, with no training at all."""
    shards: Path
    """Folder of shards with the annotated videos."""
    annotations: Path
    """The benchmark's official file."""
    output: Path = Path("runs/evaluation/metrics.json")
    """Metrics; what was answered, item by item, goes to predictions.jsonl beside it."""
    templates: tuple[str, ...] = PLAIN
    """Texts are put into each of these in place of {}, and the embeddings averaged."""


def write_results(output: Path, metrics: dict[str, Any], rows: list[dict[str, Any]]) -> Figures:
    """Write metrics to `output` and what was answered to predictions.jsonl beside it; returns the metrics."""
    write_json_lines(output.parent / "predictions.jsonl", rows)
    write_json(output, metrics)
    return Figures(metrics)
