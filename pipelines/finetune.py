"""Fine-tuning on a benchmark's described clips: a pretrained model, alone or taught by others (TeachText)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.clip_training import train_to_the_end
from pipelines.figures import Figures
from pipelines.runs import Quarantine, as_json, refuse_other_run, start_run, writes_output
from pipelines.stopping import Stop, stopping
from videoclip.checkpoints import WEIGHTS_FILE, TrainingState
from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.data.clips import ClipBatch
from videoclip.data.described_clips import DescribedBatch, DescribedClips, clips_and_words, draw_epoch
from videoclip.data.didemo import read_didemo
from videoclip.data.expert_features import Teacher, read_teacher
from videoclip.data.msrvtt import read_msrvtt
from videoclip.data.shards import Shards
from videoclip.data.youcook2 import read_youcook2
from videoclip.errors import InputError
from videoclip.evaluation.inputs import is_frozen, load_model_and_shards
from videoclip.evaluation.retrieval import retrieve_clips
from videoclip.files import read_json, sha256, write_json
from videoclip.packed import Packed
from videoclip.pretrained import ModelCard
from videoclip.recipes.teachtext import Options, Side, StoredSide, TeachText, TowersSide, train_on_clips
from videoclip.recipes.videoclip import Recipe
from videoclip.training import OptimizerConfig, learning_rate_at, make_optimizer

Benchmark = Literal["youcook2", "msrvtt", "didemo"]
METRICS = "metrics.json"  # in a run folder, written last


@dataclass(frozen=True)
class Split:
    """Described clips of one benchmark: its file, which part of it, and the shards with the videos."""

    annotations: Path
    shards: Path
    part: str = ""
    """Of the file: YouCook2's training or validation, MSR-VTT's train or test; empty: the usual one."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a model on a benchmark's training split and say what it was worth: R@K before and after."""

    model: Path
    """Folder of a trained model."""
    train: Split
    test: Split
    benchmark: Benchmark = "youcook2"
    """Whose files they are."""
    loss: Literal["own", "ranking"] = "own"
    """The loss that the model was made with, or TeachText's ranking loss; teachers imply the latter."""
    teachers: tuple[Path, ...] = ()
    """Folders of trained models, or pickles of stored teachers as TeachText's release has them, by clip."""
    teachtext: Options = field(default_factory=Options)
    epochs: int = 10
    batch: int = 64
    """Clips in a batch, each with one of its sentences."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5, warmup_steps=20))
    seed: int = 0
    checkpoint_minutes: float = 5
    """Minutes between two checkpoints, from the newest of which the same command goes on. 0: only when told to stop."""
    output: Path = Path("runs/finetune")
    """Run folder: the model is in its subfolder `model`."""


@writes_output
def finetune(config: FinetuneConfig) -> Figures:
    """Run the stage; returns R@K and ranks of the test split before and after, which it writes to metrics.json.

    Raises InputError if files do not fit each other, a teacher does not know a clip, or the output holds another run.
    """
    if min(config.epochs, config.batch - 1) < 1:
        raise InputError("--epochs must be at least 1 and --batch at least 2")
    if is_frozen(config.model):
        raise InputError("--model frozen has nothing to train; `videoclip pretrain --recipe towers` adds to it")
    model, shards = load_model_and_shards(config.model, config.train.shards)
    digests = [part.digest for part in shards.manifest.parts]
    identity = run_identity(config, weights=sha256(config.model / WEIGHTS_FILE), parts=digests)
    if (finished := finished_run(config.output, identity)) is not None:
        return finished
    test_shards = Shards(config.test.shards)
    tested = read_split(config.benchmark, config.test, "test")
    trained_on = read_split(config.benchmark, config.train, "train")
    start_run(config.output, "finetune", config, identity)
    before, _ = retrieve_clips(model, test_shards, tested)
    clips, rejected = clips_and_words(
        shards, trained_on, model.tokenizer(), model.config.max_seconds, model.config.max_words
    )
    note_rejected(config.output, rejected)
    clips, teachers = _teachers(config, shards, trained_on, clips)
    with stopping(config.output) as stop:
        _train(config, model, clips, teachers, identity, stop)
    after, _ = retrieve_clips(model.eval(), test_shards, tested)
    model.save_pretrained(config.output / "model", ModelCard(f"fine-tuned on {config.benchmark}"))
    figures = Figures({"clips": len(clips), "dropped": len(rejected)})
    for name, metrics in (("before", before), ("after", after)):
        figures[f"{name}, video to text"] = metrics.pop("video_to_text")
        figures[name] = metrics
    write_json(config.output / METRICS, figures)
    return figures


def run_identity(config: Any, **digests: object) -> dict[str, Any]:
    """What makes two runs the same: everything but where they write and how often they leave checkpoints."""
    values = {name: value for name, value in as_json(config).items() if name not in ("output", "checkpoint_minutes")}
    return {**values, **digests}


def finished_run(output: Path, identity: Mapping[str, Any]) -> Figures | None:
    """The figures of this run where it has come to its end; None where there is something to do.

    Raises InputError if the folder holds another run.
    """
    refuse_other_run(output, identity)
    if not (output / METRICS).exists():
        return None
    print(f"{output / 'model'} is finished; nothing to do")
    return Figures(read_json(output / METRICS))


def read_split(benchmark: Benchmark, split: Split, role: Literal["train", "test"]) -> list[AnnotatedClip]:
    """The described clips of a benchmark's file."""
    readers: dict[str, Callable[[], list[AnnotatedClip]]] = {
        "youcook2": lambda: read_youcook2(
            split.annotations, split.part or {"train": "training", "test": "validation"}[role]
        ),
        "msrvtt": lambda: read_msrvtt(split.annotations, split.part or role),
        "didemo": lambda: read_didemo(split.annotations),
    }
    return readers[benchmark]()


