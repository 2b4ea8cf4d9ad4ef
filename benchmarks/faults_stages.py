"""The stages under faults: `python -m benchmarks.faults stages` breaks something while a command runs, and looks again.

A run of the campaign is one stage into a new folder: the command is started, a fault happens to it at a random time,
and the same command is given again until it is done, as a person or a job script would. The result must be that of the
same command undisturbed: the same bytes; of a training, else, weights that differ by less than 1e-5. A flipped bit may
instead be noticed: refused in a line that names the folder or the file.

Everything is a command and what it left in its folder; nothing here knows how a stage works inside. Linux only.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.fault_commands import FAULTS, Command, SmallDisk, Stage
from benchmarks.ray_nodes import RayNodes
from videoclip.data.shards import Shards
from videoclip.errors import InputError
from videoclip.files import write_json
from videoclip.synthetic.kitchen import KitchenConfig, plan_kitchen, render_video, write_annotations

ATTEMPTS = 6
SAME_FIGURES = 1e-5
OF_THE_PLACE = ("disk full", "node lost, node joins")  # these need a disk or a cluster of their own
ALL = (*FAULTS, *OF_THE_PLACE)
GOOD = ("same bytes", "same figures", "noticed")


@dataclass
class World:
    """A small corpus, the stages on it, and what each ends in when nothing happens: digests by file, and seconds."""

    folder: Path
    stages: dict[str, Stage] = field(default_factory=dict)
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def reference(self, stage: Stage) -> Path:
        """The undisturbed result, made where it is not there yet."""
        self.stages[stage.name] = stage
        output = self.folder / "undisturbed" / stage.name
        command = Command(stage, output)
        start = time.monotonic()
        code = command.end()
        if code:
            raise InputError(f"{stage.name} does not even run undisturbed: {command.last_line()}")
        self.seconds[stage.name] = time.monotonic() - start
        self.expected[stage.name] = digests(output, stage.results)
        return output


def make_world(folder: Path, videos: int, epochs: int) -> World:
    """Render videos and run all four stages on them, one after the other."""
    world, corpus = World(folder), folder / "corpus"
    kitchen = KitchenConfig(train_videos=videos, test_videos=1, recipes=2, seconds=28)
    plan = plan_kitchen(kitchen)
    for video in plan:
        render_video(video, corpus / video.split / "videos")
    write_annotations(plan, kitchen, corpus)
    train = corpus / "train"
    tokens = world.reference(extraction(train / "videos", train / "raw_caption.json"))
    run = world.reference(pretraining(tokens, folder / "pretrain.yaml", epochs))
    world.reference(indexing(run / "model", tokens))
    world.reference(clustering(run / "model", tokens))
    return world


def extraction(videos: Path, captions: Path) -> Stage:
    """`videoclip extract` with a tiny encoder, three videos a part."""
    words = f"extract --videos {videos} --captions {captions} --encoder x3d-tiny --calibration-clips 24"
    return Stage("extract", [*words.split(), "--videos-per-part", "3"], videos, ("*.arrow", "video_encoder*"))


def pretraining(shards: Path, options: Path, epochs: int) -> Stage:
    """`videoclip pretrain` of a tiny model, a checkpoint about every second."""
    values = {
        **{"shards": str(shards), "epochs": epochs, "videos_per_batch": 3, "vocabulary": 300, "threads": 1},
        **{"checkpoint_minutes": 0.02, "checkpoints_kept": 3, "model": {"width": 32, "layers": 1, "heads": 2}},
        **{"clips": {"clips_per_video": 4, "max_words": 24, "max_seconds": 16}},
    }
    write_json(options, values)
    return Stage("pretrain", ["pretrain", "--config", str(options)], shards, ("model/model.safetensors",))


def indexing(model: Path, shards: Path) -> Stage:
    """`videoclip index` of the shards."""
    words = ["index", "--model", str(model), "--shards", str(shards)]
    return Stage("index", words, shards, ("blocks/*.npy", "*.faiss", "archive.sqlite"))


def clustering(model: Path, shards: Path) -> Stage:
    """`videoclip cluster` of the shards."""
    words = ["cluster", "--model", str(model), "--shards", str(shards), "--videos-per-batch", "4"]
    return Stage("cluster", words, shards, ("embeddings.npy", "video_ids.json", "batches.json"))


def digests(folder: Path, patterns: Sequence[str]) -> dict[str, str]:
    """SHA-256 of every file of a result by its name; of a database, of what stands in it."""
    found = {}
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        data = path.read_bytes()
        if path.suffix == ".sqlite":
            with contextlib.closing(sqlite3.connect(path)) as connection:
                data = "\n".join(connection.iterdump()).encode()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


# --- Runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How one run ended: `kind` is "same bytes", "same figures", "noticed", or says what is wrong."""

    stage: str
    fault: str
    kind: str
    happened: bool
    attempts: int
    lost: float
    """Seconds beyond those of the undisturbed command."""

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost but time."""
        return self.kind in GOOD


def run(world: World, stage: Stage, fault: str, seed: int) -> Outcome:
    """One stage with one fault at a random time, to its end."""
    generator = np.random.default_rng([seed, *stage.name.encode(), *fault.encode()])
    moment = generator.uniform(0.15, 0.9) * world.seconds[stage.name]
    output = world.folder / "disturbed" / f"{stage.name}-{seed:03d}"
    shutil.rmtree(output, ignore_errors=True)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        if fault == "disk full":
            disk = stack.enter_context(SmallDisk(output, world.folder / "undisturbed" / stage.name, generator))
        cluster = stack.enter_context(RayNodes()) if fault == "node lost, node joins" else None
        if cluster:
            cluster.add()
            cluster.add()
        address = cluster.address if cluster else ""
        code, attempts, happened = 1, 0, False
        while code and attempts < ATTEMPTS:
            attempts += 1
            command = Command(stage, output, address)
            if attempts == 1:
                happened = _disturb(command, fault, moment, generator, cluster)
            code = command.end()
            if fault == "disk full" and attempts == 1:
                happened = code != 0
                disk.grow()
            if code == 2 and fault == "bit flipped":
                break
        lost = time.monotonic() - start - world.seconds[stage.name]
        kind = _kind(world, stage, output, fault, code, command.last_line())
    return Outcome(stage.name, fault, kind, happened, attempts, lost)


def _disturb(
    command: Command, fault: str, moment: float, generator: np.random.Generator, cluster: RayNodes | None
) -> bool:
    """Wait for the moment, and let it happen; whether it did."""
    if fault == "disk full":
        return True
    try:
        command.process.wait(moment)
        return False  # over before anything happened
    except subprocess.TimeoutExpired:
        pass
    while cluster is None and command.process.poll() is None:
        if FAULTS[fault](command, generator):
            return True
        time.sleep(0.1)  # no worker has started yet
    if cluster is None:
        return False
    cluster.nodes[generator.integers(len(cluster.nodes))].lose()
    cluster.add()
    return True


def _kind(world: World, stage: Stage, output: Path, fault: str, code: int, last_line: str) -> str:
    named = str(output) in last_line or any(path.name in last_line for path in output.rglob("*.*"))
    if fault == "bit flipped" and code == 2 and named:
        return "noticed"
    if code:
        return f"exit code {code}: {last_line}"
    found, expected = digests(output, stage.results), world.expected[stage.name]
    differing = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if not differing:
        return "same bytes"
    if fault == "bit flipped" and stage.name == "extract":
        try:
            Shards(output, verify=True)
        except InputError:
            return "noticed"  # by whoever reads the shards
    if stage.name == "pretrain":
        difference = _largest_difference(output, world.folder / "undisturbed" / stage.name)
        return "same figures" if difference < SAME_FIGURES else f"weights differ by {difference:.1e}"
    return f"differs: {', '.join(differing)}"


def _largest_difference(run: Path, other: Path) -> float:
    from safetensors.torch import load_file

    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (run, other))
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in two)


def campaign(
    world: World, names: Sequence[str], faults: Sequence[str], count: int, seed: int, minutes: float = 0
) -> list[Outcome]:
    """`count` runs of every stage, the faults in turn; each is printed as it ends, and all together as a table.

    After so many `minutes`, where these are given, no other run begins.
    """
    outcomes: list[Outcome] = []
    start = time.monotonic()
    for number in range(count):
        for name in names:
            if minutes and time.monotonic() - start > 60 * minutes:
                continue
            outcome = run(world, world.stages[name], faults[number % len(faults)], seed + number)
            outcomes.append(outcome)
            print(
                f"{name:10s}{outcome.fault:24s}{outcome.kind:16s}{outcome.attempts} starts, {outcome.lost:6.1f} s lost"
                + ("" if outcome.happened else " (nothing was hit)"),
                flush=True,
            )
    print(table(world, outcomes))
    return outcomes


def table(world: World, outcomes: Sequence[Outcome]) -> str:
    """The campaign as it stands in docs/scale.md."""
    lines = ["| stage | undisturbed | faults that hit | same bytes | same figures | noticed | lost: median, most |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(outcome.stage for outcome in outcomes):
        of_stage = [outcome for outcome in outcomes if outcome.stage == name]
        kinds = [
            sum(outcome.kind == kind for outcome in of_stage) for kind in ("same bytes", "same figures", "noticed")
        ]
        lost = [outcome.lost for outcome in of_stage]
        hit = sum(outcome.happened for outcome in of_stage)
        words = [f"{world.seconds[name]:.0f} s", f"{hit} of {len(of_stage)}", *map(str, kinds)]
        lines.append(f"| {name} | {' | '.join(words)} | {np.median(lost):.0f} s, {max(lost):.0f} s |")
    good = sum(outcome.is_good for outcome in outcomes)
    return "\n".join([*lines, "", f"{good} of {len(outcomes)} ended as if nothing had been, or said what is broken"])
