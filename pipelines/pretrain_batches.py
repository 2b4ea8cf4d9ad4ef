"""The batches of every epoch of `videoclip pretrain`: embed all videos, cluster them, keep the answer on disk.

All workers embed a share each; the first of them clusters. A clustering is a file of the run folder, so a run that
is resumed has the batches that it had. With `--cluster-ahead` the next clustering is made from the weights at the
start of the present one, by a task of its own on a spare CPU while training goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.runs import Quarantine
from videoclip.errors import InputError
from videoclip.files import read_json, write_array, write_arrays, write_json

if TYPE_CHECKING:
    from pipelines.pretrain import PretrainConfig


@dataclass(frozen=True)
class Clustering:
    """Batches of rows of the shards, a label for every row that near-duplicates share, and figures for the metrics."""

    batches: list[np.ndarray]
    duplicates: np.ndarray
    figures: dict[str, float]


class Clusterings:
    """Makes clusterings and reads them back; every worker has one of these and calls it at the same time."""

    def __init__(self, config: PretrainConfig, sampler: Any, rank: int, workers: int) -> None:
        self.config = config
        self.sampler = sampler
        self.rows = sampler.usable_rows()
        self.rank, self.workers = rank, workers
        self.topics = topics_of(config.topics, sampler.shards, self.rows) if rank == 0 else None
        self.folder = config.output / "batches"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ahead: Any = None

    def start_epoch(self, epoch: int, model: Any) -> Clustering:
        """The clustering of an epoch; made first, where the epoch is the first to need it."""
        number = epoch // self.config.recluster_every
        if not self._is_there(number):
            self._embed(model, number)
            if self.rank == 0:
                cluster_to_file(*self._arguments(number))
            _barrier(self.workers)
        clustering = read_clustering(self._path(number))
        _barrier(self.workers)  # nobody may clear away what another still reads
        last = (self.config.epochs - 1) // self.config.recluster_every
        if self.config.cluster_ahead and number < last and not self._is_there(number + 1):
            self._embed(model, number + 1)
            if self.rank == 0:
                self._ahead = self._start(number + 1)
        return clustering

    def finish_ahead(self) -> None:
        """Wait for the clustering that runs beside training; to be called before a checkpoint is written.

        A run resumed from that checkpoint has newer weights and could not make the clustering again.
        """
        if self._ahead is not None:
            import ray

            ray.get(self._ahead)
            self._ahead = None
        _barrier(self.workers)

    def _embed(self, model: Any, number: int) -> None:
        """Leave this worker's share of the embeddings on disk, where the clustering finds it."""
        from videoclip.training import embed_videos

        share = np.array_split(self.rows, self.workers)[self.rank]
        embeddings = embed_videos(model, self.sampler, share, self.config.seed, number)
        write_array(self._shares(number)[self.rank], embeddings.astype(np.float16))
        _barrier(self.workers)

    def _start(self, number: int) -> Any:
        """Cluster on a spare CPU while training goes on; with no CPU to spare, at once."""
        import ray

        arguments = self._arguments(number)
        if ray.available_resources().get("CPU", 0) < 1:
            cluster_to_file(*arguments)
            return None
        task: Any = ray.remote(num_cpus=1, scheduling_strategy="DEFAULT")(cluster_to_file)
        return task.remote(*arguments)

    def _arguments(self, number: int) -> tuple[Any, ...]:
        """Of `cluster_to_file`."""
        return self.config, number, self.rows, self._shares(number), self._path(number), self.topics

    def _is_there(self, number: int) -> bool:
        """Whether a clustering is finished, as the first worker sees it: all must agree on what to do next."""
        import torch.distributed as dist

        answer = [self._path(number).exists()]
        if self.workers > 1:
            dist.broadcast_object_list(answer)
        return answer[0]

    def _shares(self, number: int) -> list[Path]:
        return [self.folder / f"embeddings-{number:04d}-{rank:03d}.npy" for rank in range(self.workers)]

    def _path(self, number: int) -> Path:
        return self.folder / f"clustering-{number:04d}.npz"


