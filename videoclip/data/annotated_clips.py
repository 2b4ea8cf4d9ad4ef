"""Described stretches of video, the common form of the retrieval benchmarks' annotation files."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.errors import InputError
from videoclip.files import read_json


@dataclass(frozen=True)
class AnnotatedClip:
    """One stretch of a video, [start, end) in seconds, and what describes it. No end: to the video's end."""

    video_id: str
    start: float
    end: float | None
    sentences: tuple[str, ...]

    def seconds(self, tokens: np.ndarray) -> np.ndarray:
        """The rows of a video's tokens [T, D] that the clip covers, at least one unless it starts behind their end."""
        start, end = int(self.start), len(tokens) if self.end is None else int(self.end)
        return tokens[start : max(start + 1, end)]


def check_clip(path: Path, where: str, video_id: Any, start: Any, end: Any, sentences: Any) -> AnnotatedClip:
    """Build a clip from values of a file. `sentences` is one or a list of them.

    Raises InputError, with file and row, if the times cannot be or a sentence is empty.
    """
    try:
        start, end = float(start), None if end is None else float(end)
    except (TypeError, ValueError):
        raise InputError(f"{path}: {where}: start {start!r} or end {end!r} is not a number") from None
    if not 0 <= start < (math.inf if end is None else end) or end == math.inf:
        raise InputError(f"{path}: {where}: a clip from {start} to {end} seconds cannot be")
    sentences = [sentences] if isinstance(sentences, str) else sentences
    if not isinstance(sentences, list) or not sentences:
        raise InputError(f"{path}: {where}: the sentence is missing")
    if not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
        raise InputError(f"{path}: {where}: the sentence is empty")
    if not isinstance(video_id, str) or not video_id:
        raise InputError(f"{path}: {where}: the video id is missing")
    return AnnotatedClip(video_id, start, end, tuple(sentence.strip() for sentence in sentences))


def read_database(path: Path, benchmark: str) -> dict[str, Any]:
    """The videos of a json file `{"database": {video_id: …}}`, as YouCook2 and COIN have it.

    Raises InputError if the file has another form.
    """
    values = read_json(path)
    database = values.get("database") if isinstance(values, dict) else None
    if not isinstance(database, dict):
        raise InputError(f'{path}: expected the {benchmark} layout {{"database": {{video_id: ...}}}}')
    return database


def read_csv_rows(path: Path, columns: set[str], delimiter: str = ",") -> list[tuple[str, dict[str, str]]]:
    """Rows of a csv file with a head line, each with where it stands ("row 2" is the first after the head).

    Raises InputError if the file or one of `columns` is missing.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        missing = columns - set(reader.fieldnames or [])
        if missing:
            raise InputError(f"{path}: the csv lacks the columns {', '.join(sorted(missing))}")
        return [(f"row {number}", row) for number, row in enumerate(reader, 2)]
