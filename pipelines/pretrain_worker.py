"""What every training process of `videoclip pretrain` runs: cluster, train an epoch, leave a checkpoint, again."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray.train
import torch
from ray.train.torch import get_device, prepare_model

from pipelines.checkpointing import Checkpoints, Orders, barrier, newest_checkpoint
from pipelines.heartbeat import Heartbeat
from pipelines.pretrain_batches import BatchPlan, Clusterings
from pipelines.runs import Metrics
from videoclip.checkpoints import TrainingState, load_checkpoint, restore_random_state
from videoclip.convert.initialise import initialise
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.shards import Shards
from videoclip.data.sources import open_shards
from videoclip.data.words import CaptionWords, WordTokenizer
from videoclip.encoders.catalog import load_video_encoder
from videoclip.errors import InputError
from videoclip.pretrained import ModelCard
from videoclip.recipes import recipe_named
from videoclip.retrieval.false_negatives import FalseNegativeConfig
from videoclip.storage import local_copy
from videoclip.training import (
    Computation,
    EpochBatches,
    OptimizerConfig,
    make_optimizer,
    spread_batches,
    train_epoch,
)
from videoclip.transformer import compile_blocks

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained, on what, and how; `identity` is what a checkpoint is compared with when it is continued."""

    shards: Path | tuple[Path, ...]
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
    batches_per_step: int = 1
    pairs_at_once: int = 0
    precision: Precision = "auto"
    compile: bool = False
    log_every: int = 1
    checkpoint_minutes: float = 0
    checkpoints_kept: int = 2


def train_worker(arguments: Mapping[str, Any]) -> None:
    """Train the recipe of a plan, `arguments["plan"]`, from its start or its last checkpoint to its end."""
    plan: TrainingPlan = arguments["plan"]
    torch.set_num_threads(plan.threads)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    with Heartbeat(plan.output, rank, workers) as heartbeat:
        Training(plan, rank, workers, heartbeat).run()


