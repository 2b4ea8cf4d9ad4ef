"""Training in this process on described clips: a bar, metrics, checkpoints, and going on from the newest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from pipelines.checkpointing import Checkpoints, Orders, newest_checkpoint
from pipelines.runs import Metrics
from pipelines.stopping import Stop
from videoclip.checkpoints import TrainingState, load_checkpoint, restore_random_state

KEPT = 1  # checkpoints


def train_to_the_end(
    folder: Path,
    name: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Callable[[TrainingState], Iterator[dict[str, float]]],
    total: int,
    identity: Mapping[str, Any],
    minutes: float,
    stop: Stop,
) -> None:
    """Run all `total` steps, or those that are left of a run that was interrupted.

    `steps` trains from a state on, which it keeps up to date, and yields the figures of every step. Metrics and
    checkpoints, one every so many `minutes` and one when SIGTERM comes, are written into `folder`.
    Raises InputError if its checkpoint is of another run than `identity`, Stopped after SIGTERM.
    """
    newest = newest_checkpoint(folder, rank=0)
    state = TrainingState() if newest is None else load_checkpoint(newest, module, optimizer, identity)
    if state.random:
        restore_random_state(state.random)
    metrics = Metrics(folder, state.step)
    checkpoints, orders = Checkpoints(folder, 0, 1, KEPT, identity), Orders(stop.file.parent, 0, 1, minutes)
    with stop.by_checkpoint(), tqdm(desc=name, total=total, initial=state.step, unit="step") as bar:
        for figures in steps(state):
            metrics.add(state.step - 1, figures)
            bar.update()
            is_due, is_told_to_stop = orders.after_step()
            if is_due:
                checkpoints.save(module, optimizer, state)
            if is_told_to_stop:
                break
        checkpoints.wait()
    metrics.close()
