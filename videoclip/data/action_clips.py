"""Clips of classes: features of frames, the names of the classes, and which is whose. Efficient-Prompt's files.

Its lists have one entry a line: a class name, or `class/name` of a video, with `.avi` (HMDB51's own lists) or without
(the few-shot splits). Names hold blanks, `;` and `%`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from videoclip.errors import InputError
from videoclip.files import read_json
from videoclip.packed import Packed

STRIDES = (1, 2, 3, 3, 3, 4)  # every first, second, … frame, drawn with these frequencies


@dataclass(frozen=True)
class ActionBatch:
    """B clips: `frames` rows float [N, D], `classes` word ids of C names, rows int [M], `labels` int64 [B] in C."""

    frames: Packed
    classes: Packed
    labels: Tensor
    rows_per_rank: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.labels)


@dataclass(frozen=True)
class ListedVideo:
    """A line of a split: a video and its class, as the list spells both."""

    class_name: str
    video_id: str


def read_class_names(path: Path) -> list[str]:
    """One name a line. Raises InputError if there is none, or one stands there twice."""
    names = _lines(path)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: the class {twice!r} stands there twice")
    return names


def read_spoken_names(path: Path, classes: Sequence[str]) -> dict[str, str]:
    """What each class is called in a text, from `{"brush_hair": "brush hairs", …}`.

    Raises InputError if a class has no name there.
    """
    values = read_json(path)
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise InputError(f"{path}: expected {{class: name}}")
    missing = [name for name in classes if not str(values.get(name, "")).strip()]
    if missing:
        raise InputError(f"{path}: has no name for {len(missing)} classes, for instance {missing[0]!r}")
    return {name: values[name] for name in classes}


def read_split(path: Path) -> list[ListedVideo]:
    """`class/name` or `class/name.avi` a line. Raises InputError, with the line, for another form."""
    videos = []
    for number, line in enumerate(_lines(path), 1):
        class_name, _, name = line.rpartition("/")
        if not class_name or not name:
            raise InputError(f"{path}: entry {number}: {line!r} is not class/video")
        videos.append(ListedVideo(class_name, name.removesuffix(".avi")))
    return videos


def read_few_shot(folder: Path) -> list[tuple[list[ListedVideo], list[ListedVideo] | None]]:
    """All splits of a folder with `train/split_0.list`, … and perhaps `test/split_0.list`, …: (train, test or None).

    The C-way lists have no test lists: their test set is the data set's own.
    Raises InputError if there is no split, or some have a test list and others not.
    """
    folder = Path(folder)
    numbered = {_number(path): path for path in (folder / "train").glob("split_*.list")}
    if not numbered:
        raise InputError(f"{folder}: holds no train/split_0.list")
    tests = {_number(path): path for path in (folder / "test").glob("split_*.list")}
    if tests and tests.keys() != numbered.keys():
        odd = min(tests.keys() ^ numbered.keys())
        raise InputError(f"{folder}: split {odd} has a list on one side only")
    return [(read_split(numbered[number]), read_split(tests[number]) if tests else None) for number in sorted(numbered)]


def read_class_splits(folder: Path) -> list[tuple[list[str], list[str]]]:
    """Open-set splits, `train/split_0.list` and `test/split_0.list`, …, of class names: (train, test) of each.

    Raises InputError if a class stands on both sides: its test would not be open.
    """
    folder = Path(folder)
    numbers = sorted(_number(path) for path in (folder / "train").glob("split_*.list"))
    if not numbers:
        raise InputError(f"{folder}: holds no train/split_0.list")
    splits = []
    for number in numbers:
        train, test = (read_class_names(folder / side / f"split_{number}.list") for side in ("train", "test"))
        shared = sorted(set(train) & set(test))
        if shared:
            raise InputError(f"{folder}: split {number}: the class {shared[0]!r} is trained on and tested")
        splits.append((train, test))
    return splits


def check_listed(videos: Iterable[ListedVideo], known: Mapping[str, int], path: Path | str) -> None:
    """Raises InputError if a listed video is not among the `known` ids: a split without it would be another split."""
    videos = list(videos)
    missing = [video.video_id for video in videos if video.video_id not in known]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(videos)} listed videos have no features, for instance {missing[0]!r}"
        )


def sample_frames(frames: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [count]: which of a video's `frames` a training clip takes, as the release draws them.

    Every first, second, third or fourth frame from a random offset; of these a run of `count`, whose start is drawn so
    that the last possible run never occurs. A short video is followed by copies of its last frame. The release draws
    so in validation too.
    """
    if frames <= count:
        return np.minimum(np.arange(count), frames - 1)
    stride = STRIDES[generator.integers(len(STRIDES))]
    offset = int(generator.integers(stride))
    places = np.linspace(offset, frames - 1, round(frames / stride)).astype(np.int64)
    if len(places) <= count:
        places = np.arange(frames)
    start = int(generator.integers(len(places) - count))
    return places[start : start + count]


def evenly_sampled(frames: int, count: int) -> np.ndarray:
    """int64 [count]: the middles of `count` equal stretches of a video; a short one is followed by its last frame."""
    if frames <= count:
        return np.minimum(np.arange(count), frames - 1)
    return ((np.arange(count) + 0.5) * frames / count).astype(np.int64)


def action_batch(
    features: Sequence[np.ndarray], labels: Sequence[int], classes: Packed, places: Sequence[np.ndarray]
) -> ActionBatch:
    """Clips from videos' features [T, D] each, at the frames `places`, with their classes' numbers."""
    clips = [torch.from_numpy(np.asarray(video[rows], np.float32)) for video, rows in zip(features, places)]
    return ActionBatch(Packed.of(clips), classes, torch.tensor(list(labels), dtype=torch.int64))


def _number(path: Path) -> int:
    number = path.stem.removeprefix("split_")
    if not number.isdecimal():
        raise InputError(f"{path}: expected split_0.list, split_1.list, …")
    return int(number)


def _lines(path: Path) -> list[str]:
    """What stands on each line. Raises InputError if the file is missing, empty, or no text."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file ({error.reason})") from None
    entries = [line.strip() for line in lines if line.strip()]
    if not entries:
        raise InputError(f"{path}: holds no entry")
    return entries
