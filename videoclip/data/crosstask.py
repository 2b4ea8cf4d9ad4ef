"""CrossTask's release: tasks with ordered steps (`tasks_primary.txt`), and where they happen (`annotations/*.csv`)."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from videoclip.errors import InputError


@dataclass(frozen=True)
class TaskVideo:
    """One video of a task: steps int64 [S], numbers from 0 in the task's list, and segments float64 [S, 2], seconds."""

    task: str
    video_id: str
    steps: np.ndarray
    segments: np.ndarray

    def assignment(self, seconds: int, count: int) -> np.ndarray:
        """bool [seconds, count]: the steps that happen in each second, [floor(start), ceil(end)) of a segment."""
        happens = np.zeros((seconds, count), bool)
        for step, (start, end) in zip(self.steps, self.segments):
            happens[math.floor(start) : math.ceil(end), step] = True
        return happens


def read_crosstask(folder: Path, videos: Path | None = None) -> tuple[dict[str, list[str]], list[TaskVideo]]:
    """The primary tasks' step names, and their annotated videos: all, or those that the csv `videos` lists.

    `videos` has lines `task,video_id,url`, as `videos_val.csv` of the release.
    Raises InputError, with file and line, if something has another form.
    """
    folder = Path(folder)
    tasks = _read_tasks(folder / "tasks_primary.txt")
    wanted = None if videos is None else _read_videos(Path(videos))
    found = []
    for path in sorted((folder / "annotations").glob("*_*.csv")):
        task, _, video_id = path.stem.partition("_")
        if task in tasks and (wanted is None or (task, video_id) in wanted):
            found.append(_read_annotation(path, task, video_id, len(tasks[task])))
    if not found:
        raise InputError(f"{folder / 'annotations'}: holds no <task>_<video>.csv of these tasks and videos")
    return tasks, found


def _read_tasks(path: Path) -> dict[str, list[str]]:
    """Blocks of id, title, url, number of steps and comma-separated steps, with empty lines between."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    tasks = {}
    for first in range(0, len(lines), 5):
        block = lines[first : first + 5]
        steps = block[4].split(",") if len(block) == 5 else []
        if not steps or str(len(steps)) != block[3]:
            raise InputError(f"{path}: task {block[0]!r} needs id, title, url, number of steps, and as many steps")
        tasks[block[0]] = [step.strip() for step in steps]
    return tasks


def _read_videos(path: Path) -> set[tuple[str, str]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    short = next((number for number, row in enumerate(rows, 1) if len(row) < 2), None)
    if short is not None:
        raise InputError(f"{path}:{short}: expected task,video_id,url")
    return {(row[0], row[1]) for row in rows}


def _read_annotation(path: Path, task: str, video_id: str, count: int) -> TaskVideo:
    steps, segments = [], []
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            try:
                step, start, end = int(row[0]), float(row[1]), float(row[2])
            except (IndexError, ValueError):
                raise InputError(f"{path}:{number}: expected step,start,end") from None
            if not 1 <= step <= count or not 0 <= start < end < math.inf:
                raise InputError(f"{path}:{number}: step {step} of {count} from {start} to {end} seconds cannot be")
            steps.append(step - 1)
            segments.append((start, end))
    return TaskVideo(task, video_id, np.array(steps, np.int64), np.array(segments, np.float64).reshape(-1, 2))
