"""Which rows of a list belong to which part: decided once, on disk, before anything is encoded.

A plan is a run of rows, cut into parts at places that depend on the list alone. Whoever encodes them, in whatever order
and after however many interruptions: part 7 holds the same videos in the same order, so its bytes are the same. What
comes later (videos that were added, or that are tried again) is a plan of its own, with the numbers that follow.

A part has 256 videos, some 180 MB at 864 numbers a second and seven minutes a video: HowTo100M is 4,700 files. Lustre
and object stores like files of 64 MB to 1 GB, a process may map 65,530 of them, and this many videos at most are
encoded again when the driver dies. Tokens that are wide, such as pixels, make parts of fewer videos; of pictures, one
token each, 32 count as a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from videoclip.data.stored_list import VideoList
from videoclip.files import read_arrays, write_arrays

VIDEO, PICTURE = 32, 1  # what rows count towards the size of a part
PART_BYTES = 1 << 28
USUAL_SECONDS = 400  # of a video, where nothing is known
PLANS = "plan-*.npz"


@dataclass(frozen=True)
class Plan:
    """Parts `first` … `first + parts - 1`: part p holds the rows `bounds[p - first]` … `bounds[p - first + 1]` of
    `digests` (uint64), checksums of ids."""

    first: int
    digests: np.ndarray
    bounds: np.ndarray

    @property
    def parts(self) -> range:
        """Numbers of its parts."""
        return range(self.first, self.first + len(self.bounds) - 1)

    def of_part(self, number: int) -> np.ndarray:
        """uint64: digests of the ids of one part."""
        return self.digests[self.bounds[number - self.first] : self.bounds[number - self.first + 1]]

    def save(self, folder: Path) -> None:
        """Write into a folder of shards."""
        write_arrays(folder / f"plan-{self.first:05d}.npz", digests=self.digests, bounds=self.bounds)


def read_plans(folder: Path) -> list[Plan]:
    """All plans of a folder, in the order of their parts."""
    found = []
    for path in sorted(folder.glob(PLANS)):
        arrays = read_arrays(path)
        found.append(Plan(int(path.stem.removeprefix("plan-")), arrays["digests"], arrays["bounds"]))
    return sorted(found, key=lambda plan: plan.first)


def part_name(number: int) -> str:
    """The file of a part."""
    return f"part-{number:05d}.arrow"


def part_number(name: str) -> int:
    """Of a part's file; -1 for one that bears none."""
    digits = Path(name).stem.removeprefix("part-")
    return int(digits) if digits.isdigit() else -1


def videos_in_part(most: int, dimension: int) -> int:
    """How many videos of ordinary length fill a part of tokens so wide; `most` at most."""
    return max(1, min(most, max(16, PART_BYTES // (2 * dimension * USUAL_SECONDS))))


def cut_into_parts(weights: np.ndarray, limit: int) -> np.ndarray:
    """int64 [parts + 1]: bounds of runs whose weights sum to `limit` at most (one row at least)."""
    if not len(weights):
        return np.zeros(1, np.int64)
    ends = np.cumsum(weights)
    bounds = [0]
    while bounds[-1] < len(weights):
        before = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(max(int(np.searchsorted(ends, before + limit, side="right")), bounds[-1] + 1))
    return np.array(bounds, np.int64)


def add_plan(
    folder: Path, videos: VideoList, plans: Sequence[Plan], registered: set[int], left_out: np.ndarray, size: int
) -> list[Plan]:
    """The plans, and one more where the list has videos that no plan will still encode.

    `registered` are the numbers of finished parts, `left_out` (uint64) the ids whose tokens are there or that cannot be
    used, `size` the videos in a part.
    """
    open_rows = [plan.of_part(number) for plan in plans for number in plan.parts if number not in registered]
    known = np.concatenate([left_out, *open_rows]).astype(np.uint64)
    digests = videos.digests[videos.good_rows]
    new = videos.good_rows[~np.isin(digests, known)]
    if not len(new):
        return list(plans)
    first = max([-1, *registered, *(number for plan in plans for number in plan.parts)]) + 1
    weights = np.where(videos.pictures()[new], PICTURE, VIDEO)
    plan = Plan(first, videos.digests[new], cut_into_parts(weights, VIDEO * size))
    plan.save(folder)
    return [*plans, plan]
