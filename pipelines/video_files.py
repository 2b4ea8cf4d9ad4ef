"""The video files of a folder by id: a file's name without its suffix, which two files cannot both have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from videoclip.data.video import find_videos


def videos_by_id(folder: Path, left_out: Callable[[str, str], None]) -> dict[str, Path]:
    """Every video below a folder. Of files of one name the first is taken; `left_out(id, reason)` is told of others.

    Raises InputError if the folder is missing or holds no video.
    """
    paths: dict[str, Path] = {}
    for path in find_videos(folder):
        taken = paths.setdefault(path.stem, path)
        if taken != path:
            left_out(path.stem, f"{path}: the id is taken by {taken}; this file is left out, rename it")
    return paths
