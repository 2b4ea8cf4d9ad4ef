"""TeachText on a benchmark: collaborative experts that read several texts teach one that reads one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from pipelines.clip_training import train_to_the_end
from pipelines.figures import Figures
from pipelines.finetune import METRICS, Benchmark, Split, finished_run, note_rejected, read_split, run_identity
from pipelines.runs import start_run, writes_output
from pipelines.stopping import Stop, stopping
from videoclip.checkpoints import TrainingState
from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.data.described_clips import DescribedClips, clip_id, described_clips, draw_epoch, shard_expert
from videoclip.data.shards import Shards
from videoclip.encoders.text import FrozenTextEncoder
from videoclip.errors import InputError
from videoclip.evaluation.similarities import retrieval_figures
from videoclip.files import write_json, write_json_lines
from videoclip.packed import Packed
from videoclip.pretrained import CONFIG_FILE
from videoclip.recipes.experts import Experts, ExpertsConfig
from videoclip.recipes.teachtext import (
    ExpertsSide,
    Options,
    StoredSide,
    TeachText,
    caption_mask,
    caption_ranks,
    learning_rate_at,
    make_optimizer,
    train_on_clips,
)

TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class Network:
    """Of students and teachers alike. Defaults are the release's for MSR-VTT."""

    width: int = 768
    text_clusters: int = 28
    text_ghosts: int = 1
    kind: Literal["ce", "moee"] = "ce"
    """Experts that gate each other, or each for itself."""
    max_words: int = 64


@dataclass(frozen=True)
class Training:
    """RAdam and its schedule, as the release trains."""

    epochs: int = 100
    batch: int = 64
    learning_rate: float = 1e-3
    decay: float = 0.95
    """Of the learning rate, after every epoch."""
    weight_decay: float = 1e-5


@dataclass(frozen=True)
class TeachTextConfig:
    """Train teachers that read several texts, and with them a student that reads the first alone."""

    experts: tuple[str, ...]
    """NAME=FOLDER of shards: the mean of a clip's tokens. NAME=FOLDER:CLUSTERS: their sequence, pooled to clusters."""
    texts: tuple[str, ...]
    """Folders or hub ids of frozen text encoders; the student reads the first. One alone: nobody is taught."""
    train: Path
    """The benchmark's file of described clips for training."""
    test: Path
    benchmark: Benchmark = "youcook2"
    train_part: str = ""
    """Of the file: YouCook2's training or validation, MSR-VTT's train or test; empty: the usual one."""
    test_part: str = ""
    network: Network = field(default_factory=Network)
    teachtext: Options = field(default_factory=Options)
    training: Training = field(default_factory=Training)
    denoise: int = 0
    """Train the student only with captions whose clip is among so many first for the mean teacher; 0: with all."""
    seed: int = 0
    checkpoint_minutes: float = 5
    """Minutes between two checkpoints, from the newest of which the same command goes on; finished teachers are not
    trained again. 0: only when told to stop."""
    output: Path = Path("runs/teachtext")
    """Run folder: the student is in its subfolder `model`, teachers are in `teacher-0` …"""


@writes_output
def teachtext(config: TeachTextConfig) -> Figures:
    """Run the stage; returns figures of the test split for every teacher and for the student, and writes them.

    Raises InputError if files do not fit each other, no clip can be used, or the output holds another run.
    """
    if min(config.training.epochs, config.training.batch - 1, len(config.texts)) < 1:
        raise InputError("--training.epochs must be at least 1, --training.batch at least 2, and a text encoder given")
    sources = [expert_source(text) for text in config.experts]
    if len({name for name, _, _ in sources}) < len(sources) or len(set(config.texts)) < len(config.texts):
        raise InputError("an expert or a text encoder is given twice")
    parts = [part.digest for _, folder, _ in sources for part in Shards(folder).manifest.parts]
    identity = run_identity(config, parts=parts)
    if (finished := finished_run(config.output, identity)) is not None:
        return finished
    folders = Split(config.train, Path(), config.train_part), Split(config.test, Path(), config.test_part)
    annotated = read_split(config.benchmark, folders[0], "train"), read_split(config.benchmark, folders[1], "test")
    start_run(config.output, "teachtext", config, identity)
    clips, rejected = _described(config, sources, annotated[0])
    note_rejected(config.output, rejected)
    test, missing = _described(config, sources, annotated[1])
    figures = Figures({"clips": len(clips), "dropped": len(missing)})
    with stopping(config.output) as stop:
        student = _train_all(config, sources, clips, test, figures, identity, stop)
    student.model.save_pretrained(config.output / "model")
    write_json(config.output / METRICS, figures)
    return figures


def expert_source(text: str) -> tuple[str, Path, int]:
    """NAME=FOLDER or NAME=FOLDER:CLUSTERS -> name, folder, clusters (0: the mean).

    Raises InputError for another form.
    """
    name, equals, rest = text.partition("=")
    folder, colon, clusters = rest.rpartition(":")
    if colon and clusters.isdecimal() and folder:
        rest, number = folder, int(clusters)
    else:
        number = 0
    if not name or not equals or not rest:
        raise InputError(f"--experts {text!r}: expected NAME=FOLDER, or NAME=FOLDER:CLUSTERS for a sequence")
    return name, Path(rest), number


