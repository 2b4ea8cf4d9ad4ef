"""One pool of Ray actors for a whole run: jobs go to whoever is free, and come back whatever becomes of a worker.

There is no barrier: an actor works as soon as it is ready, a machine that joins later brings more of them, and a job
that takes long delays nobody else's. An actor is given as many jobs as it has threads, never one to wait behind
another. When an actor dies, its jobs are done again, each of them alone on a worker, so that the one that kills workers
is known by its third death, and no other is blamed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from videoclip.errors import InputError

DEATHS = 3  # of workers over one job, in one run, after which it is given up
MAINTENANCE = 10.0  # seconds between two looks at what the cluster has
FAILED_STARTS = 3  # of workers that die before they are ready, one after the other


class Job(Protocol):
    """Something for a worker to do. Two jobs are equal only if they are the same."""

    deaths: int
    beside: bool
    """Done beside a worker's other jobs, for instance writing; it takes nobody's place."""

    def start(self, actor: Any) -> Any:
        """Call the actor; returns the reference to its answer."""


@dataclass(eq=False)
class Worker:
    """One actor, and what it has to do. `device` is what it said when it was ready."""

    actor: Any
    device: str = ""
    jobs: list[Job] = field(default_factory=list)
    reserved: bool = False

    @property
    def busy(self) -> int:
        """How many of its places are taken."""
        return sum(not job.beside for job in self.jobs)


@dataclass(frozen=True)
class Answer:
    """What became of a job: its value, or what was raised; `gave_up` after too many deaths."""

    job: Job
    value: Any = None
    error: BaseException | None = None
    gave_up: bool = False


class Pool:
    """Actors made by `make`, as many as `wanted()` says at the time, each with `places` jobs at once."""

    def __init__(self, make: Callable[[], Any], wanted: Callable[[], int], places: int) -> None:
        self._make, self._wanted, self.places = make, wanted, places
        self._workers: list[Worker] = []
        self._starting: dict[Any, Worker] = {}
        self._pending: dict[Any, tuple[Job, Worker]] = {}
        self._queue: deque[Job] = deque()
        self._alone: deque[Job] = deque()
        self._looked = -MAINTENANCE
        self._failed_starts = 0
        self.deaths = 0
        self.devices_seen: set[str] = set()

    @property
    def devices(self) -> list[str]:
        """Of the workers that are ready."""
        return [worker.device for worker in self._workers]

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self._queue or self._alone or self._pending)

    def has_room(self) -> bool:
        """Whether some worker has, or soon will have, nothing else to do than another job."""
        count = len(self._workers) or len(self._starting) or 1
        waiting = len(self._queue) + sum(not job.beside for job, _ in self._pending.values())
        return waiting < count * self.places + 1

    def add(self, job: Job, first: bool = False) -> None:
        """Take a job; `first` before those that wait."""
        (self._queue.appendleft if first else self._queue.append)(job)

    def next(self, patience: float = 1.0) -> list[Answer]:
        """Hand out jobs and wait for answers; empty where none came within `patience` seconds.

        Raises InputError if workers cannot be started.
        """
        self._maintain()
        self._hand_out()
        references = [*self._pending, *self._starting]
        ready, _ = ray.wait(references, num_returns=1, timeout=patience) if references else ([], [])
        if ready:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return [answer for reference in ready for answer in self._take(reference)]

    def close(self) -> None:
        """End all actors."""
        for worker in [*self._workers, *self._starting.values()]:
            ray.kill(worker.actor)
        self._workers, self._starting, self._pending = [], {}, {}

    def _maintain(self) -> None:
        if time.monotonic() - self._looked < MAINTENANCE:
            return
        self._looked = time.monotonic()
        for _ in range(max(1, self._wanted()) - len(self._workers) - len(self._starting)):
            worker = Worker(self._make())
            self._starting[worker.actor.ready.remote()] = worker

    def _hand_out(self) -> None:
        self._hand_out_alone()
        waiting: deque[Job] = deque()
        while self._queue:
            job = self._queue.popleft()
            open_to = [worker for worker in self._workers if job.beside or self._has_place(worker)]
            if not open_to:
                waiting.append(job)
                if not any(job.beside for job in self._queue):
                    break
                continue
            self._start(job, min(open_to, key=lambda worker: len(worker.jobs)))
        self._queue.extendleft(reversed(waiting))

    def _hand_out_alone(self) -> None:
        """Jobs that workers died over, on workers that do nothing else; a quarter of all at most are kept for that."""
        reserved = [worker for worker in self._workers if worker.reserved]
        free = sorted((worker for worker in self._workers if not worker.reserved), key=lambda worker: worker.busy)
        limit = min(len(self._alone) + sum(worker.busy > 0 for worker in reserved), max(1, len(self._workers) // 4))
        for worker in free[: max(0, limit - len(reserved))] if self._alone else []:
            worker.reserved = True
            reserved.append(worker)
        for worker in reserved:
            if self._alone and not worker.busy:
                self._start(self._alone.popleft(), worker)

    def _has_place(self, worker: Worker) -> bool:
        return not worker.reserved and worker.busy < self.places

    def _start(self, job: Job, worker: Worker) -> None:
        worker.jobs.append(job)
        self._pending[job.start(worker.actor)] = job, worker

    def _take(self, reference: Any) -> list[Answer]:
        """What a finished reference means."""
        if reference in self._starting:
            self._begin(reference, self._starting.pop(reference))
            return []
        job, worker = self._pending.pop(reference)
        worker.jobs.remove(job)
        try:
            value = ray.get(reference)
        except RayActorError as error:
            self._lose(worker)
            return self._after_death(job, error)
        except RayTaskError as error:
            self._free(worker)
            return [Answer(job, error=error.cause or error)]
        except ray.exceptions.RayError as error:
            self._free(worker)
            return [Answer(job, error=error)]
        self._free(worker)
        return [Answer(job, value)]

    def _begin(self, reference: Any, worker: Worker) -> None:
        try:
            worker.device = ray.get(reference)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, InputError) else error) from None
        except RayActorError as error:
            self._failed_starts += 1
            self._looked = -MAINTENANCE
            if self._failed_starts == FAILED_STARTS:
                reason = " ".join(str(error).split())[:300]
                raise InputError(f"workers die before they are ready: {reason}") from None
            return
        self._failed_starts = 0
        self._workers.append(worker)
        self.devices_seen.add(worker.device)

    def _free(self, worker: Worker) -> None:
        """A worker on whom a suspect job was done alone takes part again, unless the next suspect waits."""
        if worker.reserved and not worker.busy and not self._alone:
            worker.reserved = False

    def _lose(self, worker: Worker) -> None:
        if worker in self._workers:
            self.deaths += 1
            self._workers.remove(worker)
            ray.kill(worker.actor)  # one that is merely out of reach must not come back
            self._looked = -MAINTENANCE

    def _after_death(self, job: Job, error: BaseException) -> list[Answer]:
        job.deaths += 1
        if job.deaths >= DEATHS:
            return [Answer(job, error=error, gave_up=True)]
        is_alone_anyway = job.beside or self.places == 1
        (self._queue if is_alone_anyway else self._alone).append(job)
        return []


def actors_that_fit(cpus: float, gpus: float) -> int:
    """How many actors of these sizes the machines of the cluster have room for, each on one of them."""
    total = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            fits = [has.get(kind, 0) / share for kind, share in (("CPU", cpus), ("GPU", gpus)) if share > 0]
            total += int(min(fits) + 1e-6) if fits else 0
    return total


def cpus_beside_a_gpu(gpus: float) -> int:
    """How many CPUs there are for an actor of so many GPUs, on the machine that has fewest."""
    shares = [
        node["Resources"].get("CPU", 1) * gpus / node["Resources"]["GPU"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU", 0) > 0
    ]
    return max(1, int(min(shares, default=1) + 1e-6))
