"""DiDeMo's descriptions (`test_data.json`), for retrieval of whole videos."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from videoclip.data.annotated_clips import AnnotatedClip, check_clip
from videoclip.errors import InputError
from videoclip.files import read_json

Queries = Literal["paragraph", "sentence"]


def read_didemo(path: Path, queries: Queries = "paragraph") -> list[AnnotatedClip]:
    """Whole videos with their descriptions.

    `paragraph`: all descriptions of a video, joined in the order of the file, are one query, which is how the field
    reports DiDeMo retrieval. `sentence`: every description is a query of its own.
    The file's video names (`1234@N00_5678.mov`) lose their suffix, as extraction's ids do.
    Raises InputError, with the row, if the file has another form.
    """
    if queries not in get_args(Queries):
        raise InputError(f"queries must be one of {', '.join(get_args(Queries))}, not {queries!r}")
    path = Path(path)
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: expected DiDeMo's list of descriptions")
    descriptions: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        where = f"description {number}"
        if not isinstance(row, dict):
            raise InputError(f"{path}: {where}: must be an object")
        clip = check_clip(path, where, row.get("video"), 0, None, row.get("description"))
        descriptions.setdefault(Path(clip.video_id).stem, []).append(clip.sentences[0])
    return [
        AnnotatedClip(video_id, 0.0, None, (" ".join(texts),) if queries == "paragraph" else tuple(texts))
        for video_id, texts in descriptions.items()
    ]
