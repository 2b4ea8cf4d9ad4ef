"""QVHighlights' annotations: queries on long videos, with the windows that answer them and rated saliency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.errors import InputError
from videoclip.files import read_json_lines

CLIP_SECONDS = 2  # saliency is rated, and predicted, for clips of two seconds


@dataclass(frozen=True)
class MomentQuery:
    """One annotated query.

    `windows`: float64 [W, 2], seconds, sorted as annotated; None on a test split. `relevant_clips`: int64 [C],
    `ratings`: int64 [C, 3], three raters, 0 to 4.
    """

    query_id: int | str
    query: str
    video_id: str
    duration: float
    windows: np.ndarray | None
    relevant_clips: np.ndarray | None
    ratings: np.ndarray | None


def read_qvhighlights(path: Path) -> list[MomentQuery]:
    """Read an annotation file, one json object a line.

    Raises InputError, with file and line, for rows that do not parse, repeated query ids, windows that end before
    they start, and saliency lists that do not fit.
    """
    path = Path(path)
    rows = read_json_lines(path)
    if not rows:
        raise InputError(f"{path}: holds no queries")
    queries = [_read_row(row, f"{path}:{number}") for number, row in enumerate(rows, 1)]
    seen: set[Any] = set()
    for number, query in enumerate(queries, 1):
        if query.query_id in seen:
            raise InputError(f"{path}:{number}: query id {query.query_id!r} appears twice")
        seen.add(query.query_id)
    return queries


def _read_row(row: dict[str, Any], where: str) -> MomentQuery:
    for key, kind in (("qid", (int, str)), ("query", str), ("vid", str), ("duration", (int, float))):
        if not isinstance(row.get(key), kind):
            raise InputError(f"{where}: {key!r} is missing or of the wrong kind")
    windows = None
    if "relevant_windows" in row:
        windows = read_windows(row["relevant_windows"], where)
        bad = np.flatnonzero((windows[:, 1] <= windows[:, 0]) | (windows[:, 0] < 0))
        if len(bad):
            start, end = windows[bad[0], :2]
            raise InputError(f"{where}: a window from {start:g} to {end:g} seconds cannot be")
    clips = ratings = None
    if "relevant_clip_ids" in row and "saliency_scores" in row:
        clips, ratings = _read_saliency(row["relevant_clip_ids"], row["saliency_scores"], row["duration"], where)
    return MomentQuery(row["qid"], row["query"], row["vid"], float(row["duration"]), windows, clips, ratings)


def read_windows(value: Any, where: str, columns: int = 2) -> np.ndarray:
    """A list of [start, end] (or [start, end, score]) as float64 [W, columns].

    Raises InputError with `where` if a row has another form or is not finite.
    """
    try:
        windows = np.array(value, np.float64).reshape(len(value), columns)
    except (TypeError, ValueError):
        raise InputError(f"{where}: windows must be a list of rows of {columns} numbers") from None
    if not np.isfinite(windows).all():
        raise InputError(f"{where}: a window holds a value that is not finite")
    return windows


def _read_saliency(clips: Any, ratings: Any, duration: float, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        clip_ids = np.array(clips, np.int64).reshape(len(clips))
        scores = np.array(ratings, np.int64).reshape(len(clip_ids), 3)
    except (TypeError, ValueError):
        raise InputError(f"{where}: every relevant clip needs the ratings of three raters") from None
    count = math.floor(duration / CLIP_SECONDS)
    if len(clip_ids) and (clip_ids.min() < 0 or clip_ids.max() >= count):
        raise InputError(f"{where}: a relevant clip lies outside the video's {count} clips")
    return clip_ids, scores
