"""Open questions about videos (MSR-VTT-QA, MSVD-QA), answered from frames."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.evaluate import write_results
from pipelines.figures import Figures
from videoclip.data.frame_shards import FrameShards
from videoclip.data.questions import read_answers, read_questions
from videoclip.errors import InputError
from videoclip.evaluation.frames import answer_open_questions, check_size, load_frame_model
from videoclip.parts.fused_towers import FusedTowers


@dataclass(frozen=True)
class OpenQuestionsConfig:
    """Open questions with the model's own answers (MSR-VTT-QA, MSVD-QA): top-1 accuracy, by kind of question too."""

    model: Path
    """Folder of an ALPRO that `videoclip finetune questions` made, or that was converted from a release's."""
    shards: Path
    """Folder that `videoclip extract frames` wrote, with the videos."""
    annotations: Path
    """test.jsonl: a question, an answer, a video_id and an answer_type a line."""
    answers: Path | None = None
    """train_ans2label.json, {answer: number}; only for a model that does not know its answers in words."""
    output: Path = Path("runs/evaluation/open-questions/metrics.json")
    sampler: str = "uniform"
    """How frames are chosen; release-uniform: as ALPRO's release does, which never reaches the end."""


def evaluate_open_questions(config: OpenQuestionsConfig) -> Figures:
    """Answer them; returns the metrics that it writes. Raises InputError if files do not fit each other."""
    questions, shards = read_questions(config.annotations), FrameShards(config.shards)
    model = load_frame_model(config.model)
    if not isinstance(model, FusedTowers):
        raise InputError(f"{config.model}: a {model.recipe}, which answers no questions; give an ALPRO")
    check_size(model, shards)
    if config.answers is not None:
        numbers = read_answers(config.answers)
        model.config = replace(model.config, answer_names=tuple(sorted(numbers, key=numbers.__getitem__)))
    return write_results(config.output, *answer_open_questions(model, shards, questions, config.sampler))
