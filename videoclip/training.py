"""Training any recipe without a framework: one step, one epoch, the schedule, batches drawn ahead.

What is here runs with torch, numpy and safetensors alone, on one process or on many of a `torch.distributed` group.
It knows no system: a recipe is a module whose `forward(batch)` returns named losses and figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from videoclip.checkpoints import TrainingState
from videoclip.data.clips import ClipBatch, ClipSampler
from videoclip.errors import InputError
from videoclip.gather import mean_over_workers, rows_per_rank, world_size
from videoclip.retrieval.false_negatives import PAPER, FalseNegativeConfig, pair_labels

SKIPS_ALLOWED = 5  # updates in a row whose gradient is not finite; one bad batch should not end a night's run


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam and its schedule. The defaults are the public release's, section "pretraining" of its configuration."""

    learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 1000
    clip_norm: float = 2.0
    weight_decay: float = 0.0


def learning_rate_at(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up from zero, then linear ("polynomial", power one) decay to zero at `total_steps`."""
    warmup = min(config.warmup_steps, max(1, total_steps // 2))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * max(0.0, (total_steps - step) / max(1, total_steps - warmup))


def make_optimizer(recipe: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (plain Adam with the default weight decay of zero) over the parameters that are trained."""
    parameters = [parameter for parameter in recipe.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, config.learning_rate, config.betas, weight_decay=config.weight_decay)


class Batch(Protocol):
    """What a step asks of a batch: its number of pairs, and where it is known that of every worker's."""

    @property
    def rows_per_rank(self) -> tuple[int, ...] | None: ...
    def __len__(self) -> int: ...


def step(
    recipe: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, learning_rate: float, clip_norm: float
) -> dict[str, float]:
    """One update by `recipe(batch)["loss"]`, the mean over this worker's pairs; the other losses and figures are noted.

    Returns them as means over the pairs of all workers, and "gradient_norm", "learning_rate" and "skipped": 1 where
    the gradient was not finite and nothing has been updated.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    outputs: dict[str, Tensor] = recipe(batch)
    counts = batch.rows_per_rank or rows_per_rank(len(batch))
    optimizer.zero_grad(set_to_none=True)
    # DistributedDataParallel averages over workers; weighting by their pairs makes that the mean over all pairs.
    (outputs["loss"] * len(batch) * world_size() / sum(counts)).backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm).item()
    is_finite = np.isfinite(norm)
    if is_finite:
        optimizer.step()
        _after_step(recipe)
    values = torch.stack([value.detach().double() for value in outputs.values()])
    figures = dict(zip(outputs, mean_over_workers(values, len(batch), counts).tolist()))
    return {**figures, "gradient_norm": norm, "learning_rate": learning_rate, "skipped": float(not is_finite)}


def _after_step(recipe: nn.Module) -> None:
    """Let parts of a recipe keep their parameters within bounds: those that have a method `after_step`."""
    for module in recipe.modules():
        after: Callable[[], None] | None = getattr(module, "after_step", None)
        if after is not None:
            after()


def train_epoch(
    recipe: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    state: TrainingState,
    total_steps: int,
    config: OptimizerConfig,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Run every batch once, yielding step and figures after each. Advances `state` by one epoch.

    Raises InputError if the gradients of SKIPS_ALLOWED updates in a row are not finite.
    """
    recipe.train()
    skipped = 0
    for batch in batches:
        rate = learning_rate_at(state.step, total_steps, config)
        figures = step(recipe, optimizer, batch, rate, config.clip_norm)
        yield state.step, figures
        skipped = skipped + 1 if figures["skipped"] else 0
        if skipped == SKIPS_ALLOWED:
            raise InputError(
                f"the gradient was not finite in {skipped} steps in a row, up to step {state.step} (loss "
                f"{figures['loss']:g}); go on from the last checkpoint with a lower --optimizer.learning-rate "
                "in another --output, or check the tokens"
            )
        state.step += 1
    state.epoch += 1


class StuckLoss:
    """Notices, once, that a loss stays where a model that tells nothing apart has it."""

    PATIENCE = 200  # steps
    NEARNESS = 0.01  # share of the loss of chance

    def __init__(self) -> None:
        self._steps = 0
        self._said = False

    def notice(self, loss: float, chance: float) -> str:
        """What to tell a person after a step, mostly nothing."""
        self._steps = self._steps + 1 if loss > (1 - self.NEARNESS) * chance else 0
        if self._said or self._steps < self.PATIENCE:
            return ""
        self._said = True
        return (
            f"the loss has stayed at {chance:.2f}, that of guessing, for {self._steps} steps: nothing is learned. "
            "Try a lower --model.temperature, another --optimizer.learning-rate, or --init with pretrained weights"
        )


def spread_batches(batches: list[np.ndarray], workers: int) -> list[list[np.ndarray]]:
    """Hand an epoch's batches out: steps, each with one array of rows for every worker.

    A step takes `workers` batches. What is left for the last step is shared out evenly, so that every worker steps
    as often as the others and every row is used; fewer leftover rows than workers join the step before.
    Raises InputError if there are fewer rows than workers.
    """
    whole = len(batches) // workers * workers
    steps = [batches[i : i + workers] for i in range(0, whole, workers)]
    left = np.concatenate(batches[whole:]) if whole < len(batches) else np.zeros(0, np.int64)
    if len(left) >= workers:
        steps.append(np.array_split(left, workers))
    elif len(left):
        if not steps:
            raise InputError(f"{len(left)} videos cannot be spread over {workers} workers; use fewer workers")
        steps[-1] = [np.append(rows, left[i : i + 1]) for i, rows in enumerate(steps[-1])]
    return steps


@dataclass(frozen=True)
class EpochBatches:
    """The batches of one epoch for one worker: which videos, which clips of them, and who is whose negative.

    `steps` as `spread_batches` gives them; `duplicates` int64 [rows of the shards] labels near-duplicate videos alike.
    A draw depends on seed, epoch, step and rank alone, so a resumed run sees the same clips.
    """

    sampler: ClipSampler
    steps: list[list[np.ndarray]]
    seed: int
    epoch: int
    rank: int = 0
    negatives: FalseNegativeConfig = PAPER
    duplicates: np.ndarray | None = None

    def draw(self, place: int) -> ClipBatch:
        """The batch of one step."""
        generator = np.random.default_rng([self.seed, self.epoch, place, self.rank])
        clips = self.sampler.config.clips_per_video
        counts = tuple(len(rows) * clips for rows in self.steps[place])
        batch = self.sampler.batch(self.steps[place][self.rank], generator)
        labels = pair_labels(batch, self.negatives, self.duplicates, sum(counts[: self.rank]))
        return replace(batch, labels=labels, rows_per_rank=counts)

    def __iter__(self) -> Iterator[ClipBatch]:
        """All batches, each drawn while the step before it is computed."""
        return prefetch(self.draw, len(self.steps))


def prefetch(draw: Callable[[int], ClipBatch], count: int, first: int = 0) -> Iterator[ClipBatch]:
    """Yield `draw(first)`, …, `draw(count - 1)`, each drawn by a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        waiting = [thread.submit(draw, place) for place in range(first, min(first + 1, count))]
        for place in range(first, count):
            batch = waiting.pop().result()
            if place + 1 < count:
                waiting.append(thread.submit(draw, place + 1))
            yield batch
