"""Batches of videos of which some are similar (VideoCLIP, section 3.3), found by retrieval.

The paper's Algorithm 1 draws random anchors and takes their neighbours, which shows about half of the videos in an
epoch and some of them many times; and a batch that is one neighbourhood never shows a model two different topics. Our
default, `cover`, puts every video into exactly one batch, and makes a batch of many small clusters from all over the
corpus: near things to be told apart, and far ones.

How a cover is made: k-means makes cells of some hundreds of videos; in each cell, two-means clusterings cut blocks out
at equal sizes, and pairs of videos are exchanged between blocks for as long as that raises the similarity inside them.
What a cell has left over is grouped again together with the leftovers of all other cells. A block is a cluster, or,
where clusters are small, is split into several by more exchanges, of all blocks at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from videoclip.errors import InputError
from videoclip.retrieval.exchange import exchange, split_blocks
from videoclip.retrieval.index import BLOCK, SimilarityIndex, finite_rows, load_faiss, unit, unit_rows

Mode = Literal["cover", "random", "paper"]
MODES: tuple[Mode, ...] = get_args(Mode)
CELL = 512  # videos that are grouped together, looking at all pairs; cells hold up to twice as many
CELLS_AT_ONCE = 1024  # most centres of one k-means: more are made by clustering cells again
ROWS_PER_CENTRE = 64  # that k-means is fitted to
CLUSTER = 4  # videos in a cluster, where nothing else is asked for
SPLIT_BELOW = 16  # smaller clusters are made by splitting blocks of about SPLIT
SPLIT = 64
SPLIT_AT_ONCE = 2**21  # similarities of blocks that are split together


@dataclass(frozen=True)
class Skip:
    """Which pairs of videos do not share a cluster although they are similar: likely false negatives."""

    nearest: int = 0
    """So many nearest neighbours of a video, of those that it is grouped with."""
    similarity: float | None = None
    """Videos of at least this cosine; None: none."""

    def __post_init__(self) -> None:
        if self.nearest < 0:
            raise InputError(f"the number of neighbours to skip cannot be {self.nearest}")
        if self.similarity is not None and not 0 < self.similarity <= 1:
            raise InputError(f"videos can be skipped from a cosine in (0, 1] on, not from {self.similarity}")

    def apart(self, similarity: np.ndarray) -> np.ndarray:
        """Similarities [..., n, n] with those of skipped pairs at their worst."""
        skipped = np.zeros(similarity.shape, bool)
        if self.similarity is not None:
            skipped |= similarity >= self.similarity - 1e-6
        nearest = min(self.nearest, similarity.shape[-1] - 1)
        if nearest:
            others = similarity - 3 * np.eye(similarity.shape[-1], dtype=np.float32)  # nobody is a neighbour of itself
            near = others >= -np.partition(-others, nearest - 1, axis=-1)[..., nearest - 1 : nearest]
            skipped |= near | near.swapaxes(-1, -2)
        return np.where(skipped, np.float32(-1), similarity) if skipped.any() else similarity


NOTHING = Skip()


def cluster_videos(
    embeddings: np.ndarray,
    videos_per_batch: int = 32,
    seed: int = 0,
    mode: Mode = "cover",
    clusters_per_batch: int | None = None,
    skip: Skip = NOTHING,
    faiss_index: str = "",
) -> list[np.ndarray]:
    """Group the rows of `embeddings` (float32 or float16 [N, H], also memory-mapped) into batches.

    `cover`: each row in exactly one batch, all batches full but at most one. A batch is `clusters_per_batch` clusters
    of similar videos, drawn from all over the corpus; 1 makes a batch one cluster, as in the paper. By default clusters
    have four videos, or the next number that a batch can be divided by: a batch of 32 has 8. Pairs that `skip` names
    are kept out of each other's clusters.
    `random`: a random cover. `paper`: Algorithm 1 (anchors at random, `videos_per_batch` of their
    2 * videos_per_batch nearest neighbours), N / videos_per_batch batches in which rows may repeat or be missing;
    `faiss_index` overrides the index that finds the neighbours.

    Returns int64 arrays of row numbers, in random order; the same for the same seed.
    Raises InputError if there are no rows, a value is not finite, or an option cannot be.
    """
    clusters = check_options(videos_per_batch, mode, clusters_per_batch)
    if embeddings.ndim != 2 or not len(embeddings):
        raise InputError(f"cannot cluster embeddings of shape {embeddings.shape}; expected [videos, width]")
    generator = np.random.default_rng([seed, MODES.index(mode)])
    if mode == "random":
        return _batches_of(generator.permutation(len(embeddings)).astype(np.int64), videos_per_batch)
    _refuse_what_is_not_finite(embeddings)
    if mode == "paper":
        return _anchors_and_neighbours(embeddings, videos_per_batch, generator, faiss_index)
    size = videos_per_batch // clusters
    groups = _cover(embeddings, size, skip, generator)
    groups = [groups[i] for i in generator.permutation(len(groups))]
    # What is not full comes last, so that every batch but the last is made of whole clusters.
    groups.sort(key=lambda group: len(group) < size)
    batches = _batches_of(np.concatenate(groups), videos_per_batch)
    return [batches[i] for i in generator.permutation(len(batches))]


def check_options(videos_per_batch: int, mode: Mode = "cover", clusters_per_batch: int | None = None) -> int:
    """Clusters in a batch. For callers that embed videos first:

    Raises InputError if `cluster_videos` cannot have these options, or `paper` has no Faiss to find neighbours with.
    """
    if mode not in MODES:
        raise InputError(f"unknown clustering mode {mode!r}; choose one of {', '.join(MODES)}")
    if videos_per_batch < 1:
        raise InputError("videos_per_batch must be at least 1")
    if mode == "paper":
        load_faiss()  # which `cover` needs for more videos than a cell holds only
    if clusters_per_batch is None:
        sizes = range(min(CLUSTER, videos_per_batch), videos_per_batch + 1)
        return videos_per_batch // next(size for size in sizes if videos_per_batch % size == 0)
    if not 1 <= clusters_per_batch <= videos_per_batch:
        raise InputError(f"{videos_per_batch} videos cannot make {clusters_per_batch} clusters a batch")
    if videos_per_batch % clusters_per_batch:
        raise InputError(
            f"{clusters_per_batch} clusters do not divide a batch of {videos_per_batch} videos; choose a divisor of it"
        )
    if mode == "paper" and clusters_per_batch > 1:
        raise InputError("the paper's batches are one cluster each; more need the mode cover")
    return clusters_per_batch


def _batches_of(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(rows, range(size, len(rows), size))


def _cover(embeddings: np.ndarray, size: int, skip: Skip, generator: np.random.Generator) -> list[np.ndarray]:
    """Clusters of `size` videos, and one of fewer if they do not come out even. Each row is in one of them."""
    if size == 1:
        return list(generator.permutation(len(embeddings)).astype(np.int64)[:, None])
    if size >= SPLIT_BELOW:
        return _blocks(embeddings, size, skip, generator)
    blocks = _blocks(embeddings, size * (SPLIT // size), NOTHING, generator)
    by_length: dict[int, list[np.ndarray]] = {}
    for block in blocks:
        by_length.setdefault(len(block), []).append(block)
    pieces = []
    for length, alike in by_length.items():
        stacked, at_once = np.stack(alike), max(1, SPLIT_AT_ONCE // length**2)
        pieces += [stacked[i : i + at_once] for i in range(0, len(stacked), at_once)]

    def split(piece: np.ndarray) -> list[np.ndarray]:
        rows = unit_rows(embeddings, piece.ravel()).reshape(*piece.shape, -1)
        return split_blocks(piece, skip.apart(rows @ rows.swapaxes(1, 2)), size)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return [cluster for clusters in threads.map(split, pieces) for cluster in clusters]


def _blocks(embeddings: np.ndarray, size: int, skip: Skip, generator: np.random.Generator) -> list[np.ndarray]:
    """Group cells into blocks, again and again with what is left over, until one cell holds the rest."""
    most = max(2 * CELL, 4 * size)  # so that the average cell holds a block, and every round makes some
    blocks: list[np.ndarray] = []
    rest = generator.permutation(len(embeddings))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        while len(rest) > most:
            cells = _cells(embeddings, rest, most, generator)
            grouped = threads.map(
                lambda cell: _group_cell(embeddings, cell[0], size, skip, cell[1]),
                zip(cells, generator.spawn(len(cells))),
            )
            groups = [group for groups in grouped for group in groups]
            blocks += [group for group in groups if len(group) == size]
            left = [group for group in groups if len(group) < size]
            rest = generator.permutation(np.concatenate([np.zeros(0, np.int64), *left]))
    return blocks + (_group_cell(embeddings, rest, size, skip, generator) if len(rest) else [])


def _cells(embeddings: np.ndarray, rows: np.ndarray, most: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Cut `rows` into cells of similar videos, none larger than `most`. Only row numbers are held, not embeddings."""
    cells, stack = [], [rows]
    while stack:
        rows = stack.pop()
        if len(rows) <= most:
            cells.append(rows)
            continue
        parts = _nearest_centres(embeddings, rows, min(CELLS_AT_ONCE, -(-2 * len(rows) // most)), generator)
        largest = max(parts, key=len)
        if len(largest) > 0.9 * len(rows):  # all much alike: any cut is as good as another
            cells += np.array_split(largest, -(-len(largest) // most))
            parts = [part for part in parts if part is not largest]
        stack += parts
    return cells


def _nearest_centres(
    embeddings: np.ndarray, rows: np.ndarray, count: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Split `rows` by the nearest of `count` k-means centres, by cosine; empty parts are left out."""
    faiss = load_faiss()

    sample = np.sort(rows[: ROWS_PER_CENTRE * count])  # `rows` are in random order
    kmeans = faiss.Kmeans(
        embeddings.shape[1],
        count,
        niter=8,
        spherical=True,
        seed=int(generator.integers(2**31 - 1)),
        min_points_per_centroid=1,
        max_points_per_centroid=ROWS_PER_CENTRE,
        gpu=faiss.get_num_gpus() > 0,
    )
    kmeans.train(unit_rows(embeddings, sample))
    nearest = np.concatenate(
        [
            kmeans.index.search(unit_rows(embeddings, rows[i : i + BLOCK]), 1)[1][:, 0]
            for i in range(0, len(rows), BLOCK)
        ]
    )
    order = np.argsort(nearest, kind="stable")
    parts = np.split(rows[order], np.cumsum(np.bincount(nearest, minlength=count))[:-1])
    return [part for part in parts if len(part)]


def _group_cell(
    embeddings: np.ndarray, cell: np.ndarray, size: int, skip: Skip, generator: np.random.Generator
) -> list[np.ndarray]:
    """Partition one cell into groups of `size` similar videos and at most one smaller group."""
    rows = unit_rows(embeddings, cell)
    groups = list(_leaves(rows, np.arange(len(rows)), size, generator))
    return [cell[group].astype(np.int64) for group in exchange(skip.apart(rows @ rows.T), groups)]


def _leaves(
    embeddings: np.ndarray, rows: np.ndarray, size: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Cut `rows` in two until every group has the size asked for."""
    stack = [rows]
    while stack:
        rows = stack.pop()
        if len(rows) <= size:
            yield rows
            continue
        chosen = embeddings[rows]
        stack += _cut(rows, chosen @ _separating_direction(chosen, generator), size, generator)[::-1]


def _separating_direction(rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Difference of the two centres of a spherical two-means clustering: float32 [H]."""
    centres = rows[generator.choice(len(rows), 2, replace=False)]
    for _ in range(8):
        nearer_first = rows @ (centres[0] - centres[1]) > 0
        if nearer_first.all() or not nearer_first.any():
            break  # all rows alike: any cut is as good as another
        centres = unit(np.stack([rows[nearer_first].mean(0), rows[~nearer_first].mean(0)]))
    return centres[0] - centres[1]


def _cut(
    rows: np.ndarray, score: np.ndarray, size: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Split where the score changes sign, moved to a multiple of the group size, neither side empty."""
    natural = (score > 0).sum() / size
    groups = int(np.floor(natural + generator.random()))  # up or down, in proportion: seeds differ
    full = -(-len(rows) // size)
    place = int(np.clip(groups, 1, full - 1)) * size
    order = np.argsort(-score, kind="stable")
    return rows[order[:place]], rows[order[place:]]


def _anchors_and_neighbours(
    embeddings: np.ndarray, videos_per_batch: int, generator: np.random.Generator, faiss_index: str
) -> list[np.ndarray]:
    """Algorithm 1 of the paper: random anchors, and for each `k` of its `2k` nearest neighbours."""
    anchors = generator.permutation(len(embeddings))[: -(-len(embeddings) // videos_per_batch)]
    wanted = min(2 * videos_per_batch, len(embeddings))
    index = SimilarityIndex.build(embeddings, faiss_index)
    queries = unit_rows(embeddings, anchors)
    _, neighbours = index.search(queries, wanted)
    chosen = min(videos_per_batch, wanted)
    # The lists are probed for a mean recall: a video in a thin region may find fewer than a batch in those near it.
    short = np.flatnonzero((neighbours >= 0).sum(1) < chosen)
    if len(short):
        neighbours[short] = index.search_all(queries[short], wanted)[1]
    fewest = int((neighbours >= 0).sum(1).min())
    if fewest < chosen:
        raise InputError(f"{index.description}: finds only {fewest} of {chosen} neighbours; choose another Faiss index")
    return [generator.choice(row[row >= 0], chosen, replace=False).astype(np.int64) for row in neighbours]


def _refuse_what_is_not_finite(embeddings: np.ndarray) -> None:
    bad = np.setdiff1d(np.arange(len(embeddings)), finite_rows(embeddings))
    if len(bad):
        named = ", ".join(map(str, bad[:5])) + (" …" if len(bad) > 5 else "")
        raise InputError(f"{len(bad)} embeddings hold values that are not finite (row {named}); leave them out")
