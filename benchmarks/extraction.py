"""Seconds of video a second: decoding alone, the encoder alone, and the two together, on two processes' worth of cores.

Without files, one is made: noise at 30 frames a second and 640 x 360 pixels. The encoder's share of the wall time says
how well decoding hides behind it. On a machine with a GPU the encoder runs there in half precision.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from videoclip.data.video import clips_of_seconds, decode_seconds
from videoclip.encoders.s3d import S3D
from videoclip.encoders.shared_batches import SharedBatches
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.encoders.x3d import X3D


def make_video(path: Path, seconds: int) -> None:
    """A moving pattern with noise, H.264, 640 x 360 at 30 frames a second."""
    import av

    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[0:360, 0:640]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for number in range(30 * seconds):
            wave = 127 + 80 * np.sin((columns + 4 * number) / 40) * np.cos((rows - 2 * number) / 30)
            picture = np.clip(wave[..., None] + generator.normal(0, 8, (360, 640, 3)), 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


class BusyEncoder:
    """Adds up the time that an encoder's network is at work."""

    def __init__(self, encoder: VideoEncoder) -> None:
        self.seconds = 0.0
        self._encode = encoder.encode_clips
        encoder.encode_clips = self  # type: ignore[assignment,method-assign]

    def __call__(self, clips: Sequence[np.ndarray], scaled: bool = True) -> np.ndarray:
        start = time.perf_counter()
        tokens = self._encode(clips, scaled)
        self.seconds += time.perf_counter() - start
        return tokens


def measure(encoder: VideoEncoder, path: Path) -> None:
    """Print the three rates and the encoder's share for one file."""
    start, processor = time.perf_counter(), time.process_time()
    clips = list(clips_of_seconds(decode_seconds(path, encoder.frame_format), encoder.frame_offsets))
    decoding, cores = time.perf_counter() - start, time.process_time() - processor
    encoder.encode_clips(np.stack(clips[: encoder.clips_at_once]))  # the folded copy is made at the first call
    start = time.perf_counter()
    for first in range(0, len(clips), encoder.clips_at_once):
        encoder.encode_clips(np.stack(clips[first : first + encoder.clips_at_once]))
    encoding = time.perf_counter() - start
    if next(encoder.parameters()).device.type == "cuda":
        measure_shared(encoder, clips)
    busy = BusyEncoder(encoder)
    start = time.perf_counter()
    encoder.encode_video(path)
    whole = time.perf_counter() - start
    del encoder.encode_clips
    share = 100 * busy.seconds / whole
    print(
        f"{path.name:20s} {encoder.name:8s} decode {len(clips) / decoding:7.1f} (a core {len(clips) / cores:6.1f})   "
        f"encode {len(clips) / encoding:7.2f}   whole {len(clips) / whole:7.2f} s/s   encoder busy {share:5.1f}%"
    )


def measure_shared(encoder: VideoEncoder, clips: list[np.ndarray], videos: int = 16) -> None:
    """Print the rate of a GPU whose batches are filled from many videos, with and without compilation."""
    for backend in ("", "inductor"):
        for size in (16, 64, 128):
            with SharedBatches(encoder, size, backend) as shared:
                shared.encode_all(iter(clips[:size]))
                start = time.perf_counter()
                with ThreadPoolExecutor(videos) as threads:
                    list(threads.map(lambda _: shared.encode_all(iter(clips)), range(videos)))
                rate = videos * len(clips) / (time.perf_counter() - start)
            print(f"{encoder.name:8s} batches of {size:3d}, {backend or 'as it is':8s} {rate:8.1f} s/s")


def main() -> None:
    """Measure every file with the chosen encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path)
    parser.add_argument("--encoder", choices=("x3d-tiny", "x3d-s", "s3d"), default="x3d-s")
    parser.add_argument("--seconds", type=int, default=40, help="length of the made video")
    parser.add_argument("--threads", type=int, default=1, help="of the network; one worker has one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder: VideoEncoder = S3D() if options.encoder == "s3d" else X3D(options.encoder.removeprefix("x3d-"))
    if torch.cuda.is_available():
        encoder.to("cuda").half()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.mp4"
        if not options.videos:
            make_video(made, options.seconds)
        for path in options.videos or [made]:
            measure(encoder, path)


if __name__ == "__main__":
    main()