class Training:
    """One worker's part of a run."""

    def __init__(self, plan: TrainingPlan, rank: int, workers: int, heartbeat: Heartbeat) -> None:
        self.plan, self.rank, self.workers, self.heartbeat = plan, rank, workers, heartbeat
        self.device = get_device()
        self.sampler, tokenizer = _open_sampler(plan, rank, workers)
        self.clusterings = Clusterings(plan.batches, plan.output, self.sampler, rank, workers)
        if not len(self.clusterings.rows):
            raise InputError(f"{plan.shards}: no video has captions; run `videoclip extract` with --captions")
        self.computation = _computation(plan, self.device)
        self.recipe, self.optimizer, self.state = self._start_or_continue(tokenizer)
        self.trained = prepare_model(self.recipe)
        self.orders = Orders(plan.output, rank, workers, plan.checkpoint_minutes)
        self.checkpoints = Checkpoints(plan.output, rank, workers, plan.checkpoints_kept, plan.identity)
        self.total_steps = plan.epochs * -(-self.clusterings.batches // plan.batches_per_step)
        self.metrics = Metrics(plan.output, self.state.step) if rank == 0 else None

    def run(self) -> None:
        """Train to the end, or until told to stop; either way what was reached is in a checkpoint."""
        plan = self.plan
        while self.state.epoch < plan.epochs:
            if self._epoch():
                self.checkpoints.wait()
                return
            ray.train.report({"epoch": self.state.epoch})
        self.heartbeat.doing = "writing the last checkpoint"
        self.checkpoints.wait()
        if self.metrics:
            self.metrics.close()
            _save_model(self.recipe, self.sampler.shards, plan.output)

    def _start_or_continue(self, tokenizer: WordTokenizer) -> tuple[Any, torch.optim.Optimizer, TrainingState]:
        """Module, optimiser and state: new ones, or those of the latest checkpoint that is whole."""
        plan = self.plan
        torch.manual_seed(plan.seed)  # the same initial weights everywhere
        recipe = recipe_named(plan.recipe).build(plan.options, self.sampler.shards.manifest, tokenizer)
        if plan.init:
            initialise(recipe, plan.init)
        recipe.to(self.device)
        if plan.compile:
            compile_blocks(recipe)
        optimizer = make_optimizer(recipe, plan.optimizer)
        checkpoint = newest_checkpoint(plan.output, self.rank)
        if checkpoint is None:
            return recipe, optimizer, TrainingState()
        return recipe, optimizer, load_checkpoint(checkpoint, recipe, optimizer, plan.identity, self.rank)

    def _epoch(self) -> bool:
        """Train to the end of the present epoch and leave a checkpoint; whether the run was told to stop."""
        plan, state = self.plan, self.state
        epoch, start = state.epoch, time.perf_counter()
        # Dropout is the only draw that is not named by its place in the run.
        seeds = [plan.seed, epoch, self.rank, *([state.place] if state.place else [])]
        torch.manual_seed(int(np.random.default_rng(seeds).integers(2**62)))
        self.heartbeat.doing = "embedding and clustering the videos"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.computation.bfloat16):
            clustering = self.clusterings.start_epoch(epoch, self.recipe, epoch + 1 == plan.epochs)
        if state.place and state.random:
            restore_random_state(state.random)
        of_clustering = {"batch_seconds": time.perf_counter() - start}
        if not state.place:
            of_clustering |= {f"batches/{name}": value for name, value in clustering.figures.items()}
        steps = spread_batches(clustering.batches, plan.batches_per_step)
        batches = EpochBatches(
            self.sampler,
            steps,
            plan.seed,
            epoch,
            self.rank,
            plan.false_negatives,
            clustering.duplicates,
            self.workers,
            first=state.place,
            device=self.device,
        )
        drawn = self.heartbeat.watched(batches)
        trained = train_epoch(
            self.trained, self.optimizer, drawn, state, self.total_steps, plan.optimizer, self.computation
        )
        for step, figures in trained:
            self.heartbeat.did_step(step + 1, self.total_steps, state.epoch, plan.epochs, figures)
            if figures and self.metrics:  # what the batches are like stands with the first step that uses them
                self.metrics.add(step, {**figures, "epoch": epoch, **of_clustering})
                of_clustering = {}
            checkpoint, stop = self.orders.after_step()
            if checkpoint:
                self._save()
            if stop:
                self.orders.finish()
                return True
        self.orders.finish()
        self._save()
        return False

    def _save(self) -> None:
        self.heartbeat.doing = "copying the state for a checkpoint"
        self.checkpoints.save(self.recipe, self.optimizer, self.state)


def _computation(plan: TrainingPlan, device: torch.device) -> Computation:
    """How steps are computed on this device."""
    half = plan.precision == "bfloat16"
    if plan.precision == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return Computation(plan.pairs_at_once, half, plan.log_every)


def _open_sampler(plan: TrainingPlan, rank: int, workers: int) -> tuple[ClipSampler, WordTokenizer]:
    """The clip sampler over the shards, or what the recipe draws in its place, and the run's tokenizer."""
    shards = open_shards(plan.shards)
    tokenizer = WordTokenizer.load(plan.output / "text")
    # Every worker leaves its share of the captions' word ids on disk, where all then find them.
    CaptionWords(shards, tokenizer, plan.output, slice(rank, None, workers))
    barrier()
    own = getattr(recipe_named(plan.recipe), "sampler", None)  # of recipes that are not trained on pairs of clips
    if own is None:
        return ClipSampler(shards, tokenizer, plan.clips, plan.output), tokenizer
    sampler: ClipSampler = own(plan.options, shards, tokenizer, plan.clips, plan.output)
    return sampler, tokenizer


def _save_model(recipe: Any, shards: Shards, output: Path) -> None:
    """The finished model with everything that it needs for own videos and texts, under its name only when whole."""
    folder = local_copy(shards.folder)
    if (folder / "video_encoder.json").exists():
        recipe.frozen.video_encoder = load_video_encoder(folder)
    unfinished = output / ".model"
    shutil.rmtree(unfinished, ignore_errors=True)
    manifest = shards.manifest
    data = f"{len(shards)} videos, {shards.seconds().sum() / 3600:.1f} hours, with captions"
    recipe.save_pretrained(unfinished, ModelCard(data, f"{manifest.encoder} ({manifest.fingerprint[:12]})"))
    os.replace(unfinished, output / "model")
