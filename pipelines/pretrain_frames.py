"""Pretraining from shards of frames on one machine: videos, pictures, or both in turn, changed at random.

`videoclip pretrain` trains on shards of tokens, small raw frames among them, on many workers and with clustered
batches; this stage reads JPEG, chooses frames before it decodes them, and mixes two collections as ALPRO and Frozen in
Time were trained: every step is of one of them, each with the same chance.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipelines.figures import Figures
from pipelines.options import with_recipe
from pipelines.runs import Metrics, as_json, refuse_other_run, start_run, with_absolute_paths, writes_output
from videoclip.checkpoints import STATE_FILE, TrainingState, load_checkpoint, save_checkpoint
from videoclip.convert.initialise import initialise
from videoclip.data.frame_shards import FrameShards
from videoclip.data.words import TOKENIZER_FILE, WordTokenizer, train_wordpiece
from videoclip.errors import InputError
from videoclip.files import write_json
from videoclip.parts.frame_pairs import FramePairs, mixed_steps
from videoclip.pretrained import ModelCard, find_folder
from videoclip.recipes import frozen_in_time, recipe_named
from videoclip.training import OptimizerConfig, learning_rate_at, make_optimizer, step

RECIPES = ("frozen-in-time", "alpro")


@dataclass(frozen=True)
class PretrainFramesConfig:
    """Train Frozen in Time or ALPRO on shards of frames, videos and pictures mixed. Run it again to go on."""

    shards: Path
    """Folder that `videoclip extract frames --captions ...` wrote."""
    pictures: Path | None = None
    """A second such folder, for instance of CC3M's pictures: every step is of one of the two, by even chance."""
    output: Path = Path("runs/pretrain-frames")
    """Run folder: the finished model is in its subfolder `model`."""
    recipe: str = "frozen-in-time"
    """frozen-in-time or alpro. The options `--model.*` are those of the recipe."""
    init: str = ""
    """Start from a model of ours, folder or hub id; its tokenizer comes with it."""
    tokenizer: Path | None = None
    """Folder with the tokenizer.json of a BERT; by default a vocabulary is fitted to the captions."""
    vocabulary: int = 8000
    model: frozen_in_time.Options = field(default_factory=frozen_in_time.Options)
    steps: int = 100_000
    batch: int = 32
    """Pairs of a step."""
    max_words: int = 30
    sampler: str = ""
    """How frames are chosen; by default the recipe's own way."""
    augmented: bool = True
    """Frames are changed at random, as in ALPRO's pretraining."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint_steps: int = 1000
    seed: int = 0


def config_of_recipe(name: str) -> type[PretrainFramesConfig]:
    """The options with `--model.*` of a recipe. Raises InputError for one that reads no frames."""
    if name not in RECIPES:
        raise InputError(f"--recipe {name}: pretraining on frames knows {' and '.join(RECIPES)}")
    return with_recipe(PretrainFramesConfig, name)


@writes_output
def pretrain_frames(config: PretrainFramesConfig) -> Figures:
    """Run the stage; returns the figures of the last step.

    Raises InputError if the shards or options cannot be used, or the output folder holds another run.
    """
    config = with_absolute_paths(config)
    if min(config.steps, config.batch - 1, config.checkpoint_steps, config.max_words) < 1:
        raise InputError("--steps, --checkpoint-steps and --max-words must be at least 1 and --batch at least 2")
    folders = [config.shards, *([config.pictures] if config.pictures else [])]
    shards = [FrameShards(folder) for folder in folders]
    if len({of_kind.size for of_kind in shards}) > 1:
        sizes = " and ".join(f"{of_kind.folder} {of_kind.size}" for of_kind in shards)
        raise InputError(f"frames of one size can be mixed; pixels here: {sizes}")
    identity = _identity(config, shards)
    refuse_other_run(config.output, identity)
    if (config.output / "model").exists():
        print(f"{config.output / 'model'} is finished; nothing to do")
        return Figures()
    start_run(config.output, "pretrain-frames", config, identity)
    tokenizer = _tokenizer(config, shards)
    sources = [FramePairs(of_kind, tokenizer, config.max_words) for of_kind in shards]
    torch.manual_seed(config.seed)
    options = replace(config.model, max_words=config.model.max_words or config.max_words)
    model: Any = recipe_named(config.recipe).build(options, shards[0].manifest, tokenizer)
    if config.init:
        initialise(model, config.init)
    figures = _train(config, model, sources, identity)
    model.save_pretrained(config.output / "model", ModelCard(f"{sum(map(len, sources))} captioned videos, pictures"))
    write_json(config.output / "metrics.json", figures)
    return Figures(figures)


def _identity(config: PretrainFramesConfig, shards: list[FrameShards]) -> dict[str, Any]:
    left_out = ("output", "shards", "pictures", "checkpoint_steps")
    values = {name: value for name, value in as_json(config).items() if name not in left_out}
    return {**values, "parts": [[part.digest for part in of_kind.manifest.parts] for of_kind in shards]}


def _tokenizer(config: PretrainFramesConfig, shards: list[FrameShards]) -> WordTokenizer:
    """The run's own, in its subfolder `text`: given, of the model that is started from, or fitted to the captions."""
    folder = config.output / "text"
    if not (folder / TOKENIZER_FILE).exists():
        given = config.tokenizer or (find_folder(config.init) if config.init else None)
        if given is not None:
            tokenizer = WordTokenizer.load(given)
        else:
            texts = (text for of in shards for row in range(len(of)) for text in of.captions(row).text)
            tokenizer = train_wordpiece(texts, config.vocabulary)
        tokenizer.save(folder)
    return WordTokenizer.load(folder)


def _train(
    config: PretrainFramesConfig, model: Any, sources: list[FramePairs], identity: dict[str, Any]
) -> dict[str, float]:
    """All steps that are still to do; the figures of the last."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    optimizer, state = make_optimizer(model, config.optimizer), TrainingState()
    checkpoint = config.output / "checkpoint"
    if (checkpoint / STATE_FILE).exists():
        state = load_checkpoint(checkpoint, model, optimizer, identity)
    metrics, figures = Metrics(config.output, state.step), dict[str, float]()
    drawn = mixed_steps([len(pairs) for pairs in sources], config.batch, config.steps, config.seed)
    grid = model.vision.grid
    progress = tqdm(enumerate(drawn), "pretraining", config.steps, unit="step")
    for number, (source, chosen) in progress:
        if number < state.step:
            continue
        generator = np.random.default_rng([config.seed, 6, number])
        torch.manual_seed(int(generator.integers(2**62)))
        pairs = sources[source]
        frames = model.frames if model.repeats_pictures or pairs.kind == "video" else 1
        sampler = config.sampler or model.training_sampler
        batch = pairs.batch(chosen, frames, sampler, generator, grid, config.augmented).to(device)
        rate = learning_rate_at(number, config.steps, config.optimizer)
        figures = step(model, optimizer, batch, rate, config.optimizer.clip_norm)
        metrics.add(number, {**figures, "pictures": float(pairs.kind == "image")})
        if (number + 1) % config.checkpoint_steps == 0:
            save_checkpoint(checkpoint, model, optimizer, TrainingState(0, number + 1), identity)
    metrics.close()
    model.eval()
    return figures
