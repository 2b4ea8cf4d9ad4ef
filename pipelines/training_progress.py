"""The progress of a training that happens in other processes, read off what they write: a bar, or a line a minute."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.run_status import read_status
from videoclip.errors import InputError
from videoclip.training import StuckLoss

MINUTE = 60.0


class TrainingProgress:
    """Follows a run folder while the block runs; says once if the loss is stuck at that of guessing.

    With a terminal a bar; without one, as in the log of a job, a line a minute. A stalled worker is named in both.
    """

    def __init__(self, output: Path, steps: int, every: float = MINUTE) -> None:
        self.output, self.path = output, output / "metrics.jsonl"
        self.bar = tqdm(total=steps, unit="step", desc="pretraining", disable=None)
        self._every, self._last_line = every, time.monotonic()
        self._stuck = StuckLoss()
        self._read = self.path.stat().st_size if self.path.exists() else 0  # what was there before is not followed
        self._rest = b""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._update()
        self.bar.close()

    def _follow(self) -> None:
        while not self._stop.wait(0.5):
            self._update()
            if time.monotonic() - self._last_line >= self._every:
                self._last_line = time.monotonic()
                self._say_status()

    def _say_status(self) -> None:
        try:
            status = read_status(self.output)
        except InputError:  # nothing is there yet
            return
        stalled = [f"stalled: {words}" for words in status.stalled]
        progress = [f"pretraining: {status.progress() or 'no step yet'}"] if self.bar.disable else []
        for line in progress + stalled:
            self._say(f"{time.strftime('%H:%M:%S')} {line}")

    def _say(self, line: str) -> None:
        self.bar.write(line, file=sys.stderr)
        sys.stderr.flush()

    def _update(self) -> None:
        rows = [row for row in self._new_rows() if "loss" in row]
        for row in rows:
            words = self._stuck.notice(row["loss"], row.get("chance_loss", float("inf")))
            if words:
                self._say(f"note: {words}")
        if rows:
            self.bar.set_postfix(loss=f"{rows[-1]['loss']:.2f}", epoch=rows[-1]["epoch"], refresh=False)
            self.bar.update(rows[-1]["step"] + 1 - self.bar.n)

    def _new_rows(self) -> list[dict[str, Any]]:
        """Whole lines that were added since the last look."""
        if not self.path.exists():
            return []
        if self.path.stat().st_size < self._read:  # a resumed run has dropped rows behind its checkpoint
            self._read, self._rest = 0, b""
        with open(self.path, "rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return [json.loads(line) for line in lines if line.strip()]
