"""Vectors of an archive on disk: blocks of windows and of seconds, written once, read where they lie.

A block is made of some videos at a time: `<name>.windows.npy`, float16 [W, H], one unit vector a window, and
`<name>.seconds.npy`, float16 [T, H], one a second, from which moments find their ends without the model's video side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from videoclip.embedding import embed_clips, embed_seconds
from videoclip.errors import InputError
from videoclip.files import write_array
from videoclip.retrieval.index import unit
from videoclip.search.store import Video, window_count, window_starts

if TYPE_CHECKING:
    from videoclip.embedding import TwoTowers

BLOCKS = "blocks"
KINDS = ("windows", "seconds")


@dataclass(frozen=True)
class WindowConfig:
    """How videos are cut into windows, in seconds."""

    window: int = 8
    stride: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window:
            raise InputError("a stride must be at least one second and at most a window, or seconds would be missed")


def write_block(model: TwoTowers, videos: Iterable[np.ndarray], config: WindowConfig, folder: Path, name: str) -> None:
    """Embed videos, tokens [T, D] each, into the block `name` below `folder`."""
    windows, seconds = [], []
    for tokens in videos:
        starts = window_starts(len(tokens), config.window, config.stride)
        ends = np.minimum(starts + config.window, len(tokens))
        windows.append(unit(embed_clips(model, tokens, np.stack([starts, ends], 1))).astype(np.float16))
        seconds.append(embed_seconds(model, tokens).astype(np.float16))
    write_array(folder / f"{name}.seconds.npy", np.concatenate(seconds))
    write_array(folder / f"{name}.windows.npy", np.concatenate(windows))  # written last: it marks the block finished


def block_finished(folder: Path, name: str) -> bool:
    """Whether the block was written to its end."""
    return (Path(folder) / f"{name}.windows.npy").is_file()


class Vectors:
    """Vectors of an archive's videos, by window number or by video, read from the mapped blocks.

    Raises InputError if a block is missing.
    """

    def __init__(self, folder: Path, videos: Sequence[Video], config: WindowConfig) -> None:
        self.folder = Path(folder) / BLOCKS
        self.config = config
        self.videos = sorted(videos, key=lambda video: video.first_window)
        self.first = np.array([video.first_window for video in self.videos], np.int64)
        self.counts = np.array([window_count(v.seconds, config.window, config.stride) for v in self.videos], np.int64)
        self._seconds = np.array([video.seconds for video in self.videos], np.int64)
        self._window_rows = np.array([video.window_row for video in self.videos], np.int64)
        names = sorted({video.block for video in self.videos})
        number = {name: place for place, name in enumerate(names)}
        self._block_of = np.array([number[video.block] for video in self.videos], np.int64)
        self._windows, self._second_rows = ([self._open(name, kind) for name in names] for kind in KINDS)

    def __len__(self) -> int:
        """Number of windows."""
        return int(self.counts.sum())

    @property
    def width(self) -> int:
        """H."""
        return int(self._windows[0].shape[1]) if self._windows else 0

    def places(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [N]: place in `videos` of every window, -1 of one that is gone, and its number inside its video."""
        place = np.searchsorted(self.first, windows, side="right") - 1
        inside = windows - self.first[np.maximum(place, 0)]
        gone = (place < 0) | (inside >= self.counts[np.maximum(place, 0)])
        return np.where(gone, -1, place), inside

    def spans(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Place in `videos` (-1: gone), start and end in seconds of every window: int64 [N] each."""
        place, inside = self.places(windows)
        seconds = self._seconds[np.maximum(place, 0)]
        start = np.clip(inside * self.config.stride, 0, np.maximum(seconds - self.config.window, 0))
        return place, start, np.minimum(start + self.config.window, seconds)

    def windows(self, windows: np.ndarray) -> np.ndarray:
        """float32 [N, H]: the vectors of windows; zeros for those that are gone."""
        place, inside = self.places(windows)
        found = np.zeros((len(windows), self.width), np.float32)
        block = np.where(place >= 0, self._block_of[place], -1)
        row_in_block = self._window_rows[place] + inside
        for number in np.unique(block[block >= 0]).tolist():  # a block's rows are gathered at once
            chosen = block == number
            found[chosen] = self._windows[number][row_in_block[chosen]]
        return found

    def windows_of(self, place: int) -> np.ndarray:
        """float16 [W, H]: all windows of the video at a place in `videos`, a view of the mapped file."""
        row = int(self._window_rows[place])
        return self._windows[self._block_of[place]][row : row + int(self.counts[place])]

    def seconds_of(self, place: int) -> np.ndarray:
        """float16 [T, H]: one vector a second of the video at a place in `videos`, a view of the mapped file."""
        row, video = self.videos[place].second_row, self.videos[place]
        return self._second_rows[self._block_of[place]][row : row + video.seconds]

    def numbers_of(self, places: Iterable[int]) -> np.ndarray:
        """int64: the numbers of all windows of some videos."""
        ranges = [np.arange(self.first[place], self.first[place] + self.counts[place]) for place in places]
        return np.concatenate([np.zeros(0, np.int64), *ranges])

    def pieces(self, places: Iterable[int], size: int = 65536) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Numbers int64 [N] and vectors float32 [N, H] of all windows of some videos, about `size` at a time."""
        numbers: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        held = 0
        for place in places:
            numbers.append(np.arange(self.first[place], self.first[place] + self.counts[place]))
            rows.append(self.windows_of(place))
            held += len(rows[-1])
            if held >= size:
                yield np.concatenate(numbers), np.concatenate(rows).astype(np.float32)
                numbers, rows, held = [], [], 0
        if held:
            yield np.concatenate(numbers), np.concatenate(rows).astype(np.float32)

    def _open(self, name: str, kind: str) -> np.ndarray:
        path = self.folder / f"{name}.{kind}.npy"
        if not path.is_file():
            raise InputError(f"{path}: is missing; remove the folder and run `videoclip index` again")
        return np.asarray(np.load(path, mmap_mode="r"))
