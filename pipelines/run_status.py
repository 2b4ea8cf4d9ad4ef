"""How a run is doing, read off the files in its folder: by anybody, from any machine, also after its end."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import heartbeat
from pipelines.checkpointing import FOLDER as CHECKPOINTS
from pipelines.checkpointing import checkpoints
from pipelines.runs import QUARANTINE
from videoclip.errors import InputError
from videoclip.files import read_json, read_json_lines

SILENT = 30.0  # seconds behind the others after which a worker that says nothing is named
STUCK = 60.0  # seconds of waiting for one batch after which a worker is named
OVER = 60.0  # seconds without a word from anybody after which nothing runs any more


@dataclass(frozen=True)
class Worker:
    """The last word of one worker: what it wrote, and when, by the clock of the file system."""

    about: dict[str, Any]
    heard: float

    @property
    def name(self) -> str:
        """For a person."""
        return f"worker {self.about['rank']} (process {self.about['process']} on {self.about['host']})"


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run; what its folder does not hold is empty."""

    workers: list[Worker] = field(default_factory=list)
    is_running: bool = False
    stalled: list[str] = field(default_factory=list)
    finished: bool = False
    checkpoint: tuple[str, float] | None = None
    """The newest whole one, and its age in seconds."""
    damaged: int = 0
    videos: tuple[int, float, bool] | None = None
    """Of an extraction: how many, their hours, and whether these are all."""
    quarantine: dict[str, int] = field(default_factory=dict)

    def progress(self) -> str:
        """One line of how far a training is; empty before its first step."""
        told = [worker.about for worker in self.workers if "steps" in worker.about]
        if not told:
            return ""
        first, slowest = told[0], min(about["step"] for about in told)
        left = first["steps"] - slowest
        words = [f"step {slowest} of {first['steps']} ({100 * slowest / max(1, first['steps']):.0f}%)"]
        words.append(f"epoch {first['epoch'] + 1} of {first['epochs']}")
        if "loss" in first:
            words.append(f"loss {first['loss']:.3f}")
        if self.is_running and first["steps_per_second"] > 0:
            words.append(f"{first['steps_per_second']:.2g} steps a second")
            words.append(f"{in_words(left / first['steps_per_second'])} left")
        return ", ".join(words)

    def lines(self) -> list[str]:
        """Everything, for a person."""
        lines = []
        if self.videos:
            count, hours, complete = self.videos
            lines.append(f"shards     {count} videos, {hours:.1f} hours" + ("" if complete else ", not complete yet"))
        if self.workers:
            state = "finished" if self.finished else "running" if self.is_running else "not running"
            lines.append(f"training   {state}" + (f": {self.progress()}" if self.progress() else ""))
            doing = Counter(worker.about["doing"] for worker in self.workers)
            lines.append(f"workers    {len(self.workers)}: " + ", ".join(f"{n} {what}" for what, n in doing.items()))
        lines += [f"stalled    {words}" for words in self.stalled]
        if self.checkpoint:
            lines.append(f"checkpoint {self.checkpoint[0]}, {in_words(self.checkpoint[1])} ago")
        if self.damaged:
            lines.append(f"damaged    {self.damaged} checkpoints set aside")
        for reason, count in sorted(self.quarantine.items(), key=lambda item: -item[1]):
            lines.append(f"quarantine {count} {reason}")
        return lines


def read_status(run: Path, now: float | None = None) -> RunStatus:
    """Of the run in a folder. Raises InputError if there is none."""
    run = Path(run)
    if not run.is_dir():
        raise InputError(f"{run}: no such folder")
    workers = _workers(run)
    now = time.time() if now is None else now
    freshest = max((worker.heard for worker in workers), default=0.0)
    going = [worker for worker in workers if worker.about["doing"] != "ended"]
    is_running = bool(going) and now - freshest < OVER
    whole = checkpoints(run)
    status = RunStatus(
        workers,
        is_running,
        stalled_workers(going, freshest) if is_running else [],
        (run / "model" / "config.json").exists(),
        (whole[-1].name, max(0.0, now - (whole[-1] / "state.json").stat().st_mtime)) if whole else None,
        len(list((run / CHECKPOINTS).glob("damaged-*"))),
        _videos(run),
        _quarantine(run),
    )
    if status == RunStatus():
        raise InputError(f"{run}: holds no run; name the --output of an extraction or a pretraining")
    return status


def stalled_workers(workers: list[Worker], freshest: float) -> list[str]:
    """Those that the others have to wait for, by name and reason. `freshest`: when anybody was heard last."""
    stalled = []
    for worker in workers:
        silent = freshest - worker.heard
        same = worker.heard - worker.about["since"]
        if silent > SILENT:
            words = f"not heard of for {silent:.0f} s longer than the others; it was {worker.about['doing']}"
            stalled.append(f"{worker.name}: {words}")
        elif worker.about["doing"] == heartbeat.READING and same > STUCK:
            stalled.append(f"{worker.name}: has been {heartbeat.READING} for {same:.0f} s; look at its storage")
    return stalled


def _workers(run: Path) -> list[Worker]:
    """The workers of the latest attempt, by rank."""
    found = []
    for path in sorted((run / heartbeat.FOLDER).glob("worker-*.json")):
        with contextlib.suppress(OSError, json.JSONDecodeError):  # written anew or taken away at this moment
            found.append(Worker(json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime))
    newest = max(found, key=lambda worker: worker.heard, default=None)
    return [worker for worker in found if newest and worker.about["rank"] < newest.about["workers"]]


def _videos(run: Path) -> tuple[int, float, bool] | None:
    if not (run / "manifest.json").exists():
        return None
    manifest = read_json(run / "manifest.json")
    parts = manifest.get("parts", [])
    return (
        sum(part["videos"] for part in parts),
        sum(part["seconds"] for part in parts) / 3600,
        bool(manifest.get("complete")),
    )


def _quarantine(run: Path) -> dict[str, int]:
    """How many items are left out for each reason; what differs from item to item is cut off."""
    if not (run / QUARANTINE).exists():
        return {}
    rows = read_json_lines(run / QUARANTINE)
    return dict(Counter(f"{row['what']}: {row['reason'].split(':')[0].split('(')[0].strip()[:80]}" for row in rows))


def in_words(seconds: float) -> str:
    """A time span for a person."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
