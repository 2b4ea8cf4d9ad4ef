"""Questions about videos with open answers, in ALPRO's files for MSR-VTT-QA and MSVD-QA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from videoclip.errors import InputError
from videoclip.files import read_json, read_json_lines

TYPES = ("what", "who", "how", "where", "when")
ANSWERS = {"msrvtt": 1500, "msvd": 2423}  # how many the published models choose from


@dataclass(frozen=True)
class OpenQuestion:
    """A question about a video (a file's stem), its answer in words and the kind of the question."""

    video_id: str
    question: str
    answer: str
    kind: str


def read_questions(path: Path) -> list[OpenQuestion]:
    """`train.jsonl`, `val.jsonl`, `test.jsonl`: `question`, `answer`, `video_id`, and `answer_type` if it is there.

    Raises InputError, with the row, if one lacks a field.
    """
    path = Path(path)
    questions = []
    for number, row in enumerate(read_json_lines(path), 1):
        words = [row.get(name) for name in ("question", "answer")]
        video_id = row.get("video_id")
        if not all(isinstance(word, str) and word.strip() for word in words) or video_id in (None, ""):
            raise InputError(f"{path}:{number}: needs a question, an answer and a video_id")
        question, answer = (str(word).strip() for word in words)
        kind = str(row.get("answer_type") or question.split()[0]).lower()
        name = f"video{video_id}" if isinstance(video_id, int) else str(video_id)
        questions.append(OpenQuestion(name, question, answer, kind if kind in TYPES else "other"))
    if not questions:
        raise InputError(f"{path}: holds no question")
    return questions


def read_answers(path: Path) -> dict[str, int]:
    """`train_ans2label.json`, {answer: number}. Raises InputError if the numbers are not 0, 1, 2, … once each."""
    values = read_json(Path(path))
    if not isinstance(values, dict) or sorted(map(str, values.values())) != sorted(map(str, range(len(values)))):
        raise InputError(f"{path}: expected {{answer: number}}, the numbers from 0, each once")
    return {str(answer): int(number) for answer, number in values.items()}


def frequent_answers(questions: Sequence[OpenQuestion], limit: int) -> dict[str, int]:
    """Numbers of the `limit` most frequent answers, ties in alphabetical order."""
    counts = Counter(question.answer for question in questions)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]
    return {answer: number for number, (answer, _) in enumerate(ranked)}
