"""A stage's command as a process with all that runs below it, and what can happen to these: see `faults_stages.py`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
MARK = "VIDEOCLIP_FAULTS"  # in the environment of all processes of a command, by which leftovers are found
PATIENCE = 240.0  # seconds after which a command counts as one that hangs


@dataclass(frozen=True)
class Stage:
    """A command: its words without `--output`, the folder that it reads, and the files that are its result."""

    name: str
    words: list[str]
    reads: Path
    results: tuple[str, ...]


class Command:
    """One start of a stage's command, with everything that runs below it."""

    def __init__(self, stage: Stage, output: Path, address: str = "") -> None:
        self.stage, self.output, self.nodes = stage, output, list[psutil.Process]()
        output.parent.mkdir(parents=True, exist_ok=True)
        self.log = output.with_name(f"{output.name}.log")
        self._mark = uuid.uuid4().hex
        words = [*stage.words, "--output", str(output), *(["--address", address] if address else [])]
        with open(self.log, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.cli", *words],
                cwd=ROOT,
                env={**os.environ, MARK: self._mark, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def children(self, name: str) -> list[psutil.Process]:
        """Processes of the command, or of its cluster's nodes, whose command line begins like this or ends in it."""
        found = list(self.nodes)
        with contextlib.suppress(psutil.NoSuchProcess):
            found += psutil.Process(self.process.pid).children(recursive=True)
        matching = []
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                program = process.cmdline()[0]
                if program.startswith(name) or program.endswith(f"/{name}"):
                    matching.append(process)
        return matching

    def workers(self) -> list[psutil.Process]:
        """Ray's processes that hold a task or an actor."""
        return [process for process in self.children("ray::") if "IDLE" not in process.name()]

    def end(self, patience: float = PATIENCE) -> int:
        """Wait for it; the exit code, or 124 for one that hangs. Nothing of it is left then."""
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            code = 124
        for process in [psutil.Process(self.process.pid)] if code == 124 else []:
            process.kill()
        self._sweep()
        return code

    def last_line(self) -> str:
        """What it said last."""
        return self.log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]

    def _sweep(self) -> None:
        """End what the command left: Ray's processes end by themselves when it does, within seconds."""
        deadline = time.monotonic() + 10
        while (left := self._marked()) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _marked(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


# --- Faults -------------------------------------------------------------------------------------------------------

Fault = Callable[[Command, np.random.Generator], bool]
"""Does something to a running command; whether there was anything to do it to."""


def _one_of(processes: list[psutil.Process], generator: np.random.Generator) -> psutil.Process | None:
    return processes[generator.integers(len(processes))] if processes else None


def _signalled(process: psutil.Process | None, number: signal.Signals) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        if process is not None:
            process.send_signal(number)
            return True
    return False


def kill_worker(command: Command, generator: np.random.Generator) -> bool:
    """SIGKILL to one of Ray's processes that work, as when memory runs out."""
    return _signalled(_one_of(command.workers(), generator), signal.SIGKILL)


def kill_raylet(command: Command, generator: np.random.Generator) -> bool:
    """SIGKILL to Ray's own daemon on a machine."""
    return _signalled(_one_of(command.children("raylet"), generator), signal.SIGKILL)


def kill_command(command: Command, _: np.random.Generator) -> bool:
    """SIGKILL to the command itself."""
    return _signalled(psutil.Process(command.process.pid), signal.SIGKILL)


def terminate_command(command: Command, _: np.random.Generator) -> bool:
    """SIGTERM to the command, as Slurm and spot machines send it."""
    return _signalled(psutil.Process(command.process.pid), signal.SIGTERM)


def stop_process(command: Command, generator: np.random.Generator) -> bool:
    """SIGSTOP to the command, a worker or a raylet, and SIGCONT two to eight seconds later: a machine that stalls."""
    processes = [psutil.Process(command.process.pid), *command.workers(), *command.children("raylet")]
    chosen = _one_of(processes, generator)
    stopped = _signalled(chosen, signal.SIGSTOP)
    time.sleep(generator.uniform(2, 8))
    _signalled(chosen, signal.SIGCONT)
    return stopped


def flip_bit(command: Command, generator: np.random.Generator) -> bool:
    """SIGKILL to the command once it has finished something, of which one bit is turned then: a bad disk."""

    def finished() -> list[Path]:
        return [path for pattern in FINISHED for path in sorted(command.output.glob(pattern)) if path.stat().st_size]

    while not finished() and command.process.poll() is None:
        time.sleep(0.02)
    command.process.kill()
    command.end()
    files = finished()
    if not files:
        return False
    path = files[generator.integers(len(files))]
    data = bytearray(path.read_bytes())
    data[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
    path.write_bytes(data)
    return True


FINISHED = ("*.arrow", "checkpoints/epoch-*/share-*", "blocks/*.npy", "embedded-*.npz")


def storage_away(command: Command, generator: np.random.Generator) -> bool:
    """The folder that the command reads is gone for one to four seconds: a mount that comes back."""
    away = command.stage.reads.with_name("away")
    command.stage.reads.rename(away)
    time.sleep(generator.uniform(1, 4))
    away.rename(command.stage.reads)
    return True


FAULTS: dict[str, Fault] = {
    "worker killed": kill_worker,
    "raylet killed": kill_raylet,
    "command killed": kill_command,
    "SIGTERM": terminate_command,
    "process stopped": stop_process,
    "bit flipped": flip_bit,
    "storage away": storage_away,
}


class SmallDisk:
    """A file system of its own for one output, too small for what an undisturbed run left there, until it grows."""

    def __init__(self, folder: Path, like: Path, generator: np.random.Generator) -> None:
        self.folder = folder
        needed = sum(path.stat().st_blocks * 512 for path in like.rglob("*") if path.is_file())
        self._size = int(needed * generator.uniform(0.1, 0.9)) + 4096

    def __enter__(self) -> SmallDisk:
        self.folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", str(self.folder)], check=True)
        return self

    def grow(self) -> None:
        """Room enough."""
        subprocess.run(["mount", "-o", "remount,size=1g", str(self.folder)], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
