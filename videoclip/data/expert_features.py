"""Files of the public release of collaborative experts and TeachText: lists, captions, features, teachers, masks.

All but the lists are pickles of strangers, read without running them (`videoclip.data.pickles`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from videoclip.data.pickles import read_pickle
from videoclip.errors import InputError


class Teacher(NamedTuple):
    """What a teacher thinks of one video: float32 `clip` [D] and `texts` [captions, D]; products are similarities."""

    clip: np.ndarray
    texts: np.ndarray


def read_video_list(path: Path | str, suffixes: bool = True) -> list[str]:
    """`train_list_full.txt` …: one video id a line. Without `suffixes` an id ends before its first dot, as DiDeMo's.

    Raises InputError if the file is missing, empty, or names a video twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    ids = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ids = ids if suffixes else [video.partition(".")[0] for video in ids]
    if not ids:
        raise InputError(f"{path}: names no videos")
    if len(set(ids)) < len(ids):
        twice = next(video for place, video in enumerate(ids) if video in ids[:place])
        raise InputError(f"{path}: the video {twice!r} stands in it twice")
    return ids


def read_captions(path: Path | str) -> dict[str, list[str]]:
    """`raw-captions.pkl`: video -> captions, their words joined by blanks."""
    path = Path(path)

    def captions(video: str, value: Any) -> list[str]:
        """One video's, each its words joined."""
        if not isinstance(value, (list, tuple)) or not value:
            raise InputError(f"{path}: video {video!r}: no captions")
        texts = [words if isinstance(words, str) else " ".join(map(str, words)) for words in value]
        if not all(text.strip() for text in texts):
            raise InputError(f"{path}: video {video!r}: an empty caption")
        return texts

    return _by_video(path, captions)


def read_caption_choice(path: Path | str) -> dict[str, int]:
    """`jsfusion_val_caption_idx.pkl`: video -> the number of the one caption that it is tested with."""
    path = Path(path)

    def number(video: str, value: Any) -> int:
        """Of one video's test caption."""
        if not isinstance(value, (int, np.integer)) or value < 0:
            raise InputError(f"{path}: video {video!r}: {value!r} is no number of a caption")
        return int(value)

    return _by_video(path, number)


def read_expert(path: Path | str) -> dict[str, np.ndarray | None]:
    """An expert's features: video -> float32 [D] or, where it is a sequence, [n, d]; None where it is missing (NaN).

    Raises InputError, naming the video, if widths differ or values are not finite.
    """
    path = Path(path)
    shapes: set[tuple[int, int]] = set()

    def rows(video: str, value: Any) -> np.ndarray | None:
        """One video's features, checked against those before it."""
        array = _floats(path, f"video {video!r}", value)
        if array.ndim == 0 or not array.size or np.isnan(array).all():
            return None
        shapes.add((array.ndim, array.shape[-1]))
        if array.ndim > 2 or len(shapes) > 1 or not np.isfinite(array).all():
            wide = " or ".join(str(shape[-1]) for shape in sorted(shapes))
            raise InputError(f"{path}: video {video!r}: features {array.shape}, wide {wide}, or not finite numbers")
        return array

    return _by_video(path, rows)


def read_text_features(path: Path | str) -> dict[str, list[np.ndarray]]:
    """`aggregated_text_feats/….pkl`: video -> a float32 [words, d] for every caption, in the order of the captions.

    Raises InputError, naming the video, if widths differ or a caption has no words.
    """
    path = Path(path)
    widths: set[int] = set()

    def texts(video: str, value: Any) -> list[np.ndarray]:
        """One video's captions as word vectors, checked against those before them."""
        if not isinstance(value, (list, tuple, np.ndarray)) or not len(value):
            raise InputError(f"{path}: video {video!r}: no captions")
        arrays = [_floats(path, f"video {video!r}, caption {number}", text) for number, text in enumerate(value)]
        widths.update(array.shape[-1] for array in arrays if array.ndim == 2)
        if any(array.ndim != 2 or not len(array) or not np.isfinite(array).all() for array in arrays):
            raise InputError(f"{path}: video {video!r}: a caption that is not [words, width] of finite numbers")
        if len(widths) > 1:
            raise InputError(f"{path}: video {video!r}: words {' and '.join(map(str, sorted(widths)))} wide")
        return arrays

    return _by_video(path, texts)


def read_masks(path: Path | str) -> dict[str, np.ndarray]:
    """`denoise-less100.pkl`: video -> bool [captions], which may be trained on."""
    path = Path(path)
    return _by_video(path, lambda video, value: _floats(path, f"video {video!r}", value).reshape(-1) > 0)


def read_teacher(path: Path | str) -> dict[str, Teacher]:
    """A stored teacher: video -> its experts' embeddings side by side, in sorted order of their names.

    Text embeddings must have been multiplied by the experts' weights when they were stored, or their norms would add
    up to more than one: that is checked. Raises InputError, naming the video, if something is missing or does not fit.
    """
    path = Path(path)

    def teacher(video: str, value: Any) -> Teacher:
        """One video's embeddings, all experts side by side."""
        parts: list[Any] = [
            value.get(name) if isinstance(value, Mapping) else None for name in ("vid_embds", "text_embds")
        ]
        if not all(isinstance(part, Mapping) and part for part in parts) or set(parts[0]) != set(parts[1]):
            raise InputError(f"{path}: video {video!r}: expected vid_embds and text_embds of the same experts")
        names = sorted(parts[0])
        clip = [_floats(path, f"video {video!r}, {name}", parts[0][name]).reshape(-1) for name in names]
        texts = [_rows(path, f"video {video!r}, {name}", parts[1][name]) for name in names]
        if len({len(rows) for rows in texts}) > 1 or any(len(c) != t.shape[1] for c, t in zip(clip, texts)):
            raise InputError(f"{path}: video {video!r}: embeddings of different widths or numbers of captions")
        if not np.isfinite(np.concatenate([*clip, *(rows.ravel() for rows in texts)])).all():
            raise InputError(f"{path}: video {video!r}: embeddings that are not finite numbers")
        if sum(np.linalg.norm(rows, axis=1) for rows in texts).max() > 1.01:
            raise InputError(f"{path}: video {video!r}: text embeddings without the experts' weights")
        return Teacher(np.concatenate(clip), np.concatenate(texts, 1))

    return _by_video(path, teacher)


def _by_video(path: Path, made: Callable[[str, Any], Any]) -> dict[str, Any]:
    values = read_pickle(path)
    if not isinstance(values, Mapping) or not values or not all(isinstance(video, str) for video in values):
        raise InputError(f"{path}: expected values by video id")
    return {video: made(video, value) for video, value in values.items()}


def _floats(path: Path, where: str, value: Any) -> np.ndarray:
    """An array, a tensor, a number or lists of numbers as float32."""
    try:
        array = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise ValueError
        return array.astype(np.float32)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{path}: {where}: expected numbers, found {type(value).__name__}") from None


def _rows(path: Path, where: str, value: Any) -> np.ndarray:
    """float32 [captions, D] of an array, or of a list of vectors; [D] is one caption."""
    stacked: Sequence[np.ndarray] | None = None
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float)):
        stacked = [_floats(path, where, item).reshape(-1) for item in value]
        if len({len(row) for row in stacked}) > 1:
            raise InputError(f"{path}: {where}: captions of different widths")
    array = np.stack(stacked) if stacked is not None else _floats(path, where, value)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or not len(array):
        raise InputError(f"{path}: {where}: expected [captions, width], found {array.shape}")
    return array
