"""HTM-Align (Han et al., CVPR 2022): which seconds of 80 HowTo100M videos show what each sentence says, if any do.

`htm_align.json` is `{video_id: [[alignable, start, end, text], …]}`. A sentence that can be aligned has corrected
times; one that cannot has those of speech recognition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.errors import InputError
from videoclip.files import read_json


@dataclass(frozen=True)
class AlignedVideo:
    """Sentences of one video: alignable bool [S], start and end float64 [S] in seconds, and the texts."""

    video_id: str
    alignable: np.ndarray
    start: np.ndarray
    end: np.ndarray
    text: list[str]


def read_htm_align(path: Path) -> list[AlignedVideo]:
    """Read the benchmark's file.

    Raises InputError, with the video and the number of the sentence, if something has another form.
    """
    values = read_json(path)
    if not isinstance(values, dict) or not values:
        raise InputError(f"{path}: expected {{video_id: [[alignable, start, end, text], ...]}}")
    return [_check_video(path, video_id, rows) for video_id, rows in values.items()]


def _check_video(path: Path, video_id: str, rows: Any) -> AlignedVideo:
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: video {video_id!r} must have a list of sentences")
    for number, row in enumerate(rows, 1):
        where = f"{path}: video {video_id!r}, sentence {number}"
        if not isinstance(row, list) or len(row) != 4:
            raise InputError(f"{where}: expected [alignable, start, end, text]")
        alignable, start, end, text = row
        if alignable not in (0, 1):
            raise InputError(f"{where}: alignable must be 0 or 1, not {alignable!r}")
        if not all(isinstance(time, (int, float)) and math.isfinite(time) for time in (start, end)) or end < start:
            raise InputError(f"{where}: from {start!r} to {end!r} seconds cannot be")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: the text is missing")
    return AlignedVideo(
        video_id,
        np.array([bool(row[0]) for row in rows]),
        np.array([row[1] for row in rows], np.float64),
        np.array([row[2] for row in rows], np.float64),
        [row[3].strip() for row in rows],
    )
