"""Stage two: contrastive pretraining on shards by Ray Train, on one worker or on many.

Every epoch the workers embed all training videos, the first of them clusters the embeddings into batches of similar
videos, and all train on those batches with negatives from every worker. An epoch ends with a checkpoint; a run that
was killed, or a worker that died, goes on from the last one and sees the same batches and clips that it would have.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.common import Metrics, as_json, cluster_processors, ray_session, start_run, with_absolute_paths
from videoclip.data.clips import ClipConfig
from videoclip.errors import InputError
from videoclip.files import atomic_path, read_json_lines
from videoclip.training import OptimizerConfig, TrainingState

CHECKPOINTS_KEPT = 2
VOCABULARY_CAPTIONS = 1_000_000  # evenly spaced; more would not change a vocabulary but fill the memory


@dataclass(frozen=True)
class ModelSize:
    """The trainable transformer. The defaults are BERT-base, as in the paper."""

    width: int = 768
    layers: int = 6
    """Of each transformer, or of the shared one."""
    heads: int = 12
    transformer: str = "shared"
    """shared or separate."""
    pooling: str = "mean"
    """mean or cls."""
    dropout: float = 0.1
    temperature: float = 0.07
    """Starting value; it is learned."""


@dataclass(frozen=True)
class PretrainConfig:
    """Train VideoCLIP on shards that have captions. Run it again to go on where it stopped."""

    shards: Path
    """Folder that `videoclip extract --captions ...` wrote."""
    output: Path = Path("runs/pretrain")
    """Run folder: the finished model is in its subfolder `model`."""
    epochs: int = 25
    videos_per_batch: int = 32
    batches: str = "cover"
    """How videos are grouped: cover (similar ones together, each once an epoch), random, or paper (Algorithm 1)."""
    recluster_every: int = 1
    """Epochs between two clusterings."""
    text: str = "wordpiece"
    """`wordpiece`: a vocabulary fitted to the captions and trained; or a frozen encoder's folder or hub id."""
    vocabulary: int = 8000
    """Most entries of that vocabulary."""
    model: ModelSize = field(default_factory=ModelSize)
    clips: ClipConfig = field(default_factory=ClipConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    workers: int = 1
    """Training processes; negatives come from all of them. On GPUs, one each."""
    threads: int = 0
    """Threads of each worker; 0 shares the machine's CPUs out."""
    gpu: bool | None = None
    """Train on GPUs (nccl) or on the CPU (gloo); by default whatever the cluster has."""
    max_failures: int = 3
    """How often dead workers are replaced before the run gives up."""
    verify: bool = True
    """Check the shards' checksums first. Turn off for terabytes that were checked before."""
    address: str | None = None
    """Ray cluster to join; without it Ray runs on this machine."""


@dataclass(frozen=True)
class PretrainResult:
    """Where the model is, and how long the clustering took of the whole, in seconds."""

    model: Path
    cluster_seconds: float


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Run the stage.

    Raises InputError if the shards or options cannot be used, or if the output folder holds another run.
    """
    from videoclip.data.shards import Shards

    config = with_absolute_paths(config)
    if Path(config.text).is_dir():
        config = replace(config, text=str(Path(config.text).resolve()))
    shards = Shards(config.shards, verify=config.verify)
    identity = _identity(config, [part.sha256 for part in shards.manifest.parts])
    _refuse_other_run(config.output, identity)
    finished = config.output / "model" / "config.json"
    if finished.exists():
        print(f"{config.output / 'model'} is finished; nothing to do")
        return _result(config.output)
    _prepare_tokenizer(config, shards)
    start_run(config.output, "pretrain", config)
    with ray_session(config.address):
        _fit(config, identity, len(shards))
    print(f"model in {config.output / 'model'}, metrics in {config.output / 'metrics.jsonl'}")
    return _result(config.output)


def _result(folder: Path) -> PretrainResult:
    rows = read_json_lines(folder / "metrics.jsonl")
    return PretrainResult(folder / "model", sum(row.get("cluster_seconds", 0.0) for row in rows))


def _identity(config: PretrainConfig, parts: list[str]) -> dict[str, Any]:
    """What makes two runs the same: everything but where they run."""
    values = as_json(config)
    for name in ("output", "shards", "address", "threads", "gpu", "max_failures", "verify"):
        values.pop(name, None)
    return {**values, "parts": parts}


def _refuse_other_run(folder: Path, identity: dict[str, Any]) -> None:
    from videoclip.files import read_json, write_json

    path = folder / "run.json"
    if not path.exists():
        write_json(path, identity)
        return
    stored = read_json(path)
    differing = sorted(key for key in {*stored, *identity} if stored.get(key) != as_json(identity).get(key))
    if differing:
        raise InputError(
            f"{folder}: holds a run with other {', '.join(differing)}; give the same options to continue it, "
            "or another --output to start anew"
        )


def _prepare_tokenizer(config: PretrainConfig, shards: Any) -> None:
    """Fit or fetch the tokenizer once, before any worker needs it, into `output/text`."""
    from videoclip.data.words import TOKENIZER_FILE, train_wordpiece

    folder = config.output / "text"
    if (folder / TOKENIZER_FILE).exists():
        return
    if config.text != "wordpiece":
        from videoclip.encoders.text import FrozenTextEncoder

        FrozenTextEncoder(config.text).tokenizer.save(folder)
        return
    captions = sum(len(part.caption_text) for part in shards.parts)
    step = max(1, captions // VOCABULARY_CAPTIONS)
    texts = (text for part in shards.parts for text in _every(part.caption_text, step))
    tokenizer = train_wordpiece(texts, config.vocabulary)
    if tokenizer.vocabulary <= 5:
        raise InputError(f"{config.shards}: holds no captions to train on; run `videoclip extract` with --captions")
    tokenizer.save(folder)


def _every(texts: Any, step: int) -> list[str]:
    """Each `step`-th string of an Arrow array."""
    return texts.take(np.arange(0, len(texts), step)).to_pylist()


def _fit(config: PretrainConfig, identity: dict[str, Any], videos: int) -> None:
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = bool(ray.cluster_resources().get("GPU")) if config.gpu is None else config.gpu
    threads = config.threads or max(1, (os.cpu_count() or 1) // config.workers)
    # The thread that talks to Ray Train needs no CPU of its own; reserving all of them would leave none for Ray Data.
    resources = {"CPU": min(1, cluster_processors())}
    scaling = ray.train.ScalingConfig(
        num_workers=config.workers, use_gpu=gpu, resources_per_worker={**resources, **({"GPU": 1} if gpu else {})}
    )
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "config": config,
            "identity": identity,
            "threads": threads,
            "output": config.output,
        },
        scaling_config=scaling,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=str(config.output),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )
    steps = -(-videos // (config.videos_per_batch * config.workers)) * config.epochs
    with _progress(config.output / "metrics.jsonl", steps):
        try:
            trainer.fit()
        except Exception as error:
            raise _readable(error) from error


def _readable(error: BaseException) -> BaseException:
    """An InputError that a worker raised reaches the driver wrapped; unwrap it, and leave everything else alone."""
    causes = [error, *getattr(error, "worker_failures", {}).values()]
    for cause in causes:
        current: BaseException | None = cause
        while current is not None:
            if isinstance(current, InputError):
                return InputError(str(current))
            inner = getattr(current, "cause", None)
            current = inner if isinstance(inner, BaseException) and inner is not current else current.__cause__
    return error


class _progress:
    """A progress bar of the steps that the workers write to `metrics.jsonl`."""

    def __init__(self, path: Path, steps: int) -> None:
        from tqdm import tqdm

        self.path = path
        self.bar = tqdm(total=steps, unit="step", desc="pretraining")
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
        if not self.path.exists():
            return
        last = _last_complete_row(self.path)
        if last:
            self.bar.set_postfix(loss=f"{last['loss']:.2f}", epoch=last["epoch"], refresh=False)
            self.bar.update(last["step"] + 1 - self.bar.n)


def _last_complete_row(path: Path) -> dict[str, Any] | None:
    import json

    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")[:-1]  # the last line may be half written
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the first line of the window, cut by the seek
        if "loss" in row:
            return row
    return None


# --- In the workers -----------------------------------------------------------------------------------------------


def _train_worker(arguments: dict[str, Any]) -> None:
    """What every training process runs."""
    import ray.train
    import torch
    from ray.train.torch import prepare_model

    from videoclip.training import ClipEmbedder, epoch_batches, save_checkpoint, spread_batches, train_epoch

    config: PretrainConfig = arguments["config"]
    output: Path = arguments["output"]
    torch.set_num_threads(arguments["threads"])
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    sampler, tokenizer = _open_sampler(config, output, rank, workers)
    rows = sampler.usable_rows()
    if not len(rows):
        raise InputError(f"{config.shards}: no video has captions; run `videoclip extract` with --captions")
    model, optimizer, state = _start_or_continue(config, sampler.shards, tokenizer, output, arguments["identity"])
    embedder = prepare_model(ClipEmbedder(model))
    _move_optimizer(optimizer, model)
    total_steps = config.epochs * -(-len(rows) // (config.videos_per_batch * workers))
    metrics = Metrics(output, state.step) if rank == 0 else None
    batches: list[np.ndarray] = []
    while state.epoch < config.epochs:
        # Dropout is the only draw that is not named by its place in the run.
        torch.manual_seed(int(np.random.default_rng([config.seed, state.epoch, rank]).integers(2**62)))
        extra: dict[str, float] = {"epoch": state.epoch}
        if not batches or state.epoch % config.recluster_every == 0:
            start, number = time.perf_counter(), state.epoch // config.recluster_every
            batches = _cluster(model, sampler, rows, config, number, rank, workers, output)
            extra["cluster_seconds"] = time.perf_counter() - start
        drawn = epoch_batches(sampler, spread_batches(batches, workers), config.seed, state.epoch, rank)
        for step, values in train_epoch(embedder, optimizer, drawn, state, total_steps, config.optimizer):
            if metrics:
                metrics.add(step, {**values, **extra})
            extra.pop("cluster_seconds", None)
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
    checkpoint = latest_checkpoint(output)
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


def _cluster(
    model: Any,
    sampler: Any,
    rows: np.ndarray,
    config: PretrainConfig,
    number: int,
    rank: int,
    workers: int,
    output: Path,
) -> list[np.ndarray]:
    """The batches of the next epochs: every worker embeds a share, the first clusters, all get the same answer.

    The answer is kept on disk, so that a run that is resumed between two clusterings has the same batches.
    """
    import torch.distributed as dist

    from videoclip.retrieval import cluster_videos
    from videoclip.training import embed_videos

    path = output / "batches" / f"clustering-{number:04d}.npz"
    if not path.exists():
        share = np.array_split(rows, workers)[rank]
        needed = config.batches != "random"
        embeddings = embed_videos(model, sampler, share, config.seed, number) if needed else np.zeros((len(share), 1))
        shares: list[Any] = [embeddings]
        if workers > 1:
            shares = [None] * workers
            dist.all_gather_object(shares, embeddings)
        if rank == 0:
            seed = int(np.random.default_rng([config.seed, number]).integers(2**31))
            batches = cluster_videos(np.concatenate(shares), config.videos_per_batch, seed, config.batches)
            _save_batches(path, [rows[batch] for batch in batches])
    if workers > 1:
        dist.barrier()
    with np.load(path) as stored:
        return np.split(stored["rows"], np.cumsum(stored["sizes"])[:-1])


def _save_batches(path: Path, batches: list[np.ndarray]) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, rows=np.concatenate(batches), sizes=np.array([len(batch) for batch in batches]))


def latest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    finished = sorted(path.parent for path in (output / "checkpoints").glob("epoch-*/state.json"))
    return finished[-1] if finished else None


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
