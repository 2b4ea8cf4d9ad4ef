"""Stage two: contrastive pretraining on shards by Ray Train, on one worker or on many.

Every epoch the workers embed all training videos, the first of them clusters the embeddings into batches of similar
videos, and all train on those batches with negatives from every worker. An epoch ends with a checkpoint; a run that
was killed, or a worker that died, goes on from the last one and sees the same batches and clips that it would have.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.pretrain_worker import train_worker
from pipelines.ray_session import ray_session
from pipelines.ray_training import Workers, train_on_workers
from pipelines.runs import as_json, start_run, with_absolute_paths
from videoclip.data.clips import ClipConfig
from videoclip.errors import InputError
from videoclip.files import read_json_lines
from videoclip.retrieval.false_negatives import FalseNegativeConfig
from videoclip.training import OptimizerConfig

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
    hardness: tuple[float, ...] = (1.0,)
    """Of `cover`: 0 random, 1 as similar as possible. Several values are a schedule, spread evenly over the run."""
    faiss_index: str = ""
    """Of `paper`: a Faiss index string such as IVF4096,Flat; by default chosen by size."""
    recluster_every: int = 1
    """Epochs between two clusterings."""
    cluster_ahead: bool = False
    """Make the next clustering beside training, on a spare CPU, from embeddings that are one clustering older."""
    false_negatives: FalseNegativeConfig = field(default_factory=FalseNegativeConfig)
    topics: Path | None = None
    """HowTo100M_v1.csv, or a JSON object {video_id: topic}: how pure the batches are is reported then."""
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
    replacement_seconds: int = 600
    """How long a run that lost a machine waits for another one before it gives up."""
    verify: bool = True
    """Check the shards' checksums first. Turn off for terabytes that were checked before."""
    address: str | None = None
    """Ray cluster to join; without it Ray runs on this machine."""


@dataclass(frozen=True)
class PretrainResult:
    """Where the model is, and how many seconds of the whole went into finding batches."""

    model: Path
    cluster_seconds: float


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Run the stage.

    Raises InputError if the shards or options cannot be used, or if the output folder holds another run.
    """
    from videoclip.data.shards import Shards

    config = with_absolute_paths(config)
    _check_options(config)
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
    _print_batches(config.output)
    print(f"model in {config.output / 'model'}, metrics in {config.output / 'metrics.jsonl'}")
    return _result(config.output)


def _print_batches(folder: Path) -> None:
    """One line on the last clustering; every clustering's figures are in the metrics and in `batches/`."""
    from videoclip.files import read_json
    from videoclip.retrieval.figures import describe_in_words

    figures = read_json(max((folder / "batches").glob("clustering-*.json")))
    print(f"last batches: {describe_in_words(figures)}")


def _check_options(config: PretrainConfig) -> None:
    from videoclip.data.howto100m import read_topics
    from videoclip.retrieval.clustering import check_options

    if not config.hardness:
        raise InputError("--hardness needs at least one number between 0 and 1")
    for value in config.hardness:
        check_options(config.videos_per_batch, config.batches, value)
    if min(config.epochs, config.recluster_every, config.workers) < 1:
        raise InputError("--epochs, --recluster-every and --workers must be at least 1")
    if config.max_failures < 0 or config.replacement_seconds < 1:
        raise InputError("--max-failures cannot be negative, and --replacement-seconds must be at least 1")
    if config.topics is not None:
        read_topics(config.topics)  # to fail now rather than in a worker


def _result(folder: Path) -> PretrainResult:
    rows = read_json_lines(folder / "metrics.jsonl")
    return PretrainResult(folder / "model", sum(row.get("batch_seconds", 0.0) for row in rows))


def _identity(config: PretrainConfig, parts: list[str]) -> dict[str, Any]:
    """What makes two runs the same: everything but where they run."""
    values = as_json(config)
    for name in (
        "output",
        "shards",
        "address",
        "threads",
        "gpu",
        "max_failures",
        "replacement_seconds",
        "verify",
        "topics",
    ):
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

    gpu = bool(ray.cluster_resources().get("GPU")) if config.gpu is None else config.gpu
    threads = config.threads or max(1, (os.cpu_count() or 1) // config.workers)
    steps = -(-videos // (config.videos_per_batch * config.workers)) * config.epochs
    with _progress(config.output / "metrics.jsonl", steps):
        arguments = {"config": config, "identity": identity, "threads": threads}
        workers = Workers(config.workers, gpu, config.max_failures, config.replacement_seconds)
        train_on_workers(train_worker, arguments, workers, config.output)


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
