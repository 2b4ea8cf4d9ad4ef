"""The batches of every epoch of `videoclip pretrain`: what videos are compared by, their clusters, all on disk.

All workers embed a share each; the first of them clusters. A clustering is a file of the run folder, so a run that
is resumed has the batches that it had. Either everybody waits while it is made, of the model as it is; or, `ahead`, it
is made beside the epoch before, of the model as it was when that began: what comes out depends on neither's speed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.checkpointing import agreed, barrier
from pipelines.runs import Quarantine
from videoclip.data.clips import ClipSampler
from videoclip.data.howto100m import read_topics
from videoclip.data.shards import Shards
from videoclip.data.sources import rows_by_source
from videoclip.embedding import TwoTowers, clips_of, embed_videos, shares_of_blocks
from videoclip.evaluation.inputs import load_model_and_shards
from videoclip.files import write_array
from videoclip.retrieval.epochs import BatchOptions, Clustering, make_clustering
from videoclip.retrieval.mixing import Drawn, Mix, make_mixed_clustering, rows_drawn
from videoclip.retrieval.similarity import mean_tokens


@dataclass(frozen=True)
class BatchPlan:
    """How the videos are grouped in every epoch of a run."""

    options: BatchOptions
    similarity: str
    """What videos are compared by: model, tokens, or the folder or hub id of a teacher."""
    clips_per_video: int
    """Clips whose mean embedding stands for a video."""
    from_nothing: bool
    """Whether the model starts untrained, so that in the first epoch it knows less than its frozen tokens."""
    topics: Path | None
    seed: int
    ahead: bool = False
    """Cluster beside the epoch before, of embeddings by the model as that epoch began."""
    shares: tuple[float, ...] = ()
    """Of several folders of shards, the part of an epoch's batches that each has; empty: all videos of all, once."""
    mixed: bool = False
    """Whether a batch has videos of all these folders."""

    def seed_of(self, epoch: int) -> int:
        """Of an epoch's clustering."""
        return int(np.random.default_rng([self.seed, epoch]).integers(2**31))

    def source(self, epoch: int) -> str:
        """What videos are compared by in an epoch."""
        if self.options.mode == "random":
            return "tokens"  # to label near-duplicates by, at no cost
        untrained = self.from_nothing and epoch <= int(self.ahead)  # the model that would embed for this epoch
        return "tokens" if self.similarity == "model" and untrained else self.similarity


