"""SIGTERM, as Slurm and spot machines send it before they take a machine back: leave a checkpoint and end, at once."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STOP_FILE = ".stop"  # in a run folder: whoever trains there leaves a checkpoint and ends
EXIT_CODE = 75  # EX_TEMPFAIL: nothing is wrong, the same command goes on; a job script may queue itself again
GRACE = 45.0  # seconds that workers have for their checkpoint; then what there is has to do


class Stopped(Exception):
    """The run was told to stop; its text says what was left."""


class Stop:
    """What SIGTERM does at present: end the stage, or, inside `by_checkpoint`, ask the workers to."""

    def __init__(self, output: Path) -> None:
        self.file = output / STOP_FILE
        self.file.unlink(missing_ok=True)
        self._since: float | None = None
        self._asks_workers = False

    def _on_signal(self, *_: Any) -> None:
        if not self._asks_workers or self._since is not None:
            raise Stopped("stopped by SIGTERM, at the last checkpoint")
        self._since = time.monotonic()
        self.file.touch()

    def listen(self) -> None:
        """Take SIGTERM over; again after Ray has started, which takes it for itself."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)

    @contextlib.contextmanager
    def by_checkpoint(self) -> Iterator[None]:
        """While the block runs workers train: SIGTERM lets them leave a checkpoint. Raises Stopped when they have."""
        self.listen()
        self._asks_workers = True
        try:
            yield
        finally:
            self._asks_workers = False
        if self._since is not None:
            raise Stopped("stopped by SIGTERM, with a checkpoint of now")

    def watch(self) -> None:
        """Called every few seconds. Raises Stopped when the workers had time enough."""
        if self._since is not None and time.monotonic() - self._since > GRACE:
            raise Stopped(f"stopped by SIGTERM; no checkpoint within {GRACE:g} s, so at the last one")


@contextlib.contextmanager
def stopping(output: Path) -> Iterator[Stop]:
    """Answer SIGTERM while the block runs; afterwards it is as before."""
    stop = Stop(output)
    before = signal.getsignal(signal.SIGTERM)
    stop.listen()
    try:
        yield stop
    finally:
        stop.file.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
