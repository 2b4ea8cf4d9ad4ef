"""A progress bar of a training that happens in other processes, read off the metrics that they write."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

from tqdm import tqdm

from videoclip.training import StuckLoss


class TrainingProgress:
    """Follows `metrics.jsonl` while the block runs; says once if the loss is stuck at that of guessing."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path = path
        self.bar = tqdm(total=steps, unit="step", desc="pretraining")
        self._stuck = StuckLoss()
        self._read = path.stat().st_size if path.exists() else 0  # what was there before is not followed again
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

    def _update(self) -> None:
        rows = [row for row in self._new_rows() if "loss" in row]
        for row in rows:
            words = self._stuck.notice(row["loss"], row.get("chance_loss", float("inf")))
            if words:
                self.bar.write(f"note: {words}", file=sys.stderr)
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
