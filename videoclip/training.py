"""Contrastive pretraining without any framework: one step, one epoch, the schedule and the checkpoint.

What is here runs with torch, numpy and safetensors alone, on one process or on many of a `torch.distributed` group.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from videoclip.errors import InputError
from videoclip.files import atomic_path, read_json, write_json
from videoclip.losses import contrastive_loss, first_row, gather, gather_with_gradient, rows_of_workers, world_size
from videoclip.model import VideoCLIP
from videoclip.retrieval.false_negatives import PAPER, FalseNegativeConfig, false_negatives, pair_labels

if TYPE_CHECKING:
    from videoclip.data.clips import ClipBatch, ClipSampler


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam and its schedule. The defaults are the public release's, section "pretraining" of its configuration."""

    learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 1000
    clip_norm: float = 2.0
    weight_decay: float = 0.0


@dataclass
class TrainingState:
    """Everything that a resumed run needs: how far it is, besides weights and optimiser moments."""

    epoch: int = 0
    step: int = 0


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up from zero, then linear ("polynomial", power one) decay to zero at `total_steps`."""
    warmup = min(config.warmup_steps, max(1, total_steps // 2))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * max(0.0, (total_steps - step) / max(1, total_steps - warmup))


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (plain Adam with the default weight decay of zero) over the parameters that are trained."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, config.learning_rate, config.betas, weight_decay=config.weight_decay)


class ClipEmbedder(nn.Module):
    """Both towers behind one `forward`, so that DistributedDataParallel sees every parameter used once."""

    def __init__(self, model: VideoCLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ClipBatch) -> tuple[Tensor, Tensor, Tensor]:
        """-> video [P, H], text [P, H] and the temperature, a scalar."""
        video = self.model.embed_video(torch.from_numpy(batch.video_tokens), torch.from_numpy(batch.video_lengths))
        text = self.model.embed_text(torch.from_numpy(batch.word_ids), torch.from_numpy(batch.word_lengths))
        return video, text, self.model.temperature


def training_step(
    embedder: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: ClipBatch,
    rate: float,
    config: OptimizerConfig,
    negatives: FalseNegativeConfig = PAPER,
    duplicates: np.ndarray | None = None,
) -> dict[str, float]:
    """One update. Negatives come from the whole batch of every worker, but for those that `negatives` leaves out.

    `duplicates` int64 [rows of the shards] labels near-duplicate videos alike (`near_duplicates`).
    Returns loss, gradient norm, temperature, and as shares: "accuracy", of pairs whose own text is the nearest of all;
    "excluded", of pairs of clips that were no negatives; "hard_negatives", of other videos' texts that a clip finds at
    least as near as its own.
    Raises FloatingPointError if the loss is not finite; nothing has been updated then.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    video, text, temperature = embedder(batch)
    counts = rows_of_workers(len(video))
    gathered = gather_with_gradient(video, counts), gather_with_gradient(text, counts)
    first = first_row(len(video), counts)
    labels = pair_labels(batch, duplicates).to(video.device)
    all_labels = gather(labels, counts)
    excluded = false_negatives(labels, all_labels, first, negatives)
    loss = contrastive_loss(video, text, temperature, gathered, first, excluded)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss became {loss.item()}; lower the learning rate or check the tokens")
    optimizer.zero_grad(set_to_none=True)
    # DistributedDataParallel averages over workers; weighting by their pairs makes that the mean over all pairs.
    (loss * len(video) * world_size() / len(gathered[0])).backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    optimizer.step()
    other_videos = (labels[:, :1] != all_labels[:, 0]) & ~excluded
    return {
        "loss": loss.item(),
        **_nearness(video, gathered[1], first, other_videos),
        "excluded": excluded.float().mean().item(),
        "gradient_norm": norm.item(),
        "temperature": temperature.item(),
        "learning_rate": rate,
    }


@torch.no_grad()
def _nearness(video: Tensor, all_text: Tensor, first: int, other_videos: Tensor) -> dict[str, float]:
    """How near a clip finds its own text among all: "accuracy" and "hard_negatives" of `training_step`."""
    similarity = video @ all_text.T
    rows = torch.arange(len(video), device=video.device)
    own = similarity[rows, first + rows][:, None]
    hard = (similarity >= own) & other_videos
    return {
        "accuracy": (similarity.argmax(1) == first + rows).float().mean().item(),
        "hard_negatives": hard.sum().item() / max(1, other_videos.sum().item()),
    }


