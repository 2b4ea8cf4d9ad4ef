"""What happens to us when the world is broken. One subcommand a kind of fault; each prints a table of outcomes.

`files`: video files with bytes turned, cut out, doubled, zeroed or exchanged, as bad disks, broken downloads and
strangers make them. Each is decoded as extraction decodes it, in a process that may die of it. Every file must end in
seconds of frames or in one line that says why not; everything else is counted as a fault, its file kept with `--keep`,
and the exit code is 1. Linux only, for the memory.

`stages`: extract, pretrain, index and cluster, each killed, stopped, starved of disk and storage, robbed of a node, its
files damaged, at random times, and given again until it is done: see `faults_stages.py`. About a minute a run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from videoclip.data.video import FrameFormat, decode_seconds
from videoclip.errors import InputError

CONTAINERS = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "ts": "libx264", "avi": "mpeg4"}
FRAME_FORMAT = FrameFormat(8, 32)
HANGING = 60.0  # seconds after which a file counts as one that never ends
EDGES = (b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x00\x00\x01", b"\x80\x00\x00\x00", b"\x00\x78\x00\x00")


@dataclass(frozen=True)
class Outcome:
    """How one broken file ended: `kind` is "frames", "refused", or the name of a fault; peak memory in bytes."""

    kind: str
    detail: str
    video_seconds: int
    took: float
    memory: int


# --- Broken files -------------------------------------------------------------------------------------------------


def write_whole_files(folder: Path, seconds: int = 3, rate: int = 10, size: int = 64) -> list[Path]:
    """Write one good video for each of the CONTAINERS: a wave that moves, with a tone where the container has one."""
    import av

    rows, columns = np.mgrid[0:size, 0:size]
    paths = []
    for suffix, codec in CONTAINERS.items():
        paths.append(folder / f"whole.{suffix}")
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
            sound = container.add_stream("libopus" if suffix == "webm" else "aac", rate=48000)
            for number in range(seconds * rate):
                wave = 127 + 100 * np.sin((columns + 3 * number) / 7) * np.cos(rows / 5)
                picture = np.repeat(wave[..., None], 3, 2).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 48000 // rate), np.float32), "fltp", "mono")
                silence.sample_rate, silence.pts = 48000, number * 48000 // rate
                container.mux(sound.encode(silence))
            container.mux(stream.encode())
            container.mux(sound.encode())
    return paths


def broken(whole: bytes, generator: np.random.Generator) -> bytes:
    """`whole` after one to four mishaps, half of them in the first or last kilobyte, where headers and indices are.

    The same generator gives the same bytes.
    """
    data = bytearray(whole)
    for _ in range(generator.integers(1, 5)):
        MISHAPS[generator.integers(len(MISHAPS))](data, generator)
    return bytes(data)


def _place(data: bytearray, generator: np.random.Generator) -> int:
    end = max(len(data), 1)
    near_head, near_tail = int(generator.integers(min(end, 1024))), end - 1 - int(generator.integers(min(end, 1024)))
    return (near_head, near_tail, int(generator.integers(end)), int(generator.integers(end)))[generator.integers(4)]


def _turn_bytes(data: bytearray, generator: np.random.Generator) -> None:
    for _ in range(generator.integers(1, 9) if data else 0):
        data[_place(data, generator)] = generator.integers(256)


def _write_edge(data: bytearray, generator: np.random.Generator) -> None:
    """A number that is the smallest or the largest of its kind, as lengths and times are when they go wrong."""
    place, edge = _place(data, generator), EDGES[generator.integers(len(EDGES))]
    data[place : place + 4] = edge[: len(data[place : place + 4])]


def _zero(data: bytearray, generator: np.random.Generator) -> None:
    place = _place(data, generator)
    data[place : place + 64] = bytes(len(data[place : place + 64]))


def _cut_out(data: bytearray, generator: np.random.Generator) -> None:
    place = _place(data, generator)
    del data[place : place + generator.integers(1, 512)]


def _cut_off(data: bytearray, generator: np.random.Generator) -> None:
    del data[_place(data, generator) :]


def _double(data: bytearray, generator: np.random.Generator) -> None:
    place = _place(data, generator)
    data[place:place] = data[place : place + generator.integers(1, 512)]


def _exchange(data: bytearray, generator: np.random.Generator) -> None:
    one, other = _place(data, generator), _place(data, generator)
    length = min(32, len(data) - max(one, other))
    data[one : one + length], data[other : other + length] = data[other : other + length], data[one : one + length]


MISHAPS: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    _turn_bytes,
    _turn_bytes,
    _write_edge,
    _write_edge,
    _zero,
    _cut_out,
    _cut_off,
    _double,
    _exchange,
)


def broken_files(wholes: list[Path], folder: Path, count: int, seed: int) -> Iterator[Path]:
    """Write `count` broken files, the containers in turn; file n of a seed is the same however many there are."""
    contents = [path.read_bytes() for path in wholes]
    for number in range(count):
        path = folder / f"{number:06d}{wholes[number % len(wholes)].suffix}"
        path.write_bytes(broken(contents[number % len(wholes)], np.random.default_rng([seed, number])))
        yield path


def decode(path: Path) -> tuple[str, str, int]:
    """Decode a file as extraction does: ("frames" or "refused" or a fault, reason, seconds of frames)."""
    seconds = 0
    try:
        for _ in decode_seconds(path, FRAME_FORMAT):
            seconds += 1
    except InputError as error:
        return ("refused" if str(error) and "\n" not in str(error) else "not one line"), str(error), seconds
    except Exception as error:  # what a fault is: anything that does not end in one line for a person
        return type(error).__name__, str(error), seconds
    return ("frames" if seconds else "neither frames nor a reason"), "", seconds


def _decode_for(parent: Connection) -> None:
    """The child: decode every path that comes, answer with its outcome."""
    while path := parent.recv():
        _forget_peak_memory()
        start = time.perf_counter()
        answer = decode(path)
        parent.send((*answer, time.perf_counter() - start, _peak_memory()))


def _forget_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class Decoder:
    """A child process that decodes; when it dies or hangs over a file, that is the outcome, and a new one starts."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self._connection, other = self._context.Pipe()
        self._process = self._context.Process(target=_decode_for, args=(other,), daemon=True)
        self._process.start()
        other.close()

    def outcome(self, path: Path) -> Outcome:
        """Decode one file."""
        self._connection.send(path)
        try:
            if self._connection.poll(HANGING):
                return Outcome(*self._connection.recv())
            kind = "hangs"
        except EOFError:
            kind = "takes its process down"
        self.close()
        self._start()
        return Outcome(kind, "", 0, HANGING, 0)

    def close(self) -> None:
        """End the child."""
        self._process.kill()
        self._process.join()


