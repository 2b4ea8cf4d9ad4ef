"""Clips of frames changed at random, all frames alike: what ALPRO's release does to videos and pictures in pretraining.

Videos: two of ten changes at level 5 of 10. Pictures: a random part, scaled to the whole, turned over or not, then
two of eight changes at level 7, each with even chance. As in the release a level has one sign: what is turned, moved
or sheared always goes the same way, and every factor is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

VIDEO_CHANGES = (
    *("identity", "contrast", "brightness", "sharpness", "shear_x", "shear_y"),
    *("translate_x", "translate_y", "rotate", "flip"),
)
PICTURE_CHANGES = tuple(name for name in VIDEO_CHANGES if name not in ("contrast", "flip"))
GREY = (128, 128, 128)  # what comes in from outside
LEVELS = 10.0
SHEAR, TRANSLATION, ANGLE = 0.3, 10.0, 30.0  # at the highest level; pixels, degrees
SHARE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # of a picture's part


def augment_video(frames: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """uint8 [T, S, S, 3] -> the same: two different changes, every frame alike."""
    names = generator.choice(len(VIDEO_CHANGES), 2, replace=False)
    return np.stack([_changed(frame, [VIDEO_CHANGES[number] for number in names], 5.0) for frame in frames])


def augment_picture(frames: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """uint8 [T, S, S, 3], one picture T times -> the same: a part of it, turned over or not, and changed."""
    picture = _random_part(frames[0], generator)
    if generator.random() < 0.5:
        picture = picture[:, ::-1]
    names = [PICTURE_CHANGES[int(number)] for number in generator.integers(0, len(PICTURE_CHANGES), 2)]
    picture = _changed(picture, [name for name in names if generator.random() < 0.5], 7.0)
    return np.repeat(picture[None], len(frames), 0)


def _changed(frame: np.ndarray, names: list[str], level: float) -> np.ndarray:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(frame))
    for name in names:
        picture = CHANGES[name](picture, level / LEVELS)
    return np.asarray(picture)


def _random_part(frame: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A part of an even share of the picture and a ratio even in logarithm, scaled to the whole size."""
    from PIL import Image

    height, width = frame.shape[:2]
    for _ in range(10):
        pixels = generator.uniform(*SHARE) * height * width
        ratio = np.exp(generator.uniform(*np.log(RATIO)))
        wide, high = round((pixels * ratio) ** 0.5), round((pixels / ratio) ** 0.5)
        if 0 < wide <= width and 0 < high <= height:
            left, top = generator.integers(0, width - wide + 1), generator.integers(0, height - high + 1)
            part = Image.fromarray(np.ascontiguousarray(frame[top : top + high, left : left + wide]))
            return np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))
    return frame


def _enhanced(kind: str) -> Callable[[Image, float], Image]:
    def change(picture: Image, strength: float) -> Image:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, kind)(picture).enhance(0.1 + 1.8 * strength)

    return change


def _moved(matrix: Callable[[float], tuple[float, ...]]) -> Callable[[Image, float], Image]:
    """`matrix`: from the strength to where each pixel of the result comes from, (a, b, c, d, e, f) as PIL has it."""

    def change(picture: Image, strength: float) -> Image:
        from PIL import Image as images

        place = images.Transform.AFFINE, matrix(strength), images.Resampling.BILINEAR
        return picture.transform(picture.size, *place, fillcolor=GREY)

    return change


def _rotated(picture: Image, strength: float) -> Image:
    from PIL import Image as images

    return picture.rotate(ANGLE * strength, images.Resampling.BILINEAR, fillcolor=GREY)


def _flipped(picture: Image, strength: float) -> Image:
    from PIL import Image as images

    return picture.transpose(images.Transpose.FLIP_LEFT_RIGHT)


CHANGES: dict[str, Callable[[Image, float], Image]] = {
    "identity": lambda picture, strength: picture,
    "contrast": _enhanced("Contrast"),
    "brightness": _enhanced("Brightness"),
    "sharpness": _enhanced("Sharpness"),
    "shear_x": _moved(lambda strength: (1, -SHEAR * strength, 0, 0, 1, 0)),
    "shear_y": _moved(lambda strength: (1, 0, 0, -SHEAR * strength, 1, 0)),
    "translate_x": _moved(lambda strength: (1, 0, TRANSLATION * strength, 0, 1, 0)),
    "translate_y": _moved(lambda strength: (1, 0, 0, 0, 1, TRANSLATION * strength)),
    "rotate": _rotated,
    "flip": _flipped,
}
