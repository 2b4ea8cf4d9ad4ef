"""COIN's action segments (`COIN.json`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.data.annotated_clips import read_database
from videoclip.errors import InputError

OUTSIDE = 0  # the label of seconds in which no action is annotated


@dataclass(frozen=True)
class ActionSegments:
    """What is done in one video: labels int64 [S] and segments float64 [S, 2], seconds."""

    video_id: str
    labels: np.ndarray
    segments: np.ndarray

    def per_second(self, seconds: int) -> np.ndarray:
        """int64 [seconds]: the label of each; [floor(start), ceil(end)) of a later segment wins, as in the release."""
        labels = np.full(seconds, OUTSIDE, np.int64)
        for label, (start, end) in zip(self.labels, self.segments):
            labels[math.floor(start) : math.ceil(end)] = label
        return labels


def read_coin(path: Path, subset: str = "testing") -> tuple[list[ActionSegments], dict[int, str]]:
    """The videos of a subset, and the name of every label in it.

    Raises InputError, with the video, if the file has another form.
    """
    path = Path(path)
    names: dict[int, str] = {}
    videos = []
    for video_id, video in read_database(path, "COIN").items():
        if not isinstance(video, dict) or not isinstance(video.get("annotation"), list):
            raise InputError(f"{path}: video {video_id!r} must be an object with a list `annotation`")
        if video.get("subset") != subset:
            continue
        rows = [_segment(path, video_id, row) for row in video["annotation"]]
        names |= {label: name for label, name, _, _ in rows}
        segments = np.array([row[2:] for row in rows], np.float64).reshape(-1, 2)
        videos.append(ActionSegments(video_id, np.array([row[0] for row in rows], np.int64), segments))
    if not videos or not names:
        raise InputError(f"{path}: holds no annotated videos of the subset {subset!r}")
    return videos, dict(sorted(names.items()))


def _segment(path: Path, video_id: str, row: Any) -> tuple[int, str, float, float]:
    try:
        label, name, (start, end) = int(row["id"]), row["label"], map(float, row["segment"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: video {video_id!r}: an annotation lacks id, label or segment") from None
    if label < 1 or not isinstance(name, str) or not name.strip() or not 0 <= start < end < math.inf:
        raise InputError(f"{path}: video {video_id!r}: label {label} {name!r} from {start} to {end} seconds cannot be")
    return label, name.strip(), start, end
