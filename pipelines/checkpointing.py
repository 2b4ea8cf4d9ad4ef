"""When and where a training leaves checkpoints: every epoch, every few minutes, and when it is told to stop.

A worker copies its share of the state between two steps and writes it in a side thread. The first worker decides when;
the others learn of it one step later, so that no step waits for word from another machine.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from pipelines.stopping import STOP_FILE
from videoclip.checkpoints import (
    STATE_FILE,
    TrainingState,
    damage,
    finish_checkpoint,
    is_written,
    snapshot,
    write_share,
)
from videoclip.errors import InputError

T = TypeVar("T")

FOLDER = "checkpoints"
LOOKS_A_SECOND = 2
SHARES_WITHIN = 600  # seconds that the first worker waits for the others' files


def agreed(value: T) -> T:
    """What the first worker has: all must agree on what to do next, and file systems may show them different things."""
    answer = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    return answer[0]


def barrier() -> None:
    """Wait for all workers."""
    if dist.is_initialized():
        dist.barrier()


def checkpoints(output: Path) -> list[Path]:
    """Folders of a run's whole checkpoints, the oldest first."""
    return sorted(path.parent for path in (Path(output) / FOLDER).glob(f"epoch-*/{STATE_FILE}"))


def newest_checkpoint(output: Path, rank: int) -> Path | None:
    """The newest checkpoint whose files are what was written, the same for all workers.

    Those that are damaged are set aside under the name `damaged-…`, those that were never finished are removed.
    Raises InputError if there are some and all are damaged.
    """
    name, reasons = "", list[str]()
    if rank == 0:
        for folder in reversed(checkpoints(output)):
            reason = damage(folder)
            if not reason:
                name = folder.name
                break
            reasons.append(f"{folder.name}: {reason}")
            folder.rename(folder.with_name(f"damaged-{folder.name}-{time.time_ns()}"))
        for unfinished in set((output / FOLDER).glob("epoch-*")) - set(checkpoints(output)):
            shutil.rmtree(unfinished)
    name, reasons = agreed((name, reasons))
    if reasons and not name:
        raise InputError(
            f"{output / FOLDER}: no checkpoint is whole ({'; '.join(reasons)}); "
            "put back the files, or start anew in another --output"
        )
    return output / FOLDER / name if name else None


class Checkpoints:
    """Writes a run's checkpoints; every worker has one of these and saves at the same steps."""

    def __init__(self, output: Path, rank: int, workers: int, kept: int, run: Mapping[str, Any]) -> None:
        self.output, self.rank, self.workers, self.kept, self.run = output, rank, workers, kept, run
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: tuple[int, int] | None = None

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Copy the state now and write it beside training, once the checkpoint before is written.

        Raises what went wrong with that one.
        """
        if self._saved == (state.epoch, state.place):
            return
        self.wait()
        self._saved = state.epoch, state.place
        of_now = TrainingState(state.epoch, state.step, state.place)
        share = snapshot(module, optimizer, self.rank, self.workers)
        self._thread = threading.Thread(target=self._write, args=(share, of_now), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until what was saved is on disk; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, share: dict[str, torch.Tensor], state: TrainingState) -> None:
        try:
            name = f"epoch-{state.epoch:04d}" + (f"-step-{state.place:08d}" if state.place else "")
            folder = self.output / FOLDER / name
            write_share(folder, share, self.rank, self.workers)
            if self.rank == 0:
                self._wait_for_shares(folder)
                finish_checkpoint(folder, state, self.run, self.workers)
                for old in checkpoints(self.output)[: -self.kept]:
                    shutil.rmtree(old)
        except BaseException as error:  # raised where training can hear of it
            self._error = error

    def _wait_for_shares(self, folder: Path) -> None:
        patience = time.monotonic() + SHARES_WITHIN
        while not is_written(folder, self.workers):
            if time.monotonic() > patience:
                raise OSError(f"{folder}: the other workers' files did not appear within {SHARES_WITHIN} s")
            time.sleep(0.05)


class Orders:
    """After every step: whether all workers leave a checkpoint now, and whether they stop.

    The first worker looks at its clock and at the STOP_FILE; its word reaches the others during the next step.
    """

    def __init__(self, output: Path, rank: int, workers: int, minutes: float) -> None:
        self._stop_file = output / STOP_FILE
        self._rank, self._seconds = rank, 60 * minutes
        self._last, self._looked, self._stop = time.monotonic(), -1.0, False
        self._group = dist.new_group(backend="gloo") if workers > 1 else None
        self._under_way: tuple[Any, torch.Tensor] | None = None

    def after_step(self) -> tuple[bool, bool]:
        """(checkpoint, stop), the same for all workers after the same step. A collective call that waits for nobody."""
        if self._group is None:
            return self._of_first()
        answer = self._answer()
        word = torch.tensor(self._of_first() if self._rank == 0 else (False, False), dtype=torch.uint8)
        self._under_way = dist.broadcast(word, 0, self._group, async_op=True), word
        return answer

    def finish(self) -> None:
        """Hear the last word out; before anything else is done together."""
        self._answer()
        self._under_way = None

    def _answer(self) -> tuple[bool, bool]:
        if self._under_way is None:
            return False, False
        handle, word = self._under_way
        handle.wait()
        return bool(word[0]), bool(word[1])

    def _of_first(self) -> tuple[bool, bool]:
        now = time.monotonic()
        if now - self._looked > 1 / LOOKS_A_SECOND:
            self._looked, self._stop = now, self._stop_file.exists()
        due = bool(self._seconds) and now - self._last >= self._seconds
        if due:
            self._last = now
        return due or self._stop, self._stop
