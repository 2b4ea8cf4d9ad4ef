"""Ray, quietly: a session on this machine or on a cluster, and tasks under a progress bar."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.data  # sets up its logger, whose level is lowered below
import ray.train
from tqdm import tqdm

from videoclip.errors import InputError


@contextlib.contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Join the Ray cluster at `address`, or start one on this machine and stop it afterwards.

    Without an address this machine is meant, even where RAY_ADDRESS names a cluster or the machine is part of one.
    Inside another session (the demo runs several stages in one) nothing is started or stopped.
    Raises InputError if the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Workers must find these packages also when they run from a source tree that is not installed.
    paths = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {"env_vars": {"PYTHONPATH": paths.rstrip(os.pathsep), "PYTHONWARNINGS": "ignore"}}
    try:
        with _silent_stderr():
            if address:
                ray.init(address=address, runtime_env={"env_vars": {"PYTHONWARNINGS": "ignore"}}, **quiet)
            else:
                local: dict[str, Any] = {
                    "address": "local",
                    "include_dashboard": False,
                    "object_store_memory": 512 * 2**20,
                }
                ray.init(runtime_env=environment, **local, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"no Ray cluster at {address or 'this machine'}: {reason}") from None
    # Ray Data and Ray Train announce every step; the stages have their own progress.
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what Ray's C++ parts print while they start; what goes wrong is raised as well."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def cluster_processors() -> int:
    """How many CPUs the Ray session has, at least one."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def missing_resources(count: int, kinds: Sequence[str] = ("CPU",)) -> str:
    """What the Ray session has too little of for `count` processes, with both numbers; empty if all find a place.

    Ray itself would wait for ever, in silence, for a machine that brings the rest.
    """
    has = ray.cluster_resources()
    return " and ".join(
        f"{count} {kind}s are needed and Ray has {has.get(kind, 0):g}" for kind in kinds if has.get(kind, 0) < count
    )


def refuse_missing(workers: int, missing: str) -> None:
    """Raises InputError if `missing_resources` found something."""
    if missing:
        raise InputError(f"--workers {workers}: {missing}; ask for fewer workers, or join a larger cluster")


def run_interruptibly(function: Callable[[], Any], watch: Callable[[], None], seconds: float = 2) -> None:
    """Call `function` in a thread of its own, and `watch` every few seconds until it is done.

    Ray Train answers Ctrl-C itself where it is called in the main thread: it aborts the run, and the caller cannot
    tell that from a failure. From here Ctrl-C is a KeyboardInterrupt as everywhere else. Whatever `function` or
    `watch` raises is raised; after an error of `watch` or Ctrl-C, `function` is left to the end of the Ray session.
    """
    errors: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(seconds)
        watch()
    if errors:
        raise errors[0]


def run_tasks(
    function: Callable[..., int], arguments: Sequence[tuple[Any, ...]], done: int, total: int, unit: str, what: str
) -> None:
    """Call `function` with each tuple of arguments, as Ray tasks of one CPU, under a progress bar named `what`.

    A call returns how many units it did; `done` of the `total` were there before. What a task raises is raised here.
    """
    task = ray.remote(num_cpus=1)(function)
    pending = [task.remote(*values) for values in arguments]
    with tqdm(total=total, initial=done, unit=unit, desc=what) as bar:
        while pending:
            finished, pending = ray.wait(pending)
            bar.update(sum(ray.get(finished)))
