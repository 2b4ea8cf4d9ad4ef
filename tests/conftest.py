"""Small real things that many tests need: shards of random tokens, a rendered video, the reference data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from videoclip.data.captions import Captions
from videoclip.data.shards import Manifest, Shards, ShardWriter, VideoRecord

REFERENCE = Path(os.environ.get("VIDEOCLIP_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))
WORDS = ["chop", "stir", "pour", "the", "onion", "carrot", "egg", "into", "pan", "bowl", "now", "slowly", "until"]


@pytest.fixture
def reference() -> Path:
    """Folder of the reference data; the test skips where there is none."""
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference data at {REFERENCE} (set VIDEOCLIP_REFERENCE)")
    return REFERENCE


def random_record(number: int, dimension: int = 16, seconds: int = 40, captions: int = 9) -> VideoRecord:
    """A video of random tokens and narration, the same for the same number."""
    generator = np.random.default_rng([77, number])
    start = np.sort(generator.uniform(0, seconds - 1, captions)).astype(np.float32)
    end = np.minimum(start + generator.uniform(1, 6, captions), seconds).astype(np.float32)
    text = [" ".join(generator.choice(WORDS, generator.integers(2, 9))) for _ in range(captions)]
    tokens = generator.standard_normal((seconds, dimension)).astype(np.float16)
    return VideoRecord(f"video_{number:03d}", float(seconds), tokens, Captions(start, end, text))


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Shards]:
    """Write shards of `count` random videos and open them."""

    def make(count: int = 12, videos_per_part: int = 5, name: str = "shards", **options: int) -> Shards:
        folder = tmp_path / name
        writer = ShardWriter(folder, Manifest("random", "f" * 64, options.get("dimension", 16)), videos_per_part)
        for number in range(count):
            writer.add(random_record(number, **options))
        writer.close()
        return Shards(folder, verify=True)

    return make


def write_video(
    path: Path,
    times: list[float],
    picture: Callable[[int], np.ndarray],
    *,
    pixel_format: str = "yuv420p",
    codec: str = "libx264",
    rotation: int = 0,
    aspect: tuple[int, int] | None = None,
) -> Path:
    """Encode `picture(n)` (uint8 [H, W, 3]) to be shown at `times[n]` seconds."""
    from fractions import Fraction

    import av

    height, width = picture(0).shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = Fraction(*aspect)
        if rotation:
            stream.metadata["rotate"] = str(rotation)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    """A second of silence, and no picture."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
