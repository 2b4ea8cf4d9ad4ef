"""Training any recipe without a framework: one step, one epoch, the schedule, the batches of an epoch.

What is here runs with torch, numpy and safetensors alone, on one process or on many of a `torch.distributed` group.
It knows no system: a recipe is a module whose `forward(batch)` returns named losses and figures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from videoclip.checkpoints import TrainingState
from videoclip.data.clips import ClipBatch, ClipSampler
from videoclip.errors import InputError
from videoclip.gather import mean_over_workers, rows_per_rank, world_size
from videoclip.gradient_caching import embedding_in_parts
from videoclip.prefetch import prefetch
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


@dataclass(frozen=True)
class Computation:
    """How a step is computed; what it computes stays the same but for rounding and, in parts, the dropout drawn."""

    pairs_at_once: int = 0
    """Most pairs that a worker embeds at a time; the loss still sees all. 0: all at once."""
    bfloat16: bool = False
    """Matrices are multiplied in bfloat16; weights, their moments and the loss stay float32."""
    log_every: int = 1
    """Steps between two rows of figures, each the mean since the last; in between no step waits for the GPU."""


def make_optimizer(recipe: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (plain Adam with the default weight decay of zero) over the parameters that are trained.

    On a GPU it is one kernel, so the module has to be where it is trained.
    """
    parameters = [parameter for parameter in recipe.parameters() if parameter.requires_grad]
    fused = bool(parameters) and all(parameter.is_cuda for parameter in parameters)
    return torch.optim.AdamW(
        parameters, config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=fused or None
    )


class Batch(Protocol):
    """What a step asks of a batch: its number of pairs, and where it is known that of every worker's."""

    @property
    def rows_per_rank(self) -> tuple[int, ...] | None: ...
    def __len__(self) -> int: ...


def step(
    recipe: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, learning_rate: float, clip_norm: float
) -> dict[str, float]:
    """`update`, and its figures as means over the pairs of all workers, with "learning_rate"."""
    figures = Figures()
    figures.add(update(recipe, optimizer, batch, learning_rate, clip_norm), batch)
    return {**figures.mean(), "learning_rate": learning_rate}


def update(
    recipe: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    learning_rate: float,
    clip_norm: float,
    computation: Computation = Computation(),  # frozen
) -> dict[str, Tensor]:
    """One update by `recipe(batch)["loss"]`, the mean over this worker's pairs; the other losses and figures are noted.

    Returns them, scalars of this worker, and "gradient_norm" and "skipped": 1 where the gradient was not finite and
    nothing has been updated. On a GPU nothing here waits for it.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device.type
    half = torch.autocast(device, torch.bfloat16, enabled=computation.bfloat16)
    with half, embedding_in_parts(recipe, computation.pairs_at_once):
        outputs: dict[str, Tensor] = recipe(batch)
    optimizer.zero_grad(set_to_none=True)
    # DistributedDataParallel averages over workers; weighting by their pairs makes that the mean over all pairs.
    (outputs["loss"] * len(batch) * world_size() / sum(_counts(batch))).backward()
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    is_bad = ~norm.isfinite()
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]  # read by the kernel, which then does nothing
        optimizer.step()
        _after_step(recipe)
    elif not is_bad:
        optimizer.step()
        _after_step(recipe)
    figures = {name: value.detach().double() for name, value in outputs.items()}
    return {**figures, "gradient_norm": norm.double(), "skipped": is_bad.double()}


def _counts(batch: Batch) -> Sequence[int]:
    return batch.rows_per_rank or rows_per_rank(len(batch))


class Figures:
    """Figures of steps, summed where they were computed and only looked at when they are asked for."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._steps = 0

    def add(self, figures: dict[str, Tensor], batch: Batch) -> None:
        """Note a step's scalars; `batch` says how many pairs this worker and all had."""
        share = len(batch) * world_size() / sum(_counts(batch))
        values = torch.stack([value.double() for value in figures.values()]) * share
        self._names = list(figures)
        self._sum = values if self._sum is None else self._sum + values
        self._steps += 1

    def mean(self) -> dict[str, float]:
        """Means over the pairs of all workers and the steps noted, which are forgotten. A collective call."""
        assert self._sum is not None
        means = dict(zip(self._names, (mean_over_workers(self._sum, 1, [1] * world_size()) / self._steps).tolist()))
        self._sum, self._steps = None, 0
        return means


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
    computation: Computation = Computation(),  # frozen
) -> Iterator[tuple[int, dict[str, float]]]:
    """Run every batch once, yielding after each step its number and the figures, which are empty between two rows.

    What is yielded is done: `state` says how to go on from there. At the end it is at the start of the next epoch.
    Raises InputError if the gradients of SKIPS_ALLOWED updates in a row are not finite.
    """
    recipe.train()
    figures, in_a_row = Figures(), torch.zeros(())
    batches = iter(batches)
    batch = next(batches, None)
    while batch is not None:
        rate = learning_rate_at(state.step, total_steps, config)
        values = update(recipe, optimizer, batch, rate, config.clip_norm, computation)
        figures.add(values, batch)
        in_a_row = (in_a_row.to(values["skipped"].device) + 1) * values["skipped"]
        batch = next(batches, None)
        row: dict[str, float] = {}
        if (state.step + 1) % computation.log_every == 0 or batch is None:
            row = {**figures.mean(), "learning_rate": rate}
        state.step, state.place = state.step + 1, state.place + 1
        yield state.step - 1, row
        if row and in_a_row >= SKIPS_ALLOWED:
            raise InputError(
                f"the gradient was not finite in {int(in_a_row)} steps in a row, up to step {state.step - 1} (loss "
                f"{row['loss']:g}); go on from the last checkpoint with a lower --optimizer.learning-rate "
                "in another --output, or check the tokens"
            )
    state.epoch, state.place = state.epoch + 1, 0


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