def files(options: argparse.Namespace) -> int:
    """Decode broken files and print what became of them; 1 if there was a fault."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wholes = options.videos or write_whole_files(folder)
        decoder = Decoder()
        outcomes: list[tuple[Path, Outcome]] = []
        for path in broken_files(wholes, folder, options.count, options.seed):
            outcome = decoder.outcome(path)
            outcomes.append((path, outcome))
            if options.keep and outcome.kind not in ("frames", "refused"):
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / path.name).write_bytes(path.read_bytes())
            path.unlink()
        decoder.close()
    return report(outcomes)


def report(outcomes: list[tuple[Path, Outcome]]) -> int:
    """Print the table, the slowest, largest and longest files, and every fault; 1 if there was one."""
    kinds = sorted({outcome.kind for _, outcome in outcomes}, key=lambda kind: (kind != "frames", kind != "refused"))
    suffixes = sorted({path.suffix for path, _ in outcomes})
    counts = Counter((outcome.kind, path.suffix) for path, outcome in outcomes)
    print(f"{'outcome':28s}" + "".join(f"{suffix[1:]:>8s}" for suffix in suffixes) + f"{'all':>8s}")
    for kind in kinds:
        row = [counts[kind, suffix] for suffix in suffixes]
        print(f"{kind:28s}" + "".join(f"{number:8d}" for number in row) + f"{sum(row):8d}")
    print()
    for title, unit, value in (
        ("slowest", "s", lambda outcome: outcome.took),
        ("largest memory", "MB", lambda outcome: outcome.memory / 1e6),
        ("longest video", "s of frames", lambda outcome: float(outcome.video_seconds)),
    ):
        most = sorted(outcomes, key=lambda pair: -value(pair[1]))[:3]
        print(f"{title:16s}" + ", ".join(f"{value(outcome):.2f} {unit} ({path.name})" for path, outcome in most))
    faults = [(path, outcome) for path, outcome in outcomes if outcome.kind not in ("frames", "refused")]
    for path, outcome in faults:
        print(f"fault: {path.name}: {outcome.kind} {outcome.detail}")
    return int(bool(faults))


def stages(options: argparse.Namespace) -> int:
    """The campaign; 1 if a run ended otherwise than the undisturbed one."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is run as a file
    from benchmarks import faults_stages

    faults = options.faults or list(faults_stages.ALL)
    if os.geteuid() and "disk full" in faults:
        faults = [fault for fault in faults if fault != "disk full"]
        print("a disk that fills up needs a small file system, and root to mount it: left out")
    with tempfile.TemporaryDirectory() as name:
        world = faults_stages.make_world(options.work or Path(name), options.videos, options.epochs)
        outcomes = faults_stages.campaign(world, options.stages, faults, options.count, options.seed, options.minutes)
    return int(not all(outcome.is_good for outcome in outcomes))


def main() -> None:
    """Run one kind of fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    of_files = kinds.add_parser("files", help="video files with broken bytes")
    of_files.add_argument("videos", nargs="*", type=Path, help="good files to break; without any, five are made")
    of_files.add_argument("--count", type=int, default=3000)
    of_files.add_argument("--seed", type=int, default=0)
    of_files.add_argument("--keep", type=Path, help="folder for the files that were faults")
    of_files.set_defaults(run=files)
    of_stages = kinds.add_parser("stages", help="stages whose processes, disks and nodes fail")
    of_stages.add_argument("--stages", nargs="+", default=["extract", "pretrain", "index", "cluster"])
    of_stages.add_argument("--faults", nargs="+", help="names of faults; all in turn by default")
    of_stages.add_argument("--count", type=int, default=20, help="runs of each stage")
    of_stages.add_argument("--minutes", type=float, default=0, help="begin no run after so many; 0: no limit")
    of_stages.add_argument("--videos", type=int, default=12)
    of_stages.add_argument("--epochs", type=int, default=8)
    of_stages.add_argument("--seed", type=int, default=0)
    of_stages.add_argument("--work", type=Path, help="folder for all that is made, to be looked at afterwards")
    of_stages.set_defaults(run=stages)
    options = parser.parse_args()
    sys.exit(options.run(options))


if __name__ == "__main__":
    main()
