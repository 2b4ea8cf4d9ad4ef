"""Stage two: contrastive pretraining on shards by Ray Train, on one worker or on many.

Every epoch the workers embed all training videos, the first of them clusters the embeddings into batches of similar
videos, and all train on those batches with negatives from every worker. An epoch ends with a checkpoint, and within one
there is another every few minutes; a run that was killed, or a worker that died, goes on from the last one and sees the
same batches and clips that it would have. What a step is follows from the options, never from the number of workers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import ray

from pipelines.options import with_recipe
from pipelines.pretrain_batches import BatchPlan
from pipelines.pretrain_worker import Precision, TrainingPlan, train_worker
from pipelines.ray_session import ray_session
from pipelines.ray_training import Workers, train_on_workers
from pipelines.runs import as_json, refuse_other_run, start_run, with_absolute_paths, writes_output
from pipelines.stopping import Stop, stopping
from pipelines.training_progress import TrainingProgress
from videoclip.data.clips import ClipConfig
from videoclip.data.howto100m import read_topics
from videoclip.data.shards import Shards
from videoclip.data.sources import JoinedShards, open_shards
from videoclip.data.words import TOKENIZER_FILE, WordTokenizer, train_wordpiece
from videoclip.encoders.text import FrozenTextEncoder
from videoclip.errors import InputError
from videoclip.evaluation.inputs import load_model_and_shards
from videoclip.files import read_json, read_json_lines
from videoclip.pretrained import find_folder
from videoclip.recipes import recipe_named
from videoclip.recipes import videoclip as videoclip_recipe
from videoclip.retrieval.clustering import Mode, Skip, check_options
from videoclip.retrieval.epochs import BatchOptions
from videoclip.retrieval.false_negatives import FalseNegativeConfig
from videoclip.retrieval.figures import describe_in_words
from videoclip.retrieval.mixing import check_shares
from videoclip.training import OptimizerConfig

VOCABULARY_CAPTIONS = 1_000_000  # evenly spaced; more would not change a vocabulary but fill the memory
# Options that may differ between the parts of a run that was interrupted: they say where it runs, not what it does.
WHERE_IT_RUNS = {
    "output",
    "shards",
    "address",
    "threads",
    "gpu",
    "max_failures",
    "replacement_seconds",
    "verify",
    "topics",
    "workers",
    "pairs_at_once",
    "compile",
    "log_every",
    "checkpoint_minutes",
    "checkpoints_kept",
}


COUNTS = ("epochs", "workers", "batches_per_step", "log_every", "checkpoints_kept", "clips_for_similarity")


@dataclass(frozen=True)
class PretrainConfig:
    """Train VideoCLIP on shards that have captions. Run it again to go on where it stopped."""

    shards: Path | tuple[Path, ...]
    """Folder that `videoclip extract --captions ...` wrote; or several folders of one encoder's tokens."""
    output: Path = Path("runs/pretrain")
    """Run folder: the finished model is in its subfolder `model`."""
    recipe: str = "videoclip"
    """What is trained: a name of the table in videoclip/recipes. The options `--model.*` are those of the recipe."""
    init: str = ""
    """Start from these weights: the folder or hub id of a BERT, or of a model of ours; its tokenizer comes with it."""
    epochs: int = 25
    videos_per_batch: int = 32
    batches: Mode = "cover"
    """How videos are grouped: cover (clusters of similar ones, each once an epoch), random, or paper (Algorithm 1)."""
    clusters_per_batch: int | None = None
    """Of `cover`: a batch is so many clusters from all over the corpus; 1 makes it one, as in the paper. By default
    clusters have four videos: a batch of 32 has 8."""
    similarity: str = "model"
    """What videos are compared by: `model` (as it learns; mean frozen tokens in the first epoch of a new one), `tokens`
    (mean frozen tokens, no model is run), or the folder or hub id of a trained model, a teacher."""
    mix: tuple[float, ...] = ()
    """Of several --shards: the share that each has in an epoch's batches, for instance 0.5 0.3 0.2; a small source goes
    round more often. Without it every video of all is used once an epoch."""
    batch_sources: Literal["one", "mixed"] = "one"
    """Of several --shards: batches of videos of one source each, or mixed, with videos of all by their shares. Similar
    videos are looked for within a source in either case."""
    cluster_ahead: bool = False
    """Make an epoch's batches beside the epoch before, of the model as that began, so that nobody waits for them. For
    corpora so large that clustering takes as long as training."""
    clips_for_similarity: int = 2
    """Clips whose mean embedding stands for a video when videos are compared by a model."""
    skip: Skip = field(default_factory=Skip)
    """Of `cover`: similar videos that are kept out of each other's clusters."""
    faiss_index: str = ""
    """Of `paper`: a Faiss index string such as IVF4096,Flat; by default chosen by size."""
    false_negatives: FalseNegativeConfig = field(default_factory=FalseNegativeConfig)
    topics: Path | None = None
    """HowTo100M_v1.csv, or a JSON object {video_id: topic}: how pure the batches are is reported then."""
    text: str = "wordpiece"
    """`wordpiece`: a vocabulary fitted to the captions and trained; or a frozen encoder's folder or hub id."""
    vocabulary: int = 8000
    """Most entries of that vocabulary."""
    model: videoclip_recipe.Options = field(default_factory=videoclip_recipe.Options)
    clips: ClipConfig = field(default_factory=ClipConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    batches_per_step: int = 1
    """Batches that meet in one step and are each other's negatives: what a step is, whoever computes it."""
    workers: int = 1
    """Training processes, which share every step among them; a run may go on with another number. On GPUs, one each."""
    pairs_at_once: int = 0
    """Most pairs that a worker embeds at a time, to save memory; negatives still come from the whole step. 0: all."""
    precision: Precision = "auto"
    """Of matrix products: bfloat16 (weights stay float32), float32, or auto: bfloat16 on GPUs that have it."""
    compile: bool = False
    """Compile the blocks of the transformer with torch.compile; takes a minute first, and a C++ compiler."""
    log_every: int = 1
    """Steps between two rows of metrics.jsonl. On GPUs 10 or more: each row waits for the GPU."""
    checkpoint_minutes: float = 15
    """Minutes between two checkpoints within an epoch; every epoch ends with one too. 0: only these."""
    checkpoints_kept: int = 2
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


def config_of_recipe(name: str) -> type[PretrainConfig]:
    """`PretrainConfig` whose `--model.*` are the options of a recipe. Raises InputError for an unknown name."""
    return with_recipe(PretrainConfig, name)


@writes_output
def pretrain(config: PretrainConfig) -> PretrainResult:
    """Run the stage.

    Raises InputError if the shards or options cannot be used, or if the output folder holds another run.
    """
    config = _with_limits(with_absolute_paths(config))
    _check_options(config)
    shards = open_shards(config.shards, verify=config.verify)
    identity = _identity(config, shards)
    refuse_other_run(config.output, identity)
    finished = config.output / "model" / "config.json"
    if finished.exists():
        print(f"{config.output / 'model'} is finished; nothing to do")
        return _result(config.output)
    start_run(config.output, "pretrain", config, identity)
    with stopping(config.output) as stop:
        _prepare_tokenizer(config, shards)
        with ray_session(config.address):
            _fit(config, identity, len(shards), stop)
    figures = read_json(max((config.output / "batches").glob("clustering-*.json")))
    print(f"last batches: {describe_in_words(figures)}")
    print(f"model in {config.output / 'model'}, metrics in {config.output / 'metrics.jsonl'}")
    return _result(config.output)


def _with_limits(config: PretrainConfig) -> PretrainConfig:
    """The same as a plain `PretrainConfig`, with what the recipe's options leave to the others filled in."""
    options = config.model
    known = {item.name for item in fields(options)}
    text = str(Path(config.text).resolve()) if Path(config.text).is_dir() else config.text
    filled: dict[str, Any] = {
        "max_seconds": getattr(options, "max_seconds", 0) or config.clips.max_seconds,
        "max_words": getattr(options, "max_words", 0) or config.clips.max_words,
        "text_encoder": "" if text == "wordpiece" else text,
        "encoder": getattr(options, "encoder", "") or str(first_of(config.shards)),
    }
    options = replace(options, **{name: value for name, value in filled.items() if name in known})
    values = {item.name: getattr(config, item.name) for item in fields(PretrainConfig)}
    init = str(Path(config.init).resolve()) if config.init and Path(config.init).is_dir() else config.init
    resolved = {"model": options, "text": text, "init": init}
    if Path(config.similarity).is_dir():
        resolved["similarity"] = str(Path(config.similarity).resolve())
    return PretrainConfig(**{**values, **resolved})


def _check_options(config: PretrainConfig) -> None:
    grouping = BatchOptions(config.videos_per_batch, config.batches, config.clusters_per_batch)
    check_options(config.videos_per_batch, config.batches, config.clusters_per_batch)
    folders = 1 if isinstance(config.shards, Path) else len(config.shards)
    check_shares(config.mix, folders, config.batch_sources == "mixed", grouping)
    for name in COUNTS:
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if config.similarity not in ("model", "tokens"):
        load_model_and_shards(
            Path(config.similarity), first_of(config.shards)
        )  # a teacher of these tokens, or else an error
    if config.pairs_at_once < 0 or not 0 <= config.checkpoint_minutes < math.inf:
        raise InputError("--pairs-at-once and --checkpoint-minutes cannot be negative")
    if config.precision not in get_args(Precision):
        raise InputError(f"--precision must be one of {', '.join(get_args(Precision))}, not {config.precision!r}")
    if config.max_failures < 0 or config.replacement_seconds < 1:
        raise InputError("--max-failures cannot be negative, and --replacement-seconds must be at least 1")
    for name in ("max_seconds", "max_words"):
        limit, of_clips = getattr(config.model, name, None), getattr(config.clips, name)
        if limit is not None and limit < of_clips:
            flag = name.replace("_", "-")
            raise InputError(f"--model.{flag} {limit} is less than the {of_clips} of --clips.{flag}")
    if config.topics is not None:
        read_topics(config.topics)  # to fail now rather than in a worker


def _result(folder: Path) -> PretrainResult:
    rows = read_json_lines(folder / "metrics.jsonl")
    return PretrainResult(folder / "model", sum(row.get("batch_seconds", 0.0) for row in rows))


def first_of(shards: Path | tuple[Path, ...]) -> Path:
    """The first folder, whose encoder is that of all."""
    return shards if isinstance(shards, Path) else shards[0]


def _identity(config: PretrainConfig, shards: Shards) -> dict[str, Any]:
    """What makes two runs the same: everything but where they run."""
    values = {name: value for name, value in as_json(config).items() if name not in WHERE_IT_RUNS}
    values["parts"] = [part.digest for part in shards.manifest.parts]
    if isinstance(shards, JoinedShards):
        return {**values, "source_rows": shards.source_rows.tolist()}
    return {name: value for name, value in values.items() if name not in ("mix", "batch_sources")}


def _prepare_tokenizer(config: PretrainConfig, shards: Shards) -> None:
    """Fit or fetch the tokenizer once, before any worker needs it, into `output/text`."""
    folder = config.output / "text"
    if (folder / TOKENIZER_FILE).exists():
        return
    own = getattr(recipe_named(config.recipe), "tokenizer_of", None)  # of recipes around frozen text sides
    if own is not None:
        own(config.model).save(folder)
        return
    if config.text != "wordpiece":
        FrozenTextEncoder(config.text).tokenizer.save(folder)
        return
    if config.init:
        WordTokenizer.load(find_folder(config.init)).save(folder)
        return
    tokenizer = train_wordpiece(_captions(shards), config.vocabulary)
    if tokenizer.vocabulary <= 5:
        raise InputError(f"{config.shards}: holds no captions to train on; run `videoclip extract` with --captions")
    tokenizer.save(folder)


def _captions(shards: Shards) -> Iterator[str]:
    """All captions, or evenly spaced ones of very many."""
    step = max(1, sum(len(part.caption_text) for part in shards.parts) // VOCABULARY_CAPTIONS)
    for part in shards.parts:
        yield from part.caption_text.take(np.arange(0, len(part.caption_text), step)).to_pylist()


def _fit(config: PretrainConfig, identity: dict[str, Any], videos: int, stop: Stop) -> None:
    gpu = bool(ray.cluster_resources().get("GPU")) if config.gpu is None else config.gpu
    batches = BatchPlan(
        BatchOptions(
            config.videos_per_batch,
            config.batches,
            config.clusters_per_batch,
            config.skip,
            faiss_index=config.faiss_index,
            duplicate_similarity=config.false_negatives.duplicate_similarity,
        ),
        config.similarity,
        config.clips_for_similarity,
        not config.init,
        config.topics,
        config.seed,
        config.cluster_ahead,
        config.mix,
        config.batch_sources == "mixed",
    )
    plan = TrainingPlan(
        shards=config.shards,
        output=config.output,
        recipe=config.recipe,
        options=config.model,
        init=config.init,
        clips=config.clips,
        batches=batches,
        false_negatives=config.false_negatives,
        optimizer=config.optimizer,
        epochs=config.epochs,
        seed=config.seed,
        threads=config.threads or max(1, (os.cpu_count() or 1) // config.workers),
        identity=identity,
        batches_per_step=config.batches_per_step,
        pairs_at_once=config.pairs_at_once,
        precision=config.precision,
        compile=config.compile,
        log_every=config.log_every,
        checkpoint_minutes=config.checkpoint_minutes,
        checkpoints_kept=config.checkpoints_kept,
    )
    workers = Workers(config.workers, gpu, config.max_failures, config.replacement_seconds)
    steps = -(-videos // (config.videos_per_batch * config.batches_per_step)) * config.epochs
    with stop.by_checkpoint(), TrainingProgress(config.output, steps):
        train_on_workers(train_worker, {"plan": plan}, workers, config.output, stop.watch)
