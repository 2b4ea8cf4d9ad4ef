"""Pictures as clips: one of them is a video of one second that does not move."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from videoclip.data.frame_shards import MAX_BYTES, decode_picture
from videoclip.data.video import FrameFormat
from videoclip.errors import InputError
from videoclip.remote import RemoteReader, is_remote

PICTURE_BLOCK = 1 << 17  # bytes of one request to a store: most pictures are one


def read_bytes(path: Path, offset: int | None = None, size: int | None = None) -> bytes:
    """A picture's bytes: a file, or `size` bytes of it from `offset` on.

    Raises InputError if there is no such file, or more would have to be read than a picture has.
    """
    try:
        with RemoteReader(path, PICTURE_BLOCK) if is_remote(path) else open(path, "rb") as file:
            file.seek(offset or 0)
            data = file.read(MAX_BYTES + 1 if size is None else min(size, MAX_BYTES + 1))
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture") from None
    if len(data) > MAX_BYTES or (size is not None and len(data) < size):
        raise InputError(f"{path}: {size or len(data)} bytes are no picture that can be read")
    return data


def picture_clip(data: bytes, where: str, frame_format: FrameFormat, frames: int) -> np.ndarray:
    """JPEG or PNG -> uint8 [frames, size, size, 3]: shorter side scaled, centre cut, the same picture throughout.

    Raises InputError, saying `where`, if it is no whole picture.
    """
    from PIL import Image

    picture = Image.fromarray(decode_picture(data, where))
    size = frame_format.size
    scale = size / min(picture.width, picture.height)
    width, height = max(round(picture.width * scale), size), max(round(picture.height * scale), size)
    if max(width, height) > 100 * size:
        raise InputError(f"{where}: a picture of {picture.width} x {picture.height} pixels is too elongated to scale")
    left, top = (width - size) // 2, (height - size) // 2
    scaled = picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return np.broadcast_to(np.asarray(scaled), (frames, size, size, 3))
