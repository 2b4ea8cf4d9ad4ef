"""`videoclip prompt`: prompts and a temporal transformer around a frozen dual encoder, trained on named actions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.clip_training import train_to_the_end
from pipelines.evaluate_recognition import class_words, read_listed
from pipelines.figures import Figures
from pipelines.finetune import METRICS, finished_run, run_identity
from pipelines.runs import start_run, writes_output
from pipelines.stopping import Stop, stopping
from videoclip.checkpoints import TrainingState
from videoclip.data.action_clips import (
    ListedVideo,
    read_class_names,
    read_class_splits,
    read_few_shot,
    read_split,
)
from videoclip.data.shards import Shards
from videoclip.errors import InputError
from videoclip.evaluation.recognition import (
    ListedClips,
    RecognitionConfig,
    class_probabilities,
    draw_batch,
    few_shot_metrics,
    recognition_metrics,
)
from videoclip.files import write_json
from videoclip.packed import Packed
from videoclip.recipes.prompting import Options, Recipe, build, tokenizer_of
from videoclip.training import OptimizerConfig, make_optimizer, step


@dataclass(frozen=True)
class PromptConfig:
    """Train prompts on named actions: a closed set, few shots of it, or an open set. Top-1 and top-5 beside chance."""

    shards: Path
    """Folder of shards with the videos' frames, a row a frame; `convert features` makes them of .npy arrays."""
    classes: Path
    """All classes, one name a line (HMDB51_action.list)."""
    train: Path
    """Videos and their classes, class/video a line (train_split01.txt); or a folder of few-shot splits
    (train/split_0.list, …, and perhaps test/split_0.list, …), each of which is trained from anew."""
    test: Path | None = None
    """The same of the test split; few-shot folders with lists of their own need none."""
    names: Path | None = None
    """What each class is called in a text (HMDB51_clsname.json); without it its own name, _ read as a blank."""
    open_set: Path | None = None
    """Folder of splits of the classes (train/split_0.list, … and test/split_0.list, …): trained on the one side,
    tested with videos of the other, among its classes alone."""
    model: Options = field(default_factory=Options)
    steps: int = 1100
    batch: int = 64
    learning_rate: float = 1e-4
    """Of AdamW, the same in every step, as the release's is to four digits."""
    weight_decay: float = 0.01
    """Of prompts and positions too."""
    classes_a_step: int = 400
    """Most classes that a batch is compared with: its own and others at random."""
    passes: int = 5
    """Random samples of every test video, as the release validates; 0: one, evenly spaced."""
    seed: int = 0
    checkpoint_minutes: float = 5
    """Minutes between two checkpoints, from the newest of which the same command goes on. 0: only when told to stop."""
    output: Path = Path("runs/prompting")
    """Run folder: the model is in its subfolder `model`, of several splits in `split-0/model` …"""


@dataclass(frozen=True)
class Split:
    """What one model is trained and tested on, and among which classes."""

    train: Sequence[ListedVideo]
    test: Sequence[ListedVideo]
    train_classes: Sequence[str]
    test_classes: Sequence[str]


@writes_output
def prompt(config: PromptConfig) -> Figures:
    """Run the stage; returns top-1 and top-5, of several splits their mean, which it writes to metrics.json.

    Raises InputError if files do not fit each other, a name does not fit the text side, or the output holds another
    run.
    """
    if min(config.steps, config.batch, config.classes_a_step - 1) < 1:
        raise InputError("--steps and --batch must be at least 1, --classes-a-step at least 2")
    shards = Shards(config.shards)
    identity = run_identity(config, parts=[part.digest for part in shards.manifest.parts])
    if (finished := finished_run(config.output, identity)) is not None:
        return finished
    splits = read_splits(config)
    torch.manual_seed(config.seed)
    fresh = build(config.model, shards.manifest, tokenizer_of(config.model))
    untrained = {name: value.clone() for name, value in fresh.state_dict().items()}
    several, results = len(splits) > 1, []
    class_words(fresh, read_class_names(config.classes), config.names)  # refused now rather than at the last split
    start_run(config.output, "prompt", config, identity)
    for number, split in enumerate(splits):
        folder = config.output / f"split-{number}" if several else config.output
        fresh.load_state_dict(untrained)
        results.append(_one_split(config, fresh, shards, split, folder, identity))
    figures = Figures(results[0])
    if several:
        means = few_shot_metrics([result["top1"] for result in results])
        figures = Figures({**means, "chance": float(np.mean([result["chance"] for result in results]))})
    write_json(config.output / METRICS, figures)
    return figures


