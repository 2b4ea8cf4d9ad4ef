"""`videoclip status RUN`: how far a run is, how fast, who does what, who is stalled, and what was left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.run_status import read_status


@dataclass(frozen=True)
class StatusConfig:
    """Say how a run is doing: progress, speed, time left, workers, the last checkpoint, quarantine."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder, its --output."""


def status(config: StatusConfig) -> None:
    """Print it. Raises InputError if the folder holds no run."""
    print("\n".join(read_status(config.run).lines()))
