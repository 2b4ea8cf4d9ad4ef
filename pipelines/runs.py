"""Run folders: who writes them, what made them, what could not be used, metrics, and how long things took."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from pipelines.ray_session import cluster_processors, run_tasks
from videoclip.data.shards import FROZEN
from videoclip.errors import InputError
from videoclip.files import parse_json_lines, read_json, read_json_lines, sha256, sync, write_json, write_json_lines
from videoclip.remote import absolute

PACKAGES = (
    *("torch", "numpy", "ray", "transformers", "tokenizers", "faiss-cpu", "faiss-gpu", "pyarrow", "av"),
    "pytorchvideo",
)
QUARANTINE = "quarantine.jsonl"


LOCK = ".lock"
IDENTITY = "run.json"
TASKS_A_PROCESSOR = 4  # enough that a slow task does not leave the others idle, few enough to load the model seldom


class HasOutput(Protocol):
    """The options of a stage that writes a folder."""

    @property
    def output(self) -> Path: ...


Config = TypeVar("Config", bound=HasOutput)
Result = TypeVar("Result")
Rest = ParamSpec("Rest")


def writes_output(stage: Callable[Concatenate[Config, Rest], Result]) -> Callable[Concatenate[Config, Rest], Result]:
    """Decorate a stage: while it runs, it alone writes into the folder `config.output`."""

    @functools.wraps(stage)
    def alone(config: Config, /, *values: Rest.args, **named: Rest.kwargs) -> Result:
        with locked(config.output, stage.__name__):
            return stage(config, *values, **named)

    return alone


@contextlib.contextmanager
def locked(folder: Path, stage: str) -> Iterator[None]:
    """Hold a folder for one run. The operating system lets go of it when the run ends, however it ends.

    The lock belongs to one opening of the file: two threads refuse each other as two processes do, and Linux carries
    it to other machines over NFS. Where a file system has no locks, a line says so and the run goes on.
    Raises InputError, naming the run that is there, if another holds the folder.
    """
    import fcntl

    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:  # open for writing: NFS locks nothing else exclusively
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.seek(0)
                holder = file.read(200).strip() or "it has not said which"
                raise InputError(
                    f"{folder}: another run is writing here ({holder}); wait for it, or choose another --output"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            print(f"{folder}: this file system keeps no locks; start no second run into it", file=sys.stderr)
        file.truncate(0)
        file.write(f"{stage}, process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        except InputError:
            if is_new and [path.name for path in folder.iterdir()] == [LOCK]:  # refused before anything was written
                (folder / LOCK).unlink()
                folder.rmdir()
            raise


def refuse_other_run(folder: Path, identity: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> None:
    """Raises InputError if the folder holds a run of another identity (`run.json`: what makes two runs the same).

    `before` is the identity of the run there, where it is older than `run.json`.
    """
    path = Path(folder) / IDENTITY
    stored = read_json(path) if path.exists() else as_json(dict(before or {}))
    if not stored:
        return
    asked = as_json(dict(identity))
    differing = sorted(key for key in {*stored, *asked} if stored.get(key) != asked.get(key))
    if differing:
        raise InputError(
            f"{folder}: holds a run with other {', '.join(differing)}; give the same options to continue it, "
            "or another --output to start anew"
        )


def configuration_before(folder: Path, stage: str) -> dict[str, Any]:
    """The options of the last run of a stage into this folder, as JSON values; empty where there was none."""
    path = Path(folder) / f"{stage}.json"
    return dict(read_json(path)["configuration"]) if path.exists() else {}


def start_run(folder: Path, stage: str, config: Any, identity: Mapping[str, Any] | None = None) -> None:
    """Write into a run folder who the run is: `<stage>.json`, the resolved configuration and the versions that matter,
    and with `identity` also `run.json`, which later runs are held to.

    To be called once nothing else can be refused: what it writes speaks for the folder.
    Raises InputError if the folder holds a run of another identity.
    """
    if identity is not None:
        refuse_other_run(folder, identity)
        write_json(Path(folder) / IDENTITY, as_json(dict(identity)))
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    write_json(Path(folder) / f"{stage}.json", {"configuration": as_json(config), "versions": versions})


def as_json(value: Any) -> Any:
    """A dataclass and everything in it as JSON values; paths become strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: as_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def embed_parts(
    function: Callable[[Any, list[tuple[int, Path]]], int],
    config: Any,
    shards: Any,
    name: str,
    settings: str,
    what: str,
) -> list[Path]:
    """One file of embeddings for every part of the shards, in the order of the parts; those there already are kept.

    `function` is called, as a Ray task, with `config` (which has `model` and `output`) and several parts: of each its
    number and the path to write. It returns how many it did. A file's name says what it depends on: the model's
    weights, the part, and `settings`.
    """
    made_of = sha256(config.model / "model.safetensors")[:12]
    paths = [config.output / f"{name}-{made_of}-{part.digest[:12]}-{settings}.npz" for part in shards.manifest.parts]
    missing = [(number, path) for number, path in enumerate(paths) if not path.exists()]
    size = -(-len(missing) // (TASKS_A_PROCESSOR * cluster_processors())) or 1
    tasks = [(config, missing[first : first + size]) for first in range(0, len(missing), size)]
    run_tasks(function, tasks, len(paths) - len(missing), len(paths), "part", what)
    return paths


def with_absolute_paths(config: Any) -> Any:
    """The same configuration with every path absolute: Ray's workers run in a folder of their own."""
    values = {item.name: _absolute(getattr(config, item.name)) for item in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: value for name, value in values.items() if value is not None})