def read_splits(config: PromptConfig) -> list[Split]:
    """What the options ask to be trained and tested. Raises InputError if a list is missing, or a side is empty."""
    classes = read_class_names(config.classes)
    test = None if config.test is None else read_split(config.test)
    if config.train.is_dir():
        if config.open_set is not None:
            raise InputError("--open-set splits classes, a few-shot folder splits videos: give one of them")
        pairs = [(train, own if own is not None else test) for train, own in read_few_shot(config.train)]
    else:
        pairs = [(read_split(config.train), test)]
    splits = []
    for train, tested in pairs:
        if tested is None:
            raise InputError("name the test videos: --test LIST")
        if config.open_set is None:
            shown = {video.class_name for video in train} if config.train.is_dir() else set(classes)
            few = [name for name in classes if name in shown]  # the 5 of a 5-way split, or all
            splits.append(Split(train, tested, few, few))
            continue
        for train_classes, test_classes in read_class_splits(config.open_set):
            seen, unseen = _of_classes(train, train_classes), _of_classes(tested, test_classes)
            if not seen or not unseen:
                raise InputError(f"{config.open_set}: a split whose classes have no video on one side")
            splits.append(Split(seen, unseen, train_classes, test_classes))
    return splits


def _of_classes(videos: Sequence[ListedVideo], classes: Sequence[str]) -> list[ListedVideo]:
    return [video for video in videos if video.class_name in classes]


def _one_split(
    config: PromptConfig, model: Recipe, shards: Shards, split: Split, folder: Path, identity: Mapping[str, Any]
) -> dict[str, float]:
    """Train `model`, save it, and test it."""
    train = read_listed(model, shards, split.train, split.train_classes, config.train)
    test = read_listed(model, shards, split.test, split.test_classes, config.test or config.train)
    names = class_words(model, split.train_classes, config.names)
    with stopping(config.output) as stop:
        _train(config, model, train, names, folder, identity, stop)
    model.save_pretrained(folder / "model")
    sampling = RecognitionConfig(model.config.frames, config.passes, config.seed)
    asked = class_words(model, split.test_classes, config.names)
    return recognition_metrics(class_probabilities(model, test.features, asked, sampling), test.labels)


def _train(
    config: PromptConfig,
    model: Recipe,
    clips: ListedClips,
    names: Packed,
    folder: Path,
    identity: Mapping[str, Any],
    stop: Stop,
) -> None:
    # The frozen towers are in no checkpoint: what is trained alone goes there.
    trained = torch.nn.ModuleDict({"prompts": model.prompts, "temporal": model.temporal})
    rate = config.learning_rate
    optimizer = make_optimizer(trained, OptimizerConfig(rate, (0.9, 0.999), weight_decay=config.weight_decay))

    def steps(state: TrainingState) -> Iterator[dict[str, float]]:
        model.train()
        while state.step < config.steps:
            generator = np.random.default_rng([config.seed, 1, state.step])
            batch = draw_batch(clips, names, config.batch, model.config.frames, generator, config.classes_a_step)
            figures = step(model, optimizer, batch, rate, float("inf"))
            state.step, state.place = state.step + 1, state.place + 1
            yield figures

    train_to_the_end(
        folder, "prompts", trained, optimizer, steps, config.steps, identity, config.checkpoint_minutes, stop
    )
    model.eval()