def cluster_to_file(
    config: PretrainConfig,
    number: int,
    rows: np.ndarray,
    shares: list[Path],
    path: Path,
    topics: list[str | None] | None = None,
) -> None:
    """Cluster the embeddings in the files `shares`, of the videos at `rows`, into `path`; the shares are removed then.

    `topics`, one a row, are for the figures. Videos whose embedding is not finite go to quarantine and are left out of
    these batches.
    Raises InputError if no video is left.
    """
    from videoclip.data.shards import Shards
    from videoclip.retrieval import cluster_videos
    from videoclip.retrieval.false_negatives import near_duplicates
    from videoclip.retrieval.figures import describe_batches
    from videoclip.retrieval.index import finite_rows

    start = time.perf_counter()
    embeddings = np.concatenate([np.load(share, mmap_mode="r") for share in shares])
    shards = Shards(config.shards)
    good = finite_rows(embeddings)
    if len(good) < len(rows):
        _quarantine(config, shards, np.delete(rows, good))
        rows, embeddings = rows[good], embeddings[good]
        topics = None if topics is None else [topics[place] for place in good]
    if not len(rows):
        raise InputError(f"{config.shards}: no video has a finite embedding; is the model's learning rate too high?")
    seed = int(np.random.default_rng([config.seed, number]).integers(2**31))
    hardness = hardness_of_epoch(config, number * config.recluster_every)
    batches = cluster_videos(embeddings, config.videos_per_batch, seed, config.batches, hardness, config.faiss_index)
    duplicates = np.arange(len(shards))
    similarity = config.false_negatives.duplicate_similarity
    if similarity is not None:
        duplicates[rows] = rows[near_duplicates(embeddings, batches, similarity)]
    figures = describe_batches(embeddings, batches, topics, seed)
    if config.batches == "cover":
        figures["hardness"] = hardness
    figures["near_duplicates"] = int((duplicates[rows] != rows).sum())
    figures["cluster_seconds"] = round(time.perf_counter() - start, 3)
    write_json(path.with_suffix(".json"), figures)
    write_arrays(
        path,
        rows=np.concatenate([rows[batch] for batch in batches]),
        sizes=np.array([len(batch) for batch in batches]),
        duplicates=duplicates,
    )
    for share in shares:
        share.unlink(missing_ok=True)


def read_clustering(path: Path) -> Clustering:
    """What `cluster_to_file` wrote."""
    with np.load(path) as stored:
        batches = np.split(stored["rows"], np.cumsum(stored["sizes"])[:-1])
        return Clustering(batches, stored["duplicates"], read_json(path.with_suffix(".json")))


def hardness_of_epoch(config: PretrainConfig, epoch: int) -> float:
    """The schedule: the values of `hardness`, spread evenly over the run and joined by straight lines."""
    places = np.linspace(0, max(1, config.epochs - 1), len(config.hardness))
    return float(np.interp(epoch, places, config.hardness))


def topics_of(path: Path | None, shards: Any, rows: np.ndarray) -> list[str | None] | None:
    """The topic of the videos at `rows`, None where it is not known; no list without a file of topics."""
    from videoclip.data.howto100m import read_topics

    if path is None:
        return None
    topics, video_ids = read_topics(path), shards.video_ids()
    return [topics.get(video_ids[row]) for row in rows]


def _quarantine(config: PretrainConfig, shards: Any, rows: np.ndarray) -> None:
    quarantine, video_ids = Quarantine(config.output), shards.video_ids()
    for row in rows:
        quarantine.add(video_ids[row], "its embedding is not finite, so it was left out of clustered batches")
    quarantine.save()


def _barrier(workers: int) -> None:
    import torch.distributed as dist

    if workers > 1:
        dist.barrier()
