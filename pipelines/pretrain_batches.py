"""The batches of every epoch of `videoclip pretrain`: embed all videos, cluster them, keep the answer on disk.

All workers embed a share each; the first of them clusters. A clustering is a file of the run folder, so a run that
is resumed has the batches that it had. With `--cluster-ahead` the next clustering is made from the weights at the
start of the present one, by a task of its own on a spare CPU while training goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from pipelines.checkpointing import agreed, barrier
from pipelines.runs import Quarantine
from videoclip.data.clips import ClipSampler
from videoclip.data.howto100m import read_topics
from videoclip.data.shards import Shards
from videoclip.embedding import TwoTowers, embed_videos
from videoclip.files import write_array
from videoclip.retrieval.epochs import BatchOptions, Clustering, make_clustering


@dataclass(frozen=True)
class BatchPlan:
    """How the videos are grouped in every epoch of a run."""

    options: BatchOptions
    hardness: tuple[float, ...]
    """A schedule: the values are spread evenly over the run and joined by straight lines."""
    epochs: int
    recluster_every: int
    cluster_ahead: bool
    topics: Path | None
    seed: int

    def number(self, epoch: int) -> int:
        """Of the clustering that an epoch uses."""
        return epoch // self.recluster_every

    def of_clustering(self, number: int) -> tuple[BatchOptions, int]:
        """Options and seed of a clustering."""
        places = np.linspace(0, max(1, self.epochs - 1), len(self.hardness))
        hardness = float(np.interp(number * self.recluster_every, places, self.hardness))
        seed = int(np.random.default_rng([self.seed, number]).integers(2**31))
        return replace(self.options, hardness=hardness), seed


class Clusterings:
    """Makes clusterings and reads them back; every worker has one of these and calls it at the same time."""

    def __init__(self, plan: BatchPlan, output: Path, sampler: ClipSampler, rank: int, workers: int) -> None:
        self.plan = plan
        self.output = output
        self.sampler = sampler
        self.rows = sampler.usable_rows()
        self.rank, self.workers = rank, workers
        self.topics = topics_of(plan.topics, sampler.shards, self.rows) if rank == 0 else None
        self.folder = output / "batches"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ahead: Any = None

    def is_new_in(self, epoch: int) -> bool:
        """Whether an epoch is the first to use its clustering."""
        return epoch % self.plan.recluster_every == 0

    def start_epoch(self, epoch: int, model: TwoTowers) -> Clustering:
        """The clustering of an epoch; made first, where the epoch is the first to need it."""
        number = self.plan.number(epoch)
        if not agreed(self._path(number).exists()):
            self._embed(model, number)
            if self.rank == 0:
                cluster_to_file(*self._arguments(number))
            barrier()
        clustering = Clustering.load(self._path(number))
        barrier()  # nobody may clear away what another still reads
        last = self.plan.number(self.plan.epochs - 1)
        if self.plan.cluster_ahead and number < last and not agreed(self._path(number + 1).exists()):
            self._embed(model, number + 1)
            if self.rank == 0:
                self._ahead = self._start(number + 1)
        return clustering

    def finish_ahead(self) -> None:
        """Wait for the clustering that runs beside training; to be called before a checkpoint is written.

        A run resumed from that checkpoint has newer weights and could not make the clustering again.
        """
        if self._ahead is not None:
            ray.get(self._ahead)
            self._ahead = None
        barrier()

    def _embed(self, model: TwoTowers, number: int) -> None:
        """Leave this worker's share of the embeddings on disk, where the clustering finds it.

        A run that was resumed within an epoch finds them there: it has newer weights and could not make them again.
        """
        if agreed(bool(self._embedded(number))):
            return
        share = np.array_split(self.rows, self.workers)[self.rank]
        embeddings = embed_videos(model, self.sampler, share, self.plan.seed, number)
        write_array(self._share(number, self.rank, self.workers), embeddings.astype(np.float16))
        barrier()

    def _start(self, number: int) -> Any:
        """Cluster on a spare CPU while training goes on; with no CPU to spare, at once."""
        arguments = self._arguments(number)
        if ray.available_resources().get("CPU", 0) < 1:
            cluster_to_file(*arguments)
            return None
        task: Any = ray.remote(num_cpus=1, scheduling_strategy="DEFAULT")(cluster_to_file)
        return task.remote(*arguments)

    def _arguments(self, number: int) -> tuple[Any, ...]:
        """Of `cluster_to_file`."""
        own = [self._share(number, rank, self.workers) for rank in range(self.workers)]
        shares, path = self._embedded(number) or own, self._path(number)  # a file system may show them late
        options, seed = self.plan.of_clustering(number)
        return self.sampler.shards.folder, self.output, self.rows, shares, path, options, seed, self.topics

    def _share(self, number: int, rank: int, workers: int) -> Path:
        return self.folder / f"embeddings-{number:04d}-{rank:04d}-of-{workers:04d}.npy"

    def _embedded(self, number: int) -> list[Path]:
        """The files of all embeddings of a clustering, by however many workers; empty while some are missing."""
        for first in sorted(self.folder.glob(f"embeddings-{number:04d}-0000-of-*.npy")):
            workers = int(first.stem[-4:])
            shares = [self._share(number, rank, workers) for rank in range(workers)]
            if all(share.exists() for share in shares):
                return shares
        return []

    def _path(self, number: int) -> Path:
        return self.folder / f"clustering-{number:04d}.npz"


def cluster_to_file(
    shards_folder: Path,
    output: Path,
    rows: np.ndarray,
    shares: list[Path],
    path: Path,
    options: BatchOptions,
    seed: int,
    topics: Sequence[str | None] | None = None,
) -> None:
    """Cluster the embeddings in the files `shares`, of the videos at `rows`, into `path`; the shares are removed then.

    Videos whose embedding is not finite go to the quarantine list of `output` and are left out of these batches.
    Raises InputError if no video is left.
    """
    shards = Shards(shards_folder)
    embeddings = np.concatenate([np.load(share, mmap_mode="r") for share in shares])
    clustering = make_clustering(embeddings, options, seed, rows, len(shards), topics)
    if len(clustering.left_out):
        quarantine, video_ids = Quarantine(output), shards.video_ids()
        for row in clustering.left_out:
            quarantine.add(video_ids[row], "its embedding is not finite, so it was left out of clustered batches")
        quarantine.save()
    clustering.save(path)
    for share in shares:
        share.unlink(missing_ok=True)


def topics_of(path: Path | None, shards: Shards, rows: np.ndarray) -> list[str | None] | None:
    """The topic of the videos at `rows`, None where it is not known; no list without a file of topics."""
    if path is None:
        return None
    topics, video_ids = read_topics(path), shards.video_ids()
    return [topics.get(video_ids[row]) for row in rows]