class Clusterings:
    """Makes clusterings and reads them back; every worker has one of these and calls it at the same time."""

    def __init__(self, plan: BatchPlan, output: Path, sampler: ClipSampler, rank: int, workers: int) -> None:
        self.plan = plan
        self.output = output
        self.sampler = sampler
        self.rows = sampler.usable_rows()
        by_source = rows_by_source(sampler.shards, self.rows)
        size = plan.options.videos_per_batch
        self.mix = Mix(by_source, size, plan.shares, plan.mixed, plan.seed) if len(by_source) > 1 else None
        self.batches = self.mix.batches if self.mix else -(-len(self.rows) // size)  # of an epoch
        self.rank, self.workers = rank, workers
        self.topics = topics_of(plan.topics, sampler.shards, self.rows) if rank == 0 else None
        self.folder = output / "batches"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._beside: _Beside | None = None

    def start_epoch(self, epoch: int, model: TwoTowers, is_last: bool = True) -> Clustering:
        """The clustering of an epoch; made first, where it is not there yet. That of the next is begun, if `ahead`.

        Raises what went wrong where it was made.
        """
        if self._beside is not None:
            self._beside.wait()
            self._beside = None
        barrier()
        path = self._path(epoch)
        if not agreed(path.exists()):
            self._embed(model, epoch)
            if self.rank == 0:
                self._cluster(epoch)
            barrier()
        if self.plan.ahead and not is_last and not agreed(self._path(epoch + 1).exists()):
            # A run that is resumed within an epoch finds what its workers, however many, embedded as it began.
            if not agreed(bool(self._embedded_shares(epoch + 1))):
                self._embed(model, epoch + 1)
            if self.rank == 0:
                self._beside = _Beside(self._cluster, epoch + 1)
        clustering = Clustering.load(path)
        barrier()  # nobody may clear away what another still reads
        return clustering

    def _cluster(self, epoch: int) -> None:
        shares, seed = self._embedded_shares(epoch), self.plan.seed_of(epoch)
        drawn, rows = self._drawn(epoch)
        topics = self.topics
        if topics is not None and drawn is not None:
            topics = [topics[place] for place in np.searchsorted(self.rows, rows)]
        arguments = rows, shares, self._path(epoch), self.plan.options, seed, topics, drawn, self.plan.mixed
        cluster_to_file(self.sampler.shards, self.output, *arguments)
        for share in self.folder.glob(f"embeddings-{epoch:04d}-*.npy"):  # also of another number of workers
            share.unlink()

    def _drawn(self, epoch: int) -> tuple[list[Drawn] | None, np.ndarray]:
        """What each of several sources gives to an epoch, and the rows of its videos, int64, ascending."""
        if self.mix is None:
            return None, self.rows
        drawn = self.mix.draw(epoch)
        return drawn, rows_drawn(drawn)

    def _path(self, epoch: int) -> Path:
        return self.folder / f"clustering-{epoch:04d}.npz"

    def _embed(self, model: TwoTowers, epoch: int) -> None:
        """Leave this worker's share of the embeddings on disk, where the clustering finds it."""
        _, rows = self._drawn(epoch)
        path = self._shares(epoch, self.workers)[self.rank]
        write_array(path, self._embedded(model, rows, epoch).astype(np.float16))
        barrier()

    def _embedded(self, model: TwoTowers, rows: np.ndarray, epoch: int) -> np.ndarray:
        """What the videos of this worker's share of `rows` are compared by: float32 [V, H]."""
        share = shares_of_blocks(rows, self.workers)[self.rank]
        source = self.plan.source(epoch)
        if source == "tokens":  # about the mean of their own source: they are compared with no others
            shards = self.sampler.shards
            sources = zip(rows_by_source(shards, share), rows_by_source(shards, self.rows))
            return np.concatenate([mean_tokens(shards, some, everyone) for some, everyone in sources])
        if source == "model":
            clips = replace(self.sampler.config, clips_per_video=self.plan.clips_per_video)
            return embed_videos(model, self.sampler.with_clips(clips), share, self.plan.seed, epoch)
        return self._embedded_by_teacher(Path(source), rows)

    def _embedded_by_teacher(self, model: Path, rows: np.ndarray) -> np.ndarray:
        """`_embedded` by a model that stays as it is: all videos are embedded once, and the file is kept."""
        share = shares_of_blocks(self.rows, self.workers)[self.rank]
        kept = self.folder / f"teacher-{self.rank:03d}-of-{self.workers:03d}.npy"
        if not kept.exists():
            shards = self.sampler.shards
            teacher, _ = load_model_and_shards(model, shards.folder)
            clips = clips_of(teacher, self.plan.clips_per_video)
            sampler = ClipSampler(shards, teacher.tokenizer(), clips, self.output / f"teacher-words-{self.rank:03d}")
            write_array(kept, embed_videos(teacher, sampler, share, self.plan.seed, 0).astype(np.float16))
        return np.load(kept)[np.isin(share, rows)]

    def _shares(self, epoch: int, workers: int) -> list[Path]:
        names = [f"embeddings-{epoch:04d}-{rank:05d}-of-{workers:05d}.npy" for rank in range(workers)]
        return [self.folder / name for name in names]

    def _embedded_shares(self, epoch: int) -> list[Path]:
        """Files that together hold all embeddings for an epoch, whoever wrote them; none if some are missing."""
        counts = {int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"embeddings-{epoch:04d}-*.npy")}
        for workers in sorted(counts):
            shares = self._shares(epoch, workers)
            if all(path.exists() for path in shares):
                return shares
        return []


class _Beside(threading.Thread):
    """A call in a thread of its own, while this one trains. It ends with the process; what it writes is whole."""

    def __init__(self, function: Callable[[int], None], epoch: int) -> None:
        super().__init__(name="clustering", daemon=True)
        self._call = functools.partial(function, epoch)
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """The call; what it raises is kept."""
        try:
            self._call()
        except BaseException as error:  # raised where training can hear of it
            self._error = error

    def wait(self) -> None:
        """Until it has returned. Raises what it raised."""
        self.join()
        if self._error is not None:
            raise self._error


def cluster_to_file(
    shards: Shards,
    output: Path,
    rows: np.ndarray,
    shares: list[Path],
    path: Path,
    options: BatchOptions,
    seed: int,
    topics: Sequence[str | None] | None = None,
    drawn: Sequence[Drawn] | None = None,
    mixed: bool = False,
) -> None:
    """Cluster the embeddings in the files `shares`, of the videos at `rows`, into `path`.

    `drawn` says what each of several sources gives, `mixed` whether batches have videos of all.
    Videos whose embedding is not finite go to the quarantine list of `output` and are left out of these batches.
    Raises InputError if no video is left.
    """
    embeddings = np.concatenate([np.load(share, mmap_mode="r") for share in shares])
    if drawn is None:
        clustering = make_clustering(embeddings, options, seed, rows, len(shards), topics)
    else:
        clustering = make_mixed_clustering(embeddings, rows, drawn, options, mixed, seed, len(shards), topics)
    if len(clustering.left_out):
        quarantine, video_ids = Quarantine(output), shards.video_ids()
        for row in clustering.left_out:
            quarantine.add(video_ids[row], "its embedding is not finite, so it was left out of clustered batches")
        quarantine.save()
    clustering.save(path)


def topics_of(path: Path | None, shards: Shards, rows: np.ndarray) -> list[str | None] | None:
    """The topic of the videos at `rows`, None where it is not known; no list without a file of topics."""
    if path is None:
        return None
    topics, video_ids = read_topics(path), shards.video_ids()
    return [topics.get(video_ids[row]) for row in rows]
