"""MSR-VTT: the 1k-A retrieval split, the full annotation file, and the multiple-choice questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videoclip.data.annotated_clips import AnnotatedClip, check_clip, read_csv_rows
from videoclip.errors import InputError
from videoclip.files import read_json

CHOICES = ("a1", "a2", "a3", "a4", "a5")


@dataclass(frozen=True)
class Question:
    """Which of the sentences describes the video? `answer` is the right one's place, from 0."""

    video_id: str
    choices: tuple[str, ...]
    answer: int


def read_msrvtt(path: Path, split: str = "test") -> list[AnnotatedClip]:
    """Whole videos with their captions: one each from `MSRVTT_JSFUSION_test.csv` (1k-A), twenty from the full json.

    The json (`MSRVTT_data.json`, `test_videodatainfo.json`) lists videos with a `split`, and sentences. Its
    `start time` and `end time` belong to the original upload, of which the distributed files are cuts already.
    Raises InputError, with the row, if the file has another form or no video of that split.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        rows = read_csv_rows(path, {"video_id", "sentence"})
        return [check_clip(path, where, row["video_id"], 0, None, row["sentence"]) for where, row in rows]
    values = read_json(path)
    lists = [values.get(name) if isinstance(values, dict) else None for name in ("videos", "sentences")]
    if not all(isinstance(value, list) and all(isinstance(item, dict) for item in value) for value in lists):
        raise InputError(f'{path}: expected the MSR-VTT layout {{"videos": [...], "sentences": [...]}}')
    videos: Any
    sentences: Any
    videos, sentences = lists
    captions: dict[Any, list[Any]] = {v.get("video_id"): [] for v in videos if v.get("split") == split}
    if not captions:
        raise InputError(f"{path}: holds no videos of the split {split!r}")
    for sentence in sentences:
        if sentence.get("video_id") in captions:
            captions[sentence["video_id"]].append(sentence.get("caption"))
    return [check_clip(path, f"video {video_id!r}", video_id, 0, None, of) for video_id, of in captions.items()]


def read_questions(path: Path) -> list[Question]:
    """The multiple-choice test of JSFusion: a tab-separated file with `vid_key`, `a1` … `a5` and `answer` (from 0).

    A key `msr7010` stands for the video `video7010`, as in the 1k-A file.
    Raises InputError, with the row, if the file has another form.
    """
    path = Path(path)
    questions = []
    for where, row in read_csv_rows(path, {"vid_key", "answer", *CHOICES}, "\t"):
        choices = tuple(row[name] for name in CHOICES)
        if not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise InputError(f"{path}: {where}: a choice is empty")
        if row["answer"] not in ("0", "1", "2", "3", "4"):
            raise InputError(f"{path}: {where}: the answer {row['answer']!r} is not a number from 0 to 4")
        questions.append(Question(row["vid_key"].replace("msr", "video"), choices, int(row["answer"])))
    if not questions:
        raise InputError(f"{path}: holds no questions")
    return questions
