"""A training function on the workers of a Ray session: what they need, what is tried again, and what is final."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.ray_session import missing_resources, refuse_missing, run_interruptibly
from videoclip.errors import InputError

FINAL = (InputError, FloatingPointError)  # bad input, and a loss that is not finite: the next try would end the same


@dataclass(frozen=True)
class Workers:
    """How many training processes, on what, and how long a run bears to be without some of them."""

    count: int
    gpu: bool
    max_failures: int
    replacement_seconds: int

    def missing(self) -> str:
        """What the session has too little of, with both numbers; empty if all the workers find a place."""
        return missing_resources(self.count, ("CPU", "GPU") if self.gpu else ("CPU",))


def train_on_workers(
    function: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    workers: Workers,
    output: Path,
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Run `function(arguments)` on every worker to its end; dead workers are replaced.

    `watch` is called every few seconds; what it raises ends the run and is raised.

    Raises InputError if the session has too few resources, at the start or for `replacement_seconds` later on, and
    for what is final in a worker.
    """
    refuse_missing(workers.count, workers.missing())
    # Read by Ray Train's controller, which takes its environment from this process. It is how long a placement that
    # others' jobs stand in the way of is waited for; what is lost altogether, the watch below notices.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(workers.replacement_seconds)
    trainer = TorchTrainer(
        function,
        train_loop_config=arguments,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if workers.gpu else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=str(output),
            failure_config=ray.train.FailureConfig(
                max_failures=workers.max_failures,
                controller_failure_limit=workers.max_failures,  # type: ignore[call-arg]  # mypy sees the one of V1
            ),
            callbacks=[_final_errors()],
        ),
    )
    try:
        run_interruptibly(trainer.fit, _Watch(workers, watch))
    except Exception as error:
        raise _readable(error) from error


class _Watch:
    """Called every few seconds: gives up when the workers have had too few resources for too long."""

    def __init__(self, workers: Workers, watch: Callable[[], None]) -> None:
        self.workers, self.watch = workers, watch
        self.short_since = math.inf

    def __call__(self) -> None:
        self.watch()
        missing = self.workers.missing()
        if not missing:
            self.short_since = math.inf
            return
        self.short_since = min(self.short_since, time.monotonic())
        if time.monotonic() - self.short_since >= self.workers.replacement_seconds:
            raise InputError(
                f"workers were lost and not replaced within {self.workers.replacement_seconds} s: {missing}; "
                "the same command goes on from the last checkpoint"
            )


def _final_errors() -> Any:
    """A callback for Ray Train's controller; what a callback raises ends the run, where a worker's error does not."""

    class FinalErrors(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            found = _final(worker_exceptions.values())
            if found is not None:
                raise InputError(str(found))

    return FinalErrors()


def _final(errors: Iterable[BaseException]) -> BaseException | None:
    """The first final error among these and what they wrap: Ray hands a worker's error on in layers of its own."""
    todo, seen = list(errors), set[int]()
    while todo:
        error = todo.pop(0)
        if isinstance(error, FINAL):
            return error
        seen.add(id(error))
        inner = [getattr(error, name, None) for name in ("cause", "_base_exc", "controller_failure", "__cause__")]
        inner += getattr(error, "worker_failures", {}).values()
        todo += [each for each in inner if isinstance(each, BaseException) and id(each) not in seen]
    return None


def _readable(error: Exception) -> Exception:
    """One line for what is final and for workers that found no place; everything else stays as it is."""
    final = _final([error])
    if final is not None:
        return InputError(str(final))
    if type(getattr(error, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError":
        return InputError(
            "the workers found no free place in the Ray cluster in time: other jobs have taken it; "
            "try again later, or ask for fewer --workers"
        )
    return error