def train_epoch(
    embedder: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[ClipBatch],
    state: TrainingState,
    total_steps: int,
    config: OptimizerConfig,
    negatives: FalseNegativeConfig = PAPER,
    duplicates: np.ndarray | None = None,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Run every batch once, yielding step and metrics after each. Advances `state` by one epoch."""
    embedder.train()
    for batch in batches:
        rate = learning_rate(state.step, total_steps, config)
        metrics = training_step(embedder, optimizer, batch, rate, config, negatives, duplicates)
        yield state.step, metrics
        state.step += 1
    state.epoch += 1


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


def epoch_batches(
    sampler: ClipSampler, steps: list[list[np.ndarray]], seed: int, epoch: int, rank: int = 0, first: int = 0
) -> Iterator[ClipBatch]:
    """Sample this worker's clips of every step from `first` on, one batch ahead of the step that uses it.

    A draw depends on seed, epoch, step and rank alone, so a resumed run sees the same clips.
    """

    def draw(place: int) -> ClipBatch:
        return sampler.batch(steps[place][rank], np.random.default_rng([seed, epoch, place, rank]))

    with ThreadPoolExecutor(1) as ahead:
        waiting = [ahead.submit(draw, place) for place in range(first, min(first + 1, len(steps)))]
        for place in range(first, len(steps)):
            batch = waiting.pop().result()
            if place + 1 < len(steps):
                waiting.append(ahead.submit(draw, place + 1))
            yield batch


@torch.inference_mode()
def embed_videos(
    model: VideoCLIP, sampler: ClipSampler, rows: np.ndarray, seed: int, epoch: int, videos_at_once: int = 32
) -> np.ndarray:
    """One vector a video for retrieval: the mean over its sampled clips of (video + text) / 2, as published.

    `rows` int64 [V] -> float32 [V, H]. A video's draw depends on seed, epoch and its row alone, so the result is
    the same however the rows are spread over workers.
    """
    was_training = model.training
    model.eval()
    features = [np.zeros((0, model.config.width), np.float32)]
    for first in range(0, len(rows), videos_at_once):
        chosen = rows[first : first + videos_at_once]
        drawn = [
            sampler.batch(chosen[i : i + 1], _draw_for_retrieval(seed, epoch, row)) for i, row in enumerate(chosen)
        ]
        tokens, video_lengths, ids, word_lengths = (
            torch.from_numpy(np.concatenate([getattr(batch, name) for batch in drawn]))
            for name in ("video_tokens", "video_lengths", "word_ids", "word_lengths")
        )
        clips = (model.embed_video(tokens, video_lengths) + model.embed_text(ids, word_lengths)) / 2
        features.append(clips.unflatten(0, (len(chosen), -1)).mean(1).float().cpu().numpy())
    model.train(was_training)
    return np.concatenate(features)


def _draw_for_retrieval(seed: int, epoch: int, row: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch, int(row), 1])


def save_checkpoint(
    folder: Path, model: VideoCLIP, optimizer: torch.optim.Optimizer, state: TrainingState, run: dict[str, Any]
) -> None:
    """Write weights, optimiser and state into `folder`; `state.json` comes last and says that the rest is complete.

    `run` describes what is being trained (seed, data, configuration); a resume with another one is refused.
    """
    folder = Path(folder)
    model.save_weights(folder)
    with atomic_path(folder / "optimizer.pt") as temporary:
        torch.save(optimizer.state_dict(), temporary)
    write_json(folder / "state.json", {**asdict(state), "run": run})  # last: it marks the checkpoint as finished


def load_checkpoint(
    folder: Path, model: VideoCLIP, optimizer: torch.optim.Optimizer, run: dict[str, Any]
) -> TrainingState:
    """Continue from `save_checkpoint`. The random draws need no state: they follow from seed, epoch and step.

    Raises InputError if the checkpoint belongs to another run.
    """
    values = read_json(Path(folder) / "state.json")
    stored, asked = json.loads(json.dumps(values["run"])), json.loads(json.dumps(run))
    if stored != asked:
        differing = sorted(key for key in {*stored, *asked} if stored.get(key) != asked.get(key))
        raise InputError(
            f"{folder}: the run here was started with other {', '.join(differing)}; "
            "give the same options to continue it, or another --output to start anew"
        )
    restored = VideoCLIP.from_pretrained(folder)
    model.load_state_dict(restored.state_dict())
    optimizer.load_state_dict(torch.load(Path(folder) / "optimizer.pt", map_location="cpu", weights_only=True))
    return TrainingState(values["epoch"], values["step"])
