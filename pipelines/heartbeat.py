"""What every training process says of itself every few seconds: how far it is, what it does, since when.

As a file in the run folder, which anybody can read at any time, and as Prometheus gauges through Ray's exporter.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from videoclip.files import write_json

FOLDER = "workers"  # in a run folder
SECONDS = 5.0  # between two words of a worker
SPEED_OVER = 60.0  # seconds
READING = "reading a batch"
TRAINING = "training"

T = TypeVar("T")


class Heartbeat:
    """Speaks for one worker while the block runs; set `doing` to what it does next."""

    def __init__(self, output: Path, rank: int, workers: int) -> None:
        self._path = output / FOLDER / f"worker-{rank:05d}.json"
        self._about: dict[str, Any] = {
            **{"rank": rank, "workers": workers, "host": socket.gethostname(), "process": os.getpid()},
            **{"started": time.time(), "step": 0, "doing": "starting", "since": time.time()},
        }
        self._steps: list[tuple[float, int]] = []
        self._gauges = _Gauges(output.name, rank)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._speak, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.doing = "ended"
        self._stop.set()
        self._thread.join()
        self._write()

    @property
    def doing(self) -> str:
        """What the worker does at present."""
        return str(self._about["doing"])

    @doing.setter
    def doing(self, what: str) -> None:
        self._about |= {"doing": what, "since": time.time()}

    def did_step(self, done: int, of: int, epoch: int, epochs: int, figures: Mapping[str, float]) -> None:
        """Note that `done` of `of` steps are behind, and the figures, where the step has some."""
        now = time.monotonic()
        self._steps = [item for item in self._steps if now - item[0] < SPEED_OVER] + [(now, done)]
        (first, before), (last, after) = self._steps[0], self._steps[-1]
        speed = (after - before) / (last - first) if last > first else 0.0
        self._about |= {"step": done, "steps": of, "epoch": epoch, "epochs": epochs, "steps_per_second": speed}
        if figures:
            self._about["loss"] = figures["loss"]

    def watched(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; while the next is waited for and while it is used the worker says so."""
        iterator = iter(batches)
        while True:
            self.doing = READING
            batch = next(iterator, None)
            self.doing = TRAINING
            if batch is None:
                return
            yield batch

    def _speak(self) -> None:
        while not self._stop.wait(SECONDS):
            self._write()

    def _write(self) -> None:
        about = {  # JSON knows no infinity
            name: value
            for name, value in dict(self._about).items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        with contextlib.suppress(OSError):  # a full disk ends a run where it writes what matters
            write_json(self._path, about)
        self._gauges.set(about)


class _Gauges:
    """The same numbers as Prometheus gauges, `ray_videoclip_…`, tagged with run and rank; nothing outside of Ray."""

    NAMES = ("step", "steps", "epoch", "loss", "steps_per_second")

    def __init__(self, run: str, rank: int) -> None:
        import ray

        self._gauges: dict[str, Any] = {}
        if ray.is_initialized():
            from ray.util.metrics import Gauge

            for name in self.NAMES:
                self._gauges[name] = Gauge(f"videoclip_{name}", f"{name} of a training worker", ("run", "rank"))
                self._gauges[name].set_default_tags({"run": run, "rank": str(rank)})

    def set(self, about: Mapping[str, Any]) -> None:
        for name, gauge in self._gauges.items():
            if name in about:
                gauge.set(float(about[name]))
