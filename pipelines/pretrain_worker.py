"""What every training process of `videoclip pretrain` runs: cluster, train an epoch, leave a checkpoint, again."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import prepare_model
from torch import nn

from pipelines.pretrain_batches import BatchPlan, Clusterings, agreed
from pipelines.runs import Metrics
from videoclip.checkpoints import TrainingState, load_checkpoint, save_checkpoint
from videoclip.convert.initialise import initialise
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.shards import Shards
from videoclip.data.words import WordTokenizer
from videoclip.encoders.catalog import load_video_encoder
from videoclip.errors import InputError
from videoclip.pretrained import ModelCard
from videoclip.recipes import recipe_named
from videoclip.retrieval.false_negatives import FalseNegativeConfig
from videoclip.training import EpochBatches, OptimizerConfig, make_optimizer, spread_batches, train_epoch

CHECKPOINTS_KEPT = 2


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained, on what, and how; `identity` is what a checkpoint is compared with when it is continued."""

    shards: Path
    output: Path
    recipe: str
    options: Any
    """Of the recipe."""
    init: str
    clips: ClipConfig
    batches: BatchPlan
    false_negatives: FalseNegativeConfig
    optimizer: OptimizerConfig
    epochs: int
    seed: int
    threads: int
    identity: Mapping[str, Any]


def train_worker(arguments: Mapping[str, Any]) -> None:
    """Train the recipe of a plan, `arguments["plan"]`, from its start or its last checkpoint to its end."""
    plan: TrainingPlan = arguments["plan"]
    torch.set_num_threads(plan.threads)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    sampler, tokenizer = _open_sampler(plan.shards, plan.output, plan.clips, rank)
    clusterings = Clusterings(plan.batches, plan.output, sampler, rank, workers)
    if not len(clusterings.rows):
        raise InputError(f"{plan.shards}: no video has captions; run `videoclip extract` with --captions")
    recipe, optimizer, state = _start_or_continue(plan, sampler.shards, tokenizer, rank)
    trained = prepare_model(recipe)
    _move_optimizer(optimizer, recipe)
    total_steps = plan.epochs * -(-len(clusterings.rows) // (plan.batches.options.videos_per_batch * workers))
    metrics = Metrics(plan.output, state.step) if rank == 0 else None
    while state.epoch < plan.epochs:
        # Dropout is the only draw that is not named by its place in the run.
        torch.manual_seed(int(np.random.default_rng([plan.seed, state.epoch, rank]).integers(2**62)))
        epoch, start = state.epoch, time.perf_counter()
        clustering = clusterings.start_epoch(epoch, recipe)
        of_clustering = {"batch_seconds": time.perf_counter() - start}
        of_clustering |= {f"batches/{name}": value for name, value in clustering.figures.items()}
        steps = spread_batches(clustering.batches, workers)
        batches = EpochBatches(sampler, steps, plan.seed, epoch, rank, plan.false_negatives, clustering.duplicates)
        for step, figures in train_epoch(trained, optimizer, batches, state, total_steps, plan.optimizer):
            if metrics:  # what the batches are like stands with the first step that uses them
                metrics.add(step, {**figures, "epoch": epoch, **of_clustering})
            of_clustering = {}
        if rank == 0:
            folder = plan.output / "checkpoints" / f"epoch-{state.epoch:04d}"
            save_checkpoint(folder, recipe, optimizer, state, plan.identity)
            _drop_old_checkpoints(plan.output)
        ray.train.report({"epoch": state.epoch})
    if metrics:
        metrics.close()
        _save_model(recipe, sampler.shards, plan.output)


def _open_sampler(folder: Path, output: Path, clips: ClipConfig, rank: int) -> tuple[ClipSampler, WordTokenizer]:
    """The clip sampler over the shards, and the run's tokenizer."""
    shards = Shards(folder)
    tokenizer = WordTokenizer.load(output / "text")
    # The first worker leaves the captions' word ids on disk; the others then find them.
    _rank_zero_first(rank, lambda: ClipSampler(shards, tokenizer, clips, output))
    return ClipSampler(shards, tokenizer, clips, output), tokenizer


def _rank_zero_first(rank: int, action: Callable[[], object]) -> None:
    """Let the first worker do something that leaves files behind before the others look for them."""
    if rank == 0:
        action()
    if dist.is_initialized():
        dist.barrier()


def _start_or_continue(
    plan: TrainingPlan, shards: Shards, tokenizer: WordTokenizer, rank: int
) -> tuple[Any, torch.optim.Optimizer, TrainingState]:
    """Module, optimiser and state: new ones, or those of the latest checkpoint."""
    torch.manual_seed(plan.seed)  # the same initial weights everywhere
    recipe = recipe_named(plan.recipe).build(plan.options, shards.manifest, tokenizer)
    if plan.init:
        initialise(recipe, plan.init)
    optimizer = make_optimizer(recipe, plan.optimizer)
    # On a network file system the workers may see different checkpoints; the first decides for all.
    checkpoint = agreed(_latest_checkpoint(plan.output) if rank == 0 else None)
    state = load_checkpoint(checkpoint, recipe, optimizer, plan.identity) if checkpoint else TrainingState()
    return recipe, optimizer, state


def _move_optimizer(optimizer: torch.optim.Optimizer, recipe: nn.Module) -> None:
    """Bring restored moments to the device that the module has been moved to."""
    device = next(recipe.parameters()).device
    for values in optimizer.state.values():
        for name, value in values.items():
            if name != "step" and isinstance(value, torch.Tensor):
                values[name] = value.to(device)


def _latest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    finished = sorted(path.parent for path in (output / "checkpoints").glob("epoch-*/state.json"))
    return finished[-1] if finished else None


def _drop_old_checkpoints(output: Path) -> None:
    for path in sorted((output / "checkpoints").glob("epoch-*"))[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(path)


def _save_model(recipe: Any, shards: Shards, output: Path) -> None:
    """The finished model with everything that it needs for own videos and texts, under its name only when whole."""
    if (shards.folder / "video_encoder.json").exists():
        recipe.frozen.video_encoder = load_video_encoder(shards.folder)
    unfinished = output / ".model"
    shutil.rmtree(unfinished, ignore_errors=True)
    manifest = shards.manifest
    data = f"{len(shards)} videos, {shards.seconds().sum() / 3600:.1f} hours, with captions"
    recipe.save_pretrained(unfinished, ModelCard(data, f"{manifest.encoder} ({manifest.fingerprint[:12]})"))
    os.replace(unfinished, output / "model")
