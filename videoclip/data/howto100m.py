"""HowTo100M's files: captions (`raw_caption.json`, or a folder of `<video_id>.csv`), and the table of its tasks."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from videoclip.data.annotated_clips import read_csv_rows
from videoclip.errors import InputError
from videoclip.files import read_json


def read_raw_captions(path: Path) -> dict[str, Any]:
    """Captions by video id, each `{"start": […], "end": […], "text": […]}` in seconds, not yet checked.

    `path` is `raw_caption.json` (or `caption.json`, the same without stop words) or a folder of csv files.
    Raises InputError if it is neither.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.csv"))
        if not files:
            raise InputError(f"{path}: a folder of captions must hold <video_id>.csv files")
        return {file.stem: read_csv_captions(file) for file in files}
    captions = read_json(path)
    if not isinstance(captions, dict):
        raise InputError(f'{path}: expected {{video_id: {{"start": [...], "end": [...], "text": [...]}}}}')
    return captions


def read_topics(path: Path) -> dict[str, str]:
    """What each video is about: the `task_id` column of `HowTo100M_v1.csv`, or a JSON object {video_id: topic}.

    Raises InputError if the file is neither.
    """
    path = Path(path)
    if path.suffix.lower() != ".csv":
        topics = read_json(path)
        if not isinstance(topics, dict):
            raise InputError(f"{path}: expected {{video_id: topic}}")
        return {str(video_id): str(topic) for video_id, topic in topics.items()}
    return {row["video_id"]: row["task_id"] for _, row in read_csv_rows(path, {"video_id", "task_id"})}


def read_csv_captions(path: Path) -> dict[str, list[Any]]:
    """One video's `<video_id>.csv` with the columns start, end and text, not yet checked."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    return {
        "start": [_number(row.get("start")) for row in rows],
        "end": [_number(row.get("end")) for row in rows],
        "text": [row.get("text") for row in rows],
    }


def _number(text: str | None) -> float | str | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return text  # the caption reader rejects and counts it