def _described(
    config: TeachTextConfig, sources: Sequence[tuple[str, Path, int]], annotated: Sequence[AnnotatedClip]
) -> tuple[DescribedClips, list[tuple[str, str]]]:
    """Clips with all experts, their sentences read by all text encoders; and those left out, with the reason."""
    experts = {name: shard_expert(Shards(folder), annotated, clusters > 0) for name, folder, clusters in sources}
    by_id = {clip_id(clip): clip for clip in annotated}
    words = {clip: [np.zeros((1, 1), np.float32)] * len(by_id[clip].sentences) for clip in by_id}
    clips, rejected = described_clips(list(by_id), experts, {"sentences": words})
    sentences = [sentence for clip in clips.ids for sentence in by_id[clip].sentences]
    texts = {name: encoded(FrozenTextEncoder(name), sentences, config.network.max_words) for name in config.texts}
    return replace(clips, texts=texts), rejected


def encoded(encoder: FrozenTextEncoder, sentences: Sequence[str], max_words: int) -> Packed:
    """Hidden states of every sentence's words, rows float16 [words, d]."""
    parts = []
    starts = range(0, len(sentences), TEXTS_AT_ONCE)
    for first in tqdm(starts, desc="texts", unit="block", disable=len(starts) < 5):
        ids = encoder.tokenizer.clip_ids(sentences[first : first + TEXTS_AT_ONCE], max_words)
        parts.append(encoder.encode_packed(ids).to("cpu", torch.float16))
    return Packed.together(parts)


def _train_all(
    config: TeachTextConfig,
    sources: Sequence[tuple[str, Path, int]],
    clips: DescribedClips,
    test: DescribedClips,
    figures: Figures,
    identity: Mapping[str, Any],
    stop: Stop,
) -> ExpertsSide:
    """Teachers, if there is more than one text, and then the student; their figures go to `figures`."""
    sides = []
    for number, text in enumerate(config.texts if len(config.texts) > 1 else ()):
        folder = config.output / f"teacher-{number}"
        if (folder / CONFIG_FILE).exists():  # written last: it is finished
            side = ExpertsSide(Experts.from_pretrained(folder), text)
        else:
            side = new_side(config, sources, clips, text, config.seed + 1 + number)
            _train(config, TeachText(side, (), config.teachtext), clips, folder.name, identity, stop)
            side.model.save_pretrained(folder)
        _note(figures, f"teacher {text}", side, test)
        sides.append(StoredSide.of(side, clips))
    mask = None
    if config.denoise and sides:
        mask = caption_mask(caption_ranks(sides, clips), config.denoise)
        _write_mask(config.output, clips, mask)
        figures["captions_kept"] = round(100 * float(mask.mean()), 2)
    student = new_side(config, sources, clips, config.texts[0], config.seed)
    _train(config, TeachText(student, sides, config.teachtext), clips, "student", identity, stop, mask)
    _note(figures, "student", student, test)
    return student


def new_side(
    config: TeachTextConfig, sources: Sequence[tuple[str, Path, int]], clips: DescribedClips, text: str, seed: int
) -> ExpertsSide:
    """A network with first weights of `seed`, of the widths that the clips' experts and texts have."""
    network = config.network
    widths = {name: _width(clips.experts[name]) for name, _, _ in sources}
    clusters = {name: number for name, _, number in sources if number}
    torch.manual_seed(seed)
    shape = ExpertsConfig.of(
        widths,
        _width(clips.texts[text]),
        clusters,
        network.width,
        network.text_clusters,
        network.text_ghosts,
        network.kind == "ce",
    )
    return ExpertsSide(Experts(replace(shape, max_rows=max(network.max_words + 2, shape.max_rows))), text)


def _width(x: torch.Tensor | Packed) -> int:
    return int((x.rows if isinstance(x, Packed) else x).shape[1])


def _train(
    config: TeachTextConfig,
    recipe: TeachText,
    clips: DescribedClips,
    name: str,
    identity: Mapping[str, Any],
    stop: Stop,
    mask: np.ndarray | None = None,
) -> None:
    options, counts = config.training, clips.counts.numpy()
    optimizer = make_optimizer(recipe.student, options.learning_rate, options.weight_decay)
    epochs = [
        draw_epoch(counts, options.batch, np.random.default_rng([config.seed, epoch]), mask)
        for epoch in range(options.epochs)
    ]

    def steps(state: TrainingState) -> Iterator[dict[str, float]]:
        return train_on_clips(
            recipe,
            optimizer,
            clips,
            epochs,
            lambda epoch, _: learning_rate_at(epoch, options.learning_rate, options.decay),
            state=state,
        )

    folder, total = config.output / "training" / name, sum(map(len, epochs))
    train_to_the_end(folder, name, recipe.student, optimizer, steps, total, identity, config.checkpoint_minutes, stop)
    recipe.eval()


def _note(figures: Figures, name: str, side: ExpertsSide, test: DescribedClips) -> None:
    """Add the test split's figures of both directions."""
    stored = StoredSide.of(side, test)
    similarities = stored.similarities(torch.arange(len(test.owners)), torch.arange(len(test)))
    for direction, values in retrieval_figures(similarities.numpy(), test.owners.numpy()).items():
        figures[f"{name}, {direction.replace('_', ' ')}"] = {key: round(value, 2) for key, value in values.items()}


def _write_mask(folder: Path, clips: DescribedClips, mask: np.ndarray) -> None:
    """Which captions of every clip were trained on, in mask.jsonl."""
    kept = np.split(mask, np.cumsum(clips.counts.numpy())[:-1])
    write_json_lines(
        folder / "mask.jsonl", [{"clip": clip, "kept": own.tolist()} for clip, own in zip(clips.ids, kept)]
    )
