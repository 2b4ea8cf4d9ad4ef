"""Run folders: what made them, what could not be used, metrics, and how long things took."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines.ray_session import run_tasks
from videoclip.files import read_json_lines, sha256, write_json, write_json_lines

PACKAGES = (
    *("torch", "numpy", "ray", "transformers", "tokenizers", "faiss-cpu", "faiss-gpu", "pyarrow", "av"),
    "pytorchvideo",
)
QUARANTINE = "quarantine.jsonl"


def start_run(folder: Path, stage: str, config: Any) -> None:
    """Write `<stage>.json` into a run folder: the resolved configuration and the versions that matter."""
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
    function: Callable[[Any, int, Path], int], config: Any, shards: Any, name: str, settings: str, what: str
) -> list[Path]:
    """One file of embeddings for every part of the shards, in the order of the parts; those there already are kept.

    `function` is called with `config` (which has `model` and `output`), the part's number and the path to write. A
    file's name says what it depends on: the model's weights, the part, and `settings`.
    """
    made_of = sha256(config.model / "model.safetensors")[:12]
    paths = [config.output / f"{name}-{made_of}-{part.sha256[:12]}-{settings}.npz" for part in shards.manifest.parts]
    missing = [(config, number, path) for number, path in enumerate(paths) if not path.exists()]
    run_tasks(function, missing, len(paths) - len(missing), len(paths), "part", what)
    return paths


def with_absolute_paths(config: Any) -> Any:
    """The same configuration with every path absolute: Ray's workers run in a folder of their own."""
    paths = {
        item.name: getattr(config, item.name).resolve()
        for item in dataclasses.fields(config)
        if isinstance(getattr(config, item.name), Path)
    }
    return dataclasses.replace(config, **paths)


class Quarantine:
    """The list of what could not be used and why, kept in `quarantine.jsonl` and counted for the summary."""

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / QUARANTINE
        self.rows: list[dict[str, Any]] = read_json_lines(self.path) if self.path.exists() else []
        self._known = {(row.get("video_id"), row.get("reason")) for row in self.rows}

    def add(self, video_id: str, reason: str, what: str = "video") -> None:
        """Note one item, once, however often a run is repeated. `what` is left out: video, file or captions."""
        if (video_id, reason) not in self._known:
            self._known.add((video_id, reason))
            self.rows.append({"video_id": video_id, "what": what, "reason": reason})

    def save(self) -> None:
        """Write the list, if there is anything in it."""
        if self.rows:
            write_json_lines(self.path, self.rows)

    def video_ids(self) -> set[str]:
        """Ids of the videos that are left out as a whole."""
        return {row["video_id"] for row in self.rows if row["what"] == "video"}

    def summary(self) -> str:
        """One clause for the end of a run, for instance `3 in quarantine (quarantine.jsonl)`."""
        return f"{len(self.rows)} in quarantine ({self.path})" if self.rows else "none in quarantine"


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
