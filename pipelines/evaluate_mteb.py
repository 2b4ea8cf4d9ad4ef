"""Zero-shot evaluation by the field's own harness, mteb; needs `pip install 'videoclip[mteb]'`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from pipelines.figures import Figures
from videoclip.errors import InputError
from videoclip.evaluation.inputs import open_model
from videoclip.files import write_json
from videoclip.two_towers import EncodesFiles


@dataclass(frozen=True)
class MTEBConfig:
    """Run video retrieval tasks of mteb on a model. Their data comes from the hub, by mteb itself."""

    model: Path
    """Folder of a trained model, with its frozen encoder; or `frozen`: the two-tower model that made --shards."""
    shards: Path | None = None
    """With --model frozen: the folder of shards that holds the model. Their videos are not looked at."""
    tasks: tuple[str, ...] = ("YouCook2T2VRetrieval", "MSRVTTT2V", "DiDeMoT2VRetrieval")
    """Names of mteb's tasks; any whose inputs are texts and videos."""
    benchmark: str = ""
    """A whole benchmark of mteb's in place of the tasks, for instance "MVEB(text, video)"."""
    output: Path = Path("runs/evaluation/mteb/metrics.json")
    """The main score and R@K of every task; mteb's own files go to the folder `results` beside it."""
    videos_at_once: int = 32
    """Rows that mteb hands over together."""


def evaluate_mteb(config: MTEBConfig) -> Figures:
    """Run the tasks; returns the metrics that it writes.

    Raises InputError if mteb is not installed or knows no such task.
    """
    mteb = _mteb()
    try:
        benchmark = mteb.get_benchmark(config.benchmark) if config.benchmark else None
        tasks = list(benchmark.tasks) if benchmark else [mteb.get_task(name) for name in config.tasks]
    except KeyError as error:
        kind = "benchmark" if config.benchmark else "task"
        raise InputError(f"mteb knows no such {kind}: {str(error).strip(chr(34)).removeprefix('KeyError: ')}") from None
    model, digest = open_model(config.model, config.shards)
    if not isinstance(model, EncodesFiles):
        raise InputError(f"{config.model}: a model that reads frames, not a video's tokens, which mteb cannot give it")
    return run_tasks_of_mteb(model, digest[:12], tasks, config)


def _mteb() -> ModuleType:
    """The package, which is an extra. Raises InputError if it is not installed."""
    try:
        return import_module("mteb")
    except ImportError:
        raise InputError("mteb is not installed; run: pip install 'videoclip[mteb]'") from None


def run_tasks_of_mteb(model: EncodesFiles, revision: str, tasks: list[Any], config: MTEBConfig) -> Figures:
    """Run task objects, which may be of one's own making; as `evaluate_mteb`. `revision` tells weights apart."""
    mteb = _mteb()
    from videoclip.evaluation.mteb_model import VideoCLIPForMTEB  # it imports mteb, too

    name = re.sub(r"[^\w.-]", "-", config.model.resolve().name)
    adapter: Any = VideoCLIPForMTEB(model, f"videoclip/{name}", revision or "local")
    options: Any = {"batch_size": config.videos_at_once}
    results = mteb.evaluate(
        adapter,
        tasks,
        cache=mteb.ResultCache(config.output.parent),
        encode_kwargs=options,
        co2_tracker=False,
    )
    metrics = {}
    for result in results.task_results:
        scores = next(iter(result.scores.values()))[0]
        metrics[result.task_name] = {
            "main_score": round(100 * scores["main_score"], 2),
            **{f"R@{k}": round(100 * scores[f"recall_at_{k}"], 2) for k in (1, 5, 10) if f"recall_at_{k}" in scores},
        }
    write_json(config.output, metrics)
    return Figures(metrics)