def _absolute(value: Any) -> Any:
    """A path, or several, made absolute; None for anything else."""
    if isinstance(value, tuple) and value and all(isinstance(item, Path) for item in value):
        return tuple(_absolute(item) for item in value)
    return absolute(value) if isinstance(value, Path) and str(value) != FROZEN else None


class Quarantine:
    """The list of what could not be used and why, appended to `quarantine.jsonl` and counted for the summary.

    A row has `video_id`, `what` is left out (video, file or captions), `kind` and `reason`. The kind is `input` where
    the file is to blame, and `crashed` where the work on it failed in any other way: a second attempt may succeed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / QUARANTINE
        self.rows: list[dict[str, Any]] = []
        self._size = 0  # bytes of whole lines; a run that was killed may have left half of one after them
        if self.path.exists():
            text = self.path.read_bytes()
            self._size = text.rfind(b"\n") + 1
            self.rows = parse_json_lines(text[: self._size].decode("utf-8", "replace").split("\n"), self.path)
        for row in self.rows:  # lists of older runs have no kinds
            row.setdefault("kind", "crashed" if "took its worker down" in row.get("reason", "") else "input")
        self._known = {(row.get("video_id"), row.get("reason")) for row in self.rows}
        self._saved = len(self.rows)

    def add(self, video_id: str, reason: str, what: str = "video", kind: str = "input") -> None:
        """Note one item, once, however often a run is repeated. It is on disk after the next `save`."""
        if (video_id, reason) not in self._known:
            self._known.add((video_id, reason))
            self.rows.append({"video_id": video_id, "what": what, "kind": kind, "reason": reason})

    def save(self) -> None:
        """Append what was added since the last time."""
        new = self.rows[self._saved :]
        if not new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new).encode()
        with open(self.path, "ab") as file:
            file.truncate(self._size)
            file.write(lines)
        sync(self.path)
        self._saved, self._size = len(self.rows), self._size + len(lines)

    def forget(self, **like: str) -> None:
        """Strike out the rows with these values, for instance kind="crashed"; the list is written anew, once."""
        kept = [row for row in self.rows if any(row.get(key) != value for key, value in like.items())]
        if len(kept) < len(self.rows):
            self.rows, self._saved = kept, len(kept)
            self._known = {(row.get("video_id"), row.get("reason")) for row in kept}
            write_json_lines(self.path, kept)
            self._size = self.path.stat().st_size

    def video_ids(self) -> set[str]:
        """Ids of the videos that are left out as a whole."""
        return {row["video_id"] for row in self.rows if row["what"] == "video"}

    def summary(self) -> str:
        """One clause for the end of a run, for instance `3 in quarantine (quarantine.jsonl)`."""
        crashed = sum(row["kind"] == "crashed" for row in self.rows)
        again = f", {crashed} of them crashed: --retry-crashed tries these again" if crashed else ""
        return f"{len(self.rows)} in quarantine ({self.path}){again}" if self.rows else "none in quarantine"


class Metrics:
    """Append metrics to `metrics.jsonl` and to TensorBoard events, one object a step."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Rows of steps from `first_step` on, left by a run that was killed after its last checkpoint, are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(folder) / "metrics.jsonl"
        rows = read_json_lines(self.path) if self.path.exists() else []
        write_json_lines(self.path, [row for row in rows if row["step"] < first_step])
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  # closed by close()
        self._writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=first_step)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write one row; `values` by name."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._writer.close()


class Stopwatch:
    """Seconds spent in named stretches of a run."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
