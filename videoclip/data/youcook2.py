"""YouCook2's annotated clips, from the official json or from the csv that MIL-NCE distributes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from videoclip.data.annotated_clips import AnnotatedClip, check_clip, read_csv_rows, read_database
from videoclip.errors import InputError


def read_youcook2(path: Path, subset: str = "validation") -> list[AnnotatedClip]:
    """Clips of one subset of `youcookii_annotations_trainval.json`, or all of a csv (start, end, text, video_id).

    Raises InputError, with the row, if a file has another form or a clip cannot be.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        columns = {"start", "end", "text", "video_id"}
        rows: list[tuple[str, Any, Any, Any, Any]] = [
            (where, row["video_id"], row["start"], row["end"], row["text"])
            for where, row in read_csv_rows(path, columns)
        ]
    else:
        rows = _rows_of_json(path, subset)
    if not rows:
        raise InputError(f"{path}: holds no clips of the subset {subset!r}")
    return [check_clip(path, *row) for row in rows]


def _rows_of_json(path: Path, subset: str) -> list[tuple[str, Any, Any, Any, Any]]:
    rows = []
    for video_id, video in read_database(path, "YouCook2").items():
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
