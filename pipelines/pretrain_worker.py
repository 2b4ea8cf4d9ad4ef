"""What every training process of `videoclip pretrain` runs: cluster, train an epoch, leave a checkpoint, again."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.pretrain_batches import Clusterings
from pipelines.runs import Metrics
from videoclip.errors import InputError
from videoclip.training import TrainingState

if TYPE_CHECKING:
    from pipelines.pretrain import PretrainConfig

CHECKPOINTS_KEPT = 2


def train_worker(arguments: dict[str, Any]) -> None:
    """What every training process runs."""
    import ray.train
    import torch
    from ray.train.torch import prepare_model

    from videoclip.training import ClipEmbedder, epoch_batches, save_checkpoint, spread_batches, train_epoch

    config: PretrainConfig = arguments["config"]
    output = config.output
    torch.set_num_threads(arguments["threads"])
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    sampler, tokenizer = _open_sampler(config, output, rank, workers)
    clusterings = Clusterings(config, sampler, rank, workers)
    if not len(clusterings.rows):
        raise InputError(f"{config.shards}: no video has captions; run `videoclip extract` with --captions")
    model, optimizer, state = _start_or_continue(config, sampler.shards, tokenizer, output, arguments["identity"])
    embedder = prepare_model(ClipEmbedder(model))
    _move_optimizer(optimizer, model)
    total_steps = config.epochs * -(-len(clusterings.rows) // (config.videos_per_batch * workers))
    metrics = Metrics(output, state.step) if rank == 0 else None
    while state.epoch < config.epochs:
        # Dropout is the only draw that is not named by its place in the run.
        torch.manual_seed(int(np.random.default_rng([config.seed, state.epoch, rank]).integers(2**62)))
        epoch, start = state.epoch, time.perf_counter()
        clustering = clusterings.start_epoch(epoch, model)
        of_clustering = {"batch_seconds": time.perf_counter() - start}
        if epoch % config.recluster_every == 0:
            of_clustering |= {f"batches/{name}": value for name, value in clustering.figures.items()}
        steps = spread_batches(clustering.batches, workers)
        drawn = epoch_batches(sampler, steps, config.seed, epoch, rank)
        training = train_epoch(
            embedder,
            optimizer,
            drawn,
            state,
            total_steps,
            config.optimizer,
            config.false_negatives,
            clustering.duplicates,
        )
        for step, values in training:
            if metrics:  # what the batches are like stands with the first step that uses them
                metrics.add(step, {**values, "epoch": epoch, **of_clustering})
            of_clustering = {}
        clusterings.finish_ahead()
        if rank == 0:
            folder = output / "checkpoints" / f"epoch-{state.epoch:04d}"
            save_checkpoint(folder, model, optimizer, state, arguments["identity"])
            _drop_old_checkpoints(output)
        ray.train.report({"epoch": state.epoch})
    if metrics:
        metrics.close()
        _save_model(model, sampler.shards, output)


def _open_sampler(config: PretrainConfig, output: Path, rank: int, workers: int) -> tuple[Any, Any]:
    """The clip sampler over the shards, and the run's tokenizer."""
    from videoclip.data.clips import ClipSampler
    from videoclip.data.shards import Shards
    from videoclip.data.words import WordTokenizer

    shards = Shards(config.shards)
    tokenizer = WordTokenizer.load(output / "text")
    # The first worker leaves the captions' word ids on disk; the others then find them.
    _in_turn(rank, workers, lambda: ClipSampler(shards, tokenizer, config.clips, output))
    return ClipSampler(shards, tokenizer, config.clips, output), tokenizer


def _start_or_continue(
    config: PretrainConfig, shards: Any, tokenizer: Any, output: Path, identity: dict[str, Any]
) -> tuple[Any, Any, TrainingState]:
    """Model, optimiser and state: new ones, or those of the latest checkpoint."""
    import torch

    from videoclip.training import load_checkpoint, make_optimizer

    torch.manual_seed(config.seed)  # the same initial weights everywhere
    model = _build_model(config, shards, tokenizer)
    optimizer = make_optimizer(model, config.optimizer)
    checkpoint = _latest_checkpoint(output)
    state = load_checkpoint(checkpoint, model, optimizer, identity) if checkpoint else TrainingState()
    return model, optimizer, state


def _in_turn(rank: int, workers: int, action: Any) -> None:
    """Let the first worker do something that leaves files behind before the others look for them."""
    import torch.distributed as dist

    if rank == 0:
        action()
    if workers > 1:
        dist.barrier()


def _build_model(config: PretrainConfig, shards: Any, tokenizer: Any) -> Any:
    from videoclip.model import VideoCLIP, VideoCLIPConfig

    size = config.model
    text_encoder = None
    if config.text != "wordpiece":
        from videoclip.encoders.text import FrozenTextEncoder

        text_encoder = FrozenTextEncoder(config.text)
    model = VideoCLIP(
        VideoCLIPConfig(
            video_dimension=shards.manifest.dimension,
            width=size.width,
            layers=size.layers,
            video_layers=size.layers,
            heads=size.heads,
            intermediate=4 * size.width,
            transformer=size.transformer,
            pooling=size.pooling,
            text="frozen" if text_encoder else "embeddings",
            text_dimension=text_encoder.dimension if text_encoder else size.width,
            vocabulary=tokenizer.vocabulary,
            positions=config.clips.max_seconds + config.clips.max_words + 4,
            max_seconds=config.clips.max_seconds,
            max_words=config.clips.max_words,
            cls_id=tokenizer.cls_id,
            sep_id=tokenizer.sep_id,
            dropout=size.dropout,
            temperature=size.temperature,
            video_encoder=shards.manifest.fingerprint,
            text_encoder=text_encoder.name if text_encoder and not text_encoder.is_local else "",
        )
    )
    model.set_frozen("tokenizer", tokenizer)
    if text_encoder:
        model.set_frozen("text encoder", text_encoder)
    return model


def _move_optimizer(optimizer: Any, model: Any) -> None:
    """Bring restored moments to the device that the model has been moved to."""
    device = model.log_temperature.device
    for values in optimizer.state.values():
        for name, value in values.items():
            if name != "step" and hasattr(value, "to"):
                values[name] = value.to(device)


def _latest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end, as the first worker sees it.

    On a network file system the others may see an older state of the folder, and would train from other weights.
    """
    from ray.train.collective import broadcast_from_rank_zero

    finished = sorted(path.parent.name for path in (output / "checkpoints").glob("epoch-*/state.json"))
    newest = broadcast_from_rank_zero(finished[-1] if finished else None)
    return output / "checkpoints" / newest if newest else None


def _drop_old_checkpoints(output: Path) -> None:
    for path in sorted((output / "checkpoints").glob("epoch-*"))[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(path)


def _save_model(model: Any, shards: Any, output: Path) -> None:
    """The finished model with everything that `encode_video` and `encode_text` need, under its name only when whole."""
    from videoclip.encoders.video_encoder import load_video_encoder
    from videoclip.model import ModelCard

    if (shards.folder / "video_encoder.json").exists():
        model.set_frozen("video encoder", load_video_encoder(shards.folder))
    unfinished = output / ".model"
    shutil.rmtree(unfinished, ignore_errors=True)
    manifest = shards.manifest
    data = f"{len(shards)} videos, {shards.seconds().sum() / 3600:.1f} hours, with captions"
    model.save_pretrained(unfinished, ModelCard(data, f"{manifest.encoder} ({manifest.fingerprint[:12]})"))
    os.replace(unfinished, output / "model")
