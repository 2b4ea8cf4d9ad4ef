"""Fine-tuning for open questions: a pretrained ALPRO learns to choose from frequent answers (MSR-VTT-QA, MSVD-QA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pipelines.figures import Figures
from pipelines.runs import Metrics, start_run, with_absolute_paths, writes_output
from videoclip.convert.alpro import for_questions
from videoclip.data.augmentation import augment_video
from videoclip.data.frame_shards import FrameShards
from videoclip.data.frames import FrameBatch
from videoclip.data.questions import OpenQuestion, frequent_answers, read_answers, read_questions
from videoclip.errors import InputError
from videoclip.evaluation.frames import answer_open_questions, check_size, load_frame_model
from videoclip.files import write_json, write_json_lines
from videoclip.losses import IGNORED
from videoclip.parts.fused_towers import FusedTowers
from videoclip.pretrained import ModelCard
from videoclip.training import OptimizerConfig, learning_rate_at, make_optimizer, step


@dataclass(frozen=True)
class QuestionsConfig:
    """Fine-tune a pretrained ALPRO to answer questions about videos: top-1 accuracy, by kind of question too."""

    model: Path
    """Folder of an ALPRO: pretrained here, converted (`videoclip convert alpro`), or fine-tuned before."""
    shards: Path
    """Folder that `videoclip extract frames` wrote, with the videos of both files."""
    train: Path
    """train.jsonl: a question, an answer, a video_id and an answer_type a line."""
    test: Path
    """test.jsonl, or val.jsonl."""
    answers: Path | None = None
    """train_ans2label.json, {answer: number}; by default the most frequent answers of the training questions."""
    most_answers: int = 1500
    """How many of these: 1500 for MSR-VTT, 2423 for MSVD."""
    frames: int = 16
    """Of a clip; time embeddings are stretched to so many."""
    sampler: str = "random"
    """How frames are chosen in training, as in the release; in the test they are evenly spaced."""
    augmented: bool = True
    """Frames are changed at random, as in the release."""
    epochs: int = 10
    batch: int = 32
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(5e-5, (0.9, 0.98), warmup_steps=1000, clip_norm=5.0)
    )
    seed: int = 0
    output: Path = Path("runs/questions")
    """Run folder: the model is in its subfolder `model`."""


@writes_output
def finetune_questions(config: QuestionsConfig) -> Figures:
    """Run the stage; returns the figures of the test questions, which it writes to metrics.json.

    Raises InputError if files do not fit each other, or no training question has one of the answers.
    """
    config = with_absolute_paths(config)
    if min(config.epochs, config.batch, config.frames, config.most_answers) < 1:
        raise InputError("--epochs, --batch, --frames and --most-answers must be at least 1")
    if (config.output / "model").exists():
        raise InputError(f"{config.output / 'model'}: a model is there already; choose another --output")
    shards = FrameShards(config.shards)
    asked, tested = read_questions(config.train), read_questions(config.test)
    answers = read_answers(config.answers) if config.answers else frequent_answers(asked, config.most_answers)
    known = [question for question in asked if question.video_id in set(shards.video_ids())]
    if not any(question.answer in answers for question in known):
        raise InputError(f"{config.train}: no question about a video in {shards.folder} has one of the answers")
    torch.manual_seed(config.seed)
    source = load_frame_model(config.model)
    if not isinstance(source, FusedTowers):
        raise InputError(f"{config.model}: a {source.recipe}, which cannot answer questions; give an ALPRO")
    check_size(source, shards)
    model = for_questions(source, sorted(answers, key=answers.__getitem__), config.frames)
    start_run(config.output, "finetune-questions", config)
    _train(config, model, shards, known, answers)
    metrics, given = answer_open_questions(model, shards, tested)
    metrics |= {"answers": len(answers), "trained_on": len(known)}
    model.save_pretrained(config.output / "model", ModelCard(f"fine-tuned on {len(known)} questions"))
    write_json_lines(config.output / "predictions.jsonl", given)
    write_json(config.output / "metrics.json", metrics)
    return Figures(metrics)


def _train(
    config: QuestionsConfig,
    model: FusedTowers,
    shards: FrameShards,
    questions: Sequence[OpenQuestion],
    answers: dict[str, int],
) -> None:
    rows = {name: row for row, name in enumerate(shards.video_ids())}
    words = model.tokenizer().clip_ids([question.question for question in questions], model.config.max_words)
    labels = torch.tensor([answers.get(question.answer, IGNORED) for question in questions])
    device = next(model.parameters()).device
    optimizer = make_optimizer(model.train(), config.optimizer)
    metrics = Metrics(config.output, 0)
    total = config.epochs * -(-len(questions) // config.batch)
    progress = tqdm(total=total, desc="fine-tuning", unit="step")
    for epoch in range(config.epochs):
        generator = np.random.default_rng([config.seed, epoch])
        order = generator.permutation(len(questions))
        for chosen in np.array_split(order, -(-len(order) // config.batch)):
            clips = [
                shards.clip(rows[questions[number].video_id], config.frames, config.sampler, generator)
                for number in chosen.tolist()
            ]
            clips = [augment_video(clip, generator) for clip in clips] if config.augmented else clips
            picked = torch.from_numpy(chosen)
            batch = FrameBatch(
                torch.from_numpy(np.stack(clips)), words.take(picked).to("cpu", torch.int64), answers=labels[picked]
            )
            rate = learning_rate_at(progress.n, total, config.optimizer)
            figures = step(model, optimizer, batch.to(device), rate, config.optimizer.clip_norm)
            metrics.add(progress.n, {**figures, "epoch": epoch})
            progress.update()
    progress.close()
    metrics.close()
    model.eval()
