"""Several folders of shards read as one: an archive of narrated videos beside collections of captioned clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from videoclip.data.lazy import Lazy, open_files
from videoclip.data.shards import Shards, check_encoder, open_part
from videoclip.errors import InputError


def open_shards(folders: Path | Sequence[Path], verify: bool = False) -> Shards:
    """One folder of shards, or several as one. Raises InputError as `Shards` and `JoinedShards` do."""
    several = [folders] if isinstance(folders, Path) else list(folders)
    return JoinedShards(several, verify) if len(several) > 1 else Shards(several[0], verify)


class JoinedShards(Shards):
    """Folders of shards of one encoder: rows are counted through all of them, in the order given.

    `source_rows` has the first row of every source, and behind the last one the number of all. `folder` is the first.
    Two sources may have the same video id, which then means two videos.
    Raises InputError if a folder is given twice, or has tokens of another encoder or width than the first.
    """

    def __init__(self, folders: Sequence[Path], verify: bool = False) -> None:
        if len(set(folders)) < len(folders):
            raise InputError(f"{Counter(folders).most_common(1)[0][0]}: given twice; give it a larger share instead")
        sources = [Shards(folder, verify) for folder in folders]
        first = sources[0].manifest
        for source in sources[1:]:
            check_encoder(source.manifest, first.fingerprint, f"{first.encoder} as in {folders[0]}", source.folder)
            if source.manifest.dimension != first.dimension:
                raise InputError(f"{source.folder}: tokens {source.manifest.dimension} wide, not {first.dimension}")
        self.folder = sources[0].folder
        parts = [part for source in sources for part in source.manifest.parts]
        self.manifest = replace(first, parts=parts, complete=all(source.manifest.complete for source in sources))
        places = [source.folder for source in sources for _ in source.manifest.parts]
        self.parts = Lazy(
            len(parts),
            lambda number: open_part(places[number], parts[number], first.dimension),
            limit=open_files() // 8,  # of all sources together
        )
        self.first_rows = np.cumsum([0] + [part.videos for part in parts])
        self.source_rows = np.cumsum([0] + [len(source) for source in sources])

    def video_ids(self) -> list[str]:
        """All ids, in row order. Raises InputError if two videos of one source have the same one."""
        ids = [video_id for part in self.parts for video_id in part.video_ids()]
        for first, last in zip(self.source_rows[:-1], self.source_rows[1:]):
            of_source = ids[first:last]
            if len(set(of_source)) < len(of_source):
                twice = Counter(of_source).most_common(1)[0][0]
                raise InputError(f"{self.folder} and others: the video id {twice!r} stands twice in one of them")
        return ids

    def rows_by_id(self) -> dict[str, int]:
        """Row of every video id. Raises InputError if two videos have the same one, also of two sources."""
        ids = self.video_ids()
        rows = {video_id: row for row, video_id in enumerate(ids)}
        if len(rows) < len(ids):
            raise InputError(f"the video id {Counter(ids).most_common(1)[0][0]!r} stands in two folders of shards")
        return rows


def rows_by_source(shards: Shards, rows: np.ndarray) -> list[np.ndarray]:
    """Ascending `rows` int64 [V], one array for every folder that the shards were opened from."""
    bounds = getattr(shards, "source_rows", np.array([0, len(shards)]))
    return np.split(rows, np.searchsorted(rows, bounds[1:-1]))
