"""YouCook2's annotated clips, from the official json or from the csv that MIL-NCE distributes."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videoclip.errors import InputError
from videoclip.files import read_json


@dataclass(frozen=True)
class AnnotatedClip:
    """One described stretch of a video: [start, end) in seconds."""

    video_id: str
    start: float
    end: float
    sentence: str


def read_youcook2(path: Path, subset: str = "validation") -> list[AnnotatedClip]:
    """Clips of one subset of `youcookii_annotations_trainval.json`, or all of a csv (start, end, text, video_id).

    Raises InputError, with the row, if a file has another form or a clip cannot be.
    """
    path = Path(path)
    rows = _rows_of_csv(path) if path.suffix.lower() == ".csv" else _rows_of_json(path, subset)
    if not rows:
        raise InputError(f"{path}: holds no clips of the subset {subset!r}")
    return [_check(path, *row) for row in rows]


def _rows_of_json(path: Path, subset: str) -> list[tuple[str, Any, Any, Any, Any]]:
    database = read_json(path)
    database = database.get("database") if isinstance(database, dict) else None
    if not isinstance(database, dict):
        raise InputError(f'{path}: expected the YouCook2 layout {{"database": {{video_id: ...}}}}')
    rows = []
    for video_id, video in database.items():
        if not isinstance(video, dict) or not isinstance(video.get("annotations", []), list):
            raise InputError(f"{path}: video {video_id!r} must be an object with a list of annotations")
        if video.get("subset") != subset:
            continue
        for annotation in video.get("annotations", []):
            segment = annotation.get("segment") if isinstance(annotation, dict) else None
            if not isinstance(segment, list) or len(segment) != 2:
                raise InputError(f"{path}: video {video_id!r}: an annotation has no segment [start, end]")
            rows.append((f"video {video_id!r}", video_id, *segment, annotation.get("sentence")))
    return rows


def _rows_of_csv(path: Path) -> list[tuple[str, Any, Any, Any, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {"start", "end", "text", "video_id"} - set(reader.fieldnames or [])
        if missing:
            raise InputError(f"{path}: the csv lacks the columns {', '.join(sorted(missing))}")
        return [(f"row {n}", r["video_id"], r["start"], r["end"], r["text"]) for n, r in enumerate(reader, 2)]


def _check(path: Path, where: str, video_id: Any, start: Any, end: Any, sentence: Any) -> AnnotatedClip:
    try:
        start, end = float(start), float(end)
    except (TypeError, ValueError):
        raise InputError(f"{path}: {where}: start {start!r} or end {end!r} is not a number") from None
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start < end):
        raise InputError(f"{path}: {where}: a clip from {start} to {end} seconds cannot be")
    if not isinstance(sentence, str) or not sentence.strip():
        raise InputError(f"{path}: {where}: the sentence is empty")
    return AnnotatedClip(str(video_id), start, end, sentence.strip())