def spread_batches(batches: list[np.ndarray], batches_per_step: int = 1) -> list[list[np.ndarray]]:
    """Hand an epoch's batches out to its steps, at most `batches_per_step` each and as evenly as can be.

    What a step is does not depend on the number of workers, which share its pairs among them.
    """
    steps = -(-len(batches) // batches_per_step)
    bounds = [len(batches) * number // steps for number in range(steps + 1)]
    return [batches[first:last] for first, last in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class EpochBatches:
    """The batches of one epoch for one worker: which videos, which clips of them, and who is whose negative.

    `steps` as `spread_batches` gives them; `duplicates` int64 [rows of the shards] labels near-duplicate videos alike.
    A step's pairs are those of its batches, one after the other; they are drawn by seed, epoch, step and the batch's
    place in it alone, and every one of `workers` takes an equal run of them. So a run that is resumed, also by
    another number of workers, sees the same clips in the same order. It begins with step `first`.
    Raises InputError if a step has fewer pairs than there are workers.
    """

    sampler: ClipSampler
    steps: list[list[np.ndarray]]
    seed: int
    epoch: int
    rank: int = 0
    negatives: FalseNegativeConfig = PAPER
    duplicates: np.ndarray | None = None
    workers: int = 1
    first: int = 0
    device: torch.device | None = None
    """A GPU to bring batches to; where it is none, models bring them to where they are."""

    def __post_init__(self) -> None:
        fewest = min((sum(self._pairs_of(step)) for step in self.steps), default=self.workers)
        if fewest < self.workers:
            raise InputError(
                f"a step of {fewest} pairs cannot be shared by {self.workers} workers; "
                "use fewer workers, or raise --batches-per-step"
            )

    def _pairs_of(self, step: list[np.ndarray]) -> list[int]:
        return [len(rows) * self.sampler.config.clips_per_video for rows in step]

    def draw(self, place: int) -> ClipBatch:
        """This worker's share of one step."""
        of_batches = self._pairs_of(self.steps[place])
        total, parts = sum(of_batches), []
        bounds = [total * number // self.workers for number in range(self.workers + 1)]
        begin, end = bounds[self.rank], bounds[self.rank + 1]
        before = 0
        for number, (rows, pairs) in enumerate(zip(self.steps[place], of_batches)):
            share = slice(max(0, begin - before), min(pairs, end - before))
            if share.start < share.stop:
                generator = np.random.default_rng([self.seed, self.epoch, place, number])
                parts.append(self.sampler.batch(rows, generator, share))
            before += pairs
        batch = type(parts[0]).together(parts)
        labels = pair_labels(batch, self.negatives, self.duplicates, begin) if isinstance(batch, ClipBatch) else None
        counts = tuple(last - first for first, last in itertools.pairwise(bounds))
        return replace(batch, labels=labels, rows_per_rank=counts)

    def __iter__(self) -> Iterator[ClipBatch]:
        """All batches, each drawn while the step before it is computed."""
        return prefetch(self.draw, len(self.steps), self.first, self.device)
