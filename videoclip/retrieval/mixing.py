"""Batches of several sources: how many each gives to an epoch, which videos these are, and clusters within a source."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from videoclip.errors import InputError
from videoclip.retrieval.clustering import check_options, cluster_videos
from videoclip.retrieval.epochs import BatchOptions, Clustering
from videoclip.retrieval.false_negatives import near_duplicates
from videoclip.retrieval.figures import describe_batches
from videoclip.retrieval.index import finite_rows

SUM_OF_SHARES = 0.01  # how far from 1 the shares may add up: 0.33 0.33 0.33 is meant as a third each


def check_shares(shares: Sequence[float], sources: int, mixed: bool, options: BatchOptions) -> None:
    """Raises InputError unless there is a positive share for every source, they add up to 1, and batches that are
    `mixed` can be made of them."""
    if not shares:
        if mixed:
            raise InputError("--batch-sources mixed: give --mix, the share that each folder of --shards has in a batch")
        return
    if len(shares) != sources:
        raise InputError(f"--mix has {len(shares)} shares for {sources} folders of shards; give each folder one")
    if not all(share > 0 for share in shares):  # NaN too
        raise InputError(f"--mix {' '.join(f'{share:g}' for share in shares)}: a share must be more than zero")
    if abs(sum(shares) - 1) > SUM_OF_SHARES:
        raise InputError(f"--mix {' '.join(f'{share:g}' for share in shares)}: adds up to {sum(shares):g}, not 1")
    for size in apportion(options.videos_per_batch, shares) if mixed else []:
        if size:  # none at all is told with the sources' own sizes
            check_options(size, options.mode, options.clusters_per_batch)


@dataclass(frozen=True)
class Drawn:
    """What one source gives to an epoch: `batches` batches, or parts of mixed ones, of `size` videos.

    `passes`: rows of the shards, ascending, no row twice in one. A small source goes round several times an epoch.
    """

    passes: list[np.ndarray]
    batches: int
    size: int


@dataclass(frozen=True)
class Mix:
    """How epochs draw on several sources. `rows`: those of each that can be used, int64, ascending.

    With `shares` an epoch has as many batches as all videos together would fill, and of these every source its share:
    it goes on in its own endless shuffled round where the epoch before ended, so that all its videos are used equally
    often. Without them, every source gives all its videos once. `mixed`: each batch has videos of all sources, by
    their shares, which it needs. All follows from `seed` and the number of the epoch.
    """

    rows: list[np.ndarray]
    videos_per_batch: int
    shares: Sequence[float] = ()
    mixed: bool = False
    seed: int = 0

    def counts(self) -> list[tuple[int, int]]:
        """For every source, how many batches of an epoch it gives and how many videos to each.

        Raises InputError if a source would get no place in any.
        """
        videos, size = [len(rows) for rows in self.rows], self.videos_per_batch
        if min(videos) == 0:
            raise InputError(f"folder {videos.index(0) + 1} of --shards has no video with captions")
        total = -(-sum(videos) // size)
        if self.mixed:
            sizes = apportion(size, self.shares)
            self._refuse_none(sizes, f"a batch has only {size} videos")
            return [(total, of_source) for of_source in sizes]
        if not self.shares:
            return [(-(-count // size), size) for count in videos]
        counts = apportion(total, self.shares)
        self._refuse_none(counts, f"an epoch of {sum(videos)} videos has only {total} batches of {size}")
        return [(count, size) for count in counts]

    def _refuse_none(self, counts: list[int], reason: str) -> None:
        if 0 in counts:
            raise InputError(
                f"--mix leaves no place for folder {counts.index(0) + 1}: {reason}; give it a larger share"
            )

    @property
    def batches(self) -> int:
        """Of an epoch."""
        return self.counts()[0][0] if self.mixed else sum(count for count, _ in self.counts())

    def draw(self, epoch: int) -> list[Drawn]:
        """What every source gives to an epoch."""
        drawn = []
        for source, (count, size) in enumerate(self.counts()):
            passes = self._walk(source, epoch * count * size, count * size) if self.shares else [self.rows[source]]
            drawn.append(Drawn(passes, count, size))
        return drawn

    def _walk(self, source: int, begin: int, wanted: int) -> list[np.ndarray]:
        """The rows at places `begin` … `begin + wanted` of a source's endless round, in stretches of one shuffle."""
        rows, passes = self.rows[source], []
        while wanted:
            number, place = divmod(begin, len(rows))
            shuffled = np.random.default_rng([self.seed, source, number, 6]).permutation(rows)
            passes.append(np.sort(shuffled[place : place + wanted]))
            begin, wanted = begin + len(passes[-1]), wanted - len(passes[-1])
        return passes


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of `shares` that add up to `total`: the largest remainders are rounded up."""
    exact = total * np.asarray(shares, np.float64) / sum(shares)
    counts = np.floor(exact + 1e-9).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts.tolist()


def rows_drawn(drawn: Sequence[Drawn]) -> np.ndarray:
    """int64: the rows that an epoch uses, ascending, each once."""
    return np.unique(np.concatenate([rows for source in drawn for rows in source.passes]))


def make_mixed_clustering(
    embeddings: np.ndarray,
    rows: np.ndarray,
    drawn: Sequence[Drawn],
    options: BatchOptions,
    mixed: bool,
    seed: int,
    videos: int,
    topics: Sequence[str | None] | None = None,
) -> Clustering:
    """`make_clustering` for what several sources give: videos are compared with those of their own source alone.

    `rows` int64 [N], ascending, are those of `embeddings` [N, H] in shards of `videos` videos; `rows_drawn(drawn)` are
    among them. The figures tell also the percentage of all places that each source has (`source_1` …).
    Raises InputError as `make_clustering` does; mixed batches ask that of a source's part of a batch.
    """
    start = time.perf_counter()
    is_good = np.zeros(len(rows), bool)
    is_good[finite_rows(embeddings)] = True
    duplicates = np.arange(videos)
    pieces: list[list[np.ndarray]] = []  # of every source: int64 arrays of places in `embeddings`
    for number, source in enumerate(drawn):
        passes = [np.searchsorted(rows, of_pass) for of_pass in source.passes]
        passes = [places[is_good[places]] for places in passes]
        if not sum(map(len, passes)):
            raise InputError(f"no video of source {number + 1} has a finite embedding; is the learning rate too high?")
        pieces.append(_cluster_source(embeddings, passes, source, options, [seed, number]))
        if options.duplicate_similarity is not None:
            own = np.unique(np.concatenate(passes))
            groups = [np.searchsorted(own, piece) for piece in pieces[-1]]
            labels = near_duplicates(embeddings[own], groups, options.duplicate_similarity)
            duplicates[rows[own]] = rows[own[labels]]
    batches = _mixed(pieces) if mixed else [piece for of_source in pieces for piece in of_source]
    batches = [batches[i] for i in np.random.default_rng([seed, 7]).permutation(len(batches))]
    used = np.unique(np.concatenate(batches))
    figures = describe_batches(
        embeddings[used],
        [np.searchsorted(used, batch) for batch in batches],
        None if topics is None else [topics[place] for place in used],
        seed,
        0 if mixed else options.videos_per_cluster,
    )
    places = [sum(map(len, of_source)) for of_source in pieces]
    figures |= {f"source_{n}": round(100 * count / sum(places), 2) for n, count in enumerate(places, 1)}
    figures["near_duplicates"] = int((duplicates[rows] != rows).sum())
    figures["cluster_seconds"] = round(time.perf_counter() - start, 3)
    left_out = np.intersect1d(rows[~is_good], rows_drawn(drawn))
    return Clustering([rows[batch] for batch in batches], duplicates, figures, left_out)


def _cluster_source(
    embeddings: np.ndarray, passes: list[np.ndarray], source: Drawn, options: BatchOptions, seed: list[int]
) -> list[np.ndarray]:
    """Each pass in batches of similar videos; what does not fill one joins what is left of the other passes."""
    options = replace(options, videos_per_batch=source.size)
    full: list[np.ndarray] = []
    rest = [np.zeros(0, np.int64)]
    grouping = options.mode, options.clusters_per_batch, options.skip, options.faiss_index
    for number, places in enumerate(passes):
        if len(places):
            of_pass = int(np.random.default_rng([*seed, number]).integers(2**31))
            groups = cluster_videos(embeddings[places], options.videos_per_batch, of_pass, *grouping)
            for group in groups:
                (full if len(group) == source.size else rest).append(places[group])
    left = np.concatenate(rest)
    full += np.split(left, range(source.size, len(left), source.size)) if len(left) else []
    return full[: source.batches]


def _mixed(pieces: list[list[np.ndarray]]) -> list[np.ndarray]:
    """The n-th piece of every source together, for every n."""
    return [
        np.concatenate([of_source[number] for of_source in pieces if number < len(of_source)])
        for number in range(max(map(len, pieces)))
    ]