def note_rejected(folder: Path, rejected: Sequence[tuple[str, str]]) -> None:
    """Write what was left out, and why, to the quarantine list; say how much it is."""
    quarantine = Quarantine(folder)
    for name, reason in rejected:
        quarantine.add(name, reason, "clip")
    quarantine.save()
    if rejected:
        print(f"{len(rejected)} clips left out: {quarantine.summary()}")


def _teachers(
    config: FinetuneConfig, shards: Shards, annotated: list[AnnotatedClip], clips: DescribedClips
) -> tuple[DescribedClips, list[Side]]:
    """Teachers, and the clips with what they look at added: words cut by their tokenizers, tokens as long as they like.

    Raises InputError if a teacher reads tokens of another encoder, or has stored nothing for a clip.
    """
    experts, texts, sides = dict(clips.experts), dict(clips.texts), list[Side]()
    for number, path in enumerate(config.teachers):
        if path.is_file():
            sides.append(stored_teacher(path, read_teacher(path), clips))
            continue
        model, _ = load_model_and_shards(path, shards.folder)
        limits = model.config.max_seconds, model.config.max_words
        seen, _ = clips_and_words(shards, annotated, model.tokenizer(), *limits)
        experts[f"tokens of teacher {number}"], texts[f"words of teacher {number}"] = (
            seen.experts["tokens"],
            seen.texts["words"],
        )
        sides.append(TowersSide(model, f"tokens of teacher {number}", f"words of teacher {number}"))
    return DescribedClips(clips.ids, experts, clips.present, texts, clips.counts), sides


def stored_teacher(path: Path, stored: dict[str, Teacher], clips: DescribedClips) -> StoredSide:
    """A teacher's embeddings in the order of `clips`.

    Raises InputError, naming the clip, if it has none for one, or for another number of captions.
    """
    counts = clips.counts.tolist()
    for name, count in zip(clips.ids, counts):
        if name not in stored:
            raise InputError(f"{path}: this teacher has stored nothing for {name!r}; is it of other videos?")
        if len(stored[name].texts) != count:
            raise InputError(f"{path}: {name!r} has {count} captions, but the teacher {len(stored[name].texts)}")
    chosen = [stored[name] for name in clips.ids]
    if len({teacher.clip.shape for teacher in chosen}) > 1:
        raise InputError(f"{path}: embeddings of different widths")
    return StoredSide(
        torch.from_numpy(np.stack([teacher.clip for teacher in chosen])),
        torch.from_numpy(np.concatenate([teacher.texts for teacher in chosen])),
    )


class _Own(nn.Module):
    """A model's own loss on described clips: its recipe's, each clip with the sentence that was drawn."""

    def __init__(self, model: Recipe) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: DescribedBatch) -> dict[str, Tensor]:
        """What the recipe returns."""
        tokens = batch.experts["tokens"]
        assert isinstance(tokens, Packed)
        outputs: dict[str, Tensor] = self.model(ClipBatch(tokens, batch.texts["words"], batch.rows))
        return outputs


def _train(
    config: FinetuneConfig,
    model: Recipe,
    clips: DescribedClips,
    teachers: list[Side],
    identity: Mapping[str, Any],
    stop: Stop,
) -> None:
    recipe: nn.Module = _Own(model)
    if teachers or config.loss == "ranking":
        recipe = TeachText(TowersSide(model, "tokens", "words"), teachers, config.teachtext)
    torch.manual_seed(config.seed)  # dropout; all else is drawn from generators of its own
    optimizer = make_optimizer(model, config.optimizer)
    draws = [
        draw_epoch(clips.counts.numpy(), config.batch, np.random.default_rng([config.seed, epoch]))
        for epoch in range(config.epochs)
    ]
    total = sum(map(len, draws))

    def steps(state: TrainingState) -> Iterator[dict[str, float]]:
        return train_on_clips(
            recipe,
            optimizer,
            clips,
            draws,
            lambda _, number: learning_rate_at(number, total, config.optimizer),
            config.optimizer.clip_norm,
            state,
        )

    train_to_the_end(
        config.output, "fine-tuning", model, optimizer, steps, total, identity, config.checkpoint_minutes, stop
    )
