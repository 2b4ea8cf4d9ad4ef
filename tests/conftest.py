"""Small real things that many tests need: shards of random tokens, a rendered video, a tiny trained model."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipelines.extract import ExtractConfig, extract
from pipelines.pretrain import PretrainConfig, pretrain
from pipelines.ray_session import ray_session
from videoclip.data.captions import Captions
from videoclip.data.clips import ClipConfig
from videoclip.data.shards import Manifest, Shards, ShardWriter, VideoRecord
from videoclip.recipes.videoclip import Options
from videoclip.synthetic.kitchen import KitchenConfig, plan_kitchen, render_video, write_annotations
from videoclip.training import OptimizerConfig

REFERENCE = Path(os.environ.get("VIDEOCLIP_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))
WORDS = ["chop", "stir", "pour", "the", "onion", "carrot", "egg", "into", "pan", "bowl", "now", "slowly", "until"]


@pytest.fixture
def reference() -> Path:
    """Folder of the reference data; the test skips where there is none."""
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference data at {REFERENCE} (set VIDEOCLIP_REFERENCE)")
    return REFERENCE


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept for later runs of a user is not kept in that user's home."""
    os.environ["VIDEOCLIP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


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
    sound: int = 0,
) -> Path:
    """Encode `picture(n)` (uint8 [H, W, 3]) to be shown at `times[n]` seconds; the last for the shortest gap.

    `sound` adds that many seconds of silence.
    """
    from fractions import Fraction

    import av

    height, width = picture(0).shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=round(1 / np.diff(times).min()) if len(times) > 1 else 30)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = Fraction(*aspect)
        if rotation:
            stream.metadata["rotate"] = str(rotation)
        if sound:
            silent = container.add_stream("aac", rate=16000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for second in range(sound):
            container.mux(silent.encode(_second_of_silence(second)))
        if sound:
            container.mux(silent.encode())
    return path


def _second_of_silence(number: int) -> Any:
    import av

    frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 16000, number * 16000
    return frame


def write_audio(path: Path) -> Path:
    """A second of silence, and no picture."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        container.mux(stream.encode(_second_of_silence(0)))
        container.mux(stream.encode())
    return path


# --- A tiny corpus and what the real stages make of it ------------------------------------------------------------

KITCHEN = KitchenConfig(train_videos=10, test_videos=6, recipes=2, seconds=28)


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    with ray_session(None):
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training and six test videos, with annotations, and files that are no videos among them."""
    folder = tmp_path_factory.mktemp("corpus")
    videos = plan_kitchen(KITCHEN)
    for video in videos:
        render_video(video, folder / video.split / "videos")
    write_annotations(videos, KITCHEN, folder)
    bad = folder / "train" / "videos"
    (bad / "empty.mp4").touch()
    (bad / "text.mp4").write_text("not a video\n" * 50)
    (bad / "cut.mp4").write_bytes((bad / "train_0000.mp4").read_bytes()[:9000])
    write_audio(bad / "audio.mp4")
    write_video(bad / "one.mp4", [0.0], lambda n: np.zeros((64, 64, 3), np.uint8))
    (bad / "zz").mkdir()
    (bad / "zz" / "train_0001.mp4").write_bytes((bad / "train_0001.mp4").read_bytes())
    captions = json.loads((folder / "train" / "raw_caption.json").read_text())
    captions["../../x"] = captions["nowhere"] = captions["train_0002"]
    captions["train_0003"]["text"][0], captions["train_0003"]["end"][1] = 17, -1
    captions["train_0004"] = "not captions"
    (folder / "train" / "raw_caption.json").write_text(json.dumps(captions))
    return folder


def extraction(corpus: Path, output: Path) -> ExtractConfig:
    return ExtractConfig(
        corpus / "train" / "videos",
        output,
        str(corpus / "train" / "raw_caption.json"),
        "x3d-tiny",
        calibration_clips=24,
        videos_per_part=4,
    )


@pytest.fixture(scope="session")
def tokens(ray: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and test shards of the corpus."""
    folder = tmp_path_factory.mktemp("tokens")
    extract(extraction(corpus, folder / "train"))
    extract(ExtractConfig(corpus / "test" / "videos", folder / "test", encoder_from=folder / "train"))
    return folder


def training(tokens: Path, output: Path, **changes: object) -> PretrainConfig:
    config = PretrainConfig(
        tokens / "train",
        output,
        epochs=3,
        videos_per_batch=3,
        vocabulary=300,
        model=Options(width=32, layers=1, heads=2),
        clips=ClipConfig(clips_per_video=4, max_words=24, max_seconds=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=4),
        threads=1,
    )
    return replace(config, **changes)


@pytest.fixture(scope="session")
def trained(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of uninterrupted training."""
    output = tmp_path_factory.mktemp("trained") / "run"
    pretrain(training(tokens, output))
    return output


def kill_first_worker(name: str, ready: Callable[[], bool]) -> tuple[list[int], threading.Thread]:
    """Kill one Ray worker of this test's own Ray, by a thread, as soon as `ready()`; the list then holds its pid."""
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.time() + 120
        while not killed and time.time() < deadline:
            for process in psutil.Process().children(recursive=True) if ready() else []:
                try:
                    if name in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.005)

    thread = threading.Thread(target=kill_one)
    thread.start()
    return killed, thread
