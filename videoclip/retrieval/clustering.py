"""Batches of mutually similar videos (VideoCLIP, section 3.3), found by retrieval.

The paper's Algorithm 1 draws random anchors and takes their neighbours, which shows about half of the videos in an
epoch and some of them many times. Our default, `cover`, puts every video into exactly one batch: k-means makes cells
of some hundreds of videos; in each cell, two-means clusterings cut groups out at multiples of the batch size, and
pairs of videos are exchanged between groups for as long as that raises the similarity inside them. Full groups are
batches; what a cell has left over is clustered again together with the leftovers of all other cells.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import numpy as np

from videoclip.errors import InputError
from videoclip.retrieval.index import BLOCK, SimilarityIndex, finite_rows, load_faiss, unit, unit_rows

Mode = Literal["cover", "random", "paper"]
MODES: tuple[Mode, ...] = get_args(Mode)
CELL = 512  # videos that are grouped together, looking at all pairs; cells hold up to twice as many
CELLS_AT_ONCE = 1024  # most centres of one k-means: more are made by clustering cells again
ROWS_PER_CENTRE = 64  # that k-means is fitted to
EXCHANGE_ROUNDS = 60


def cluster_videos(
    embeddings: np.ndarray,
    videos_per_batch: int = 32,
    seed: int = 0,
    mode: Mode = "cover",
    hardness: float = 1.0,
    faiss_index: str = "",
) -> list[np.ndarray]:
    """Group the rows of `embeddings` (float32 or float16 [N, H], also memory-mapped) into batches.

    `cover`: similar videos, each row in exactly one batch, all batches full but at most one. `hardness` in [0, 1]
    steers it: the mean cosine inside a batch lies that far on the way from random batches to the most similar ones,
    because a share sqrt(hardness) of every batch stays together and the others change places at random.
    `random`: a random cover. `paper`: Algorithm 1 (anchors at random, `videos_per_batch` of their
    2 * videos_per_batch nearest neighbours), N / videos_per_batch batches in which rows may repeat or be missing;
    `faiss_index` overrides the index that finds the neighbours.

    Returns int64 arrays of row numbers, in random order; the same for the same seed.
    Raises InputError if there are no rows, a value is not finite, or an option cannot be.
    """
    check_options(videos_per_batch, mode, hardness)
    if embeddings.ndim != 2 or not len(embeddings):
        raise InputError(f"cannot cluster embeddings of shape {embeddings.shape}; expected [videos, width]")
    generator = np.random.default_rng([seed, MODES.index(mode)])
    if mode == "random" or hardness == 0:
        order = generator.permutation(len(embeddings)).astype(np.int64)
        return np.split(order, range(videos_per_batch, len(order), videos_per_batch))
    _refuse_what_is_not_finite(embeddings)
    if mode == "paper":
        return _anchors_and_neighbours(embeddings, videos_per_batch, generator, faiss_index)
    batches = _cover(embeddings, videos_per_batch, generator)
    batches = [batches[i] for i in generator.permutation(len(batches))]
    return _soften(batches, hardness, generator) if hardness < 1 else batches


def check_options(videos_per_batch: int, mode: Mode, hardness: float) -> None:
    """For callers that embed videos first: raises InputError if `cluster_videos` cannot have these options.

    Also if `paper` has no Faiss to find neighbours with.
    """
    if mode not in MODES:
        raise InputError(f"unknown clustering mode {mode!r}; choose one of {', '.join(MODES)}")
    if videos_per_batch < 1:
        raise InputError("videos_per_batch must be at least 1")
    if not 0 <= hardness <= 1:
        raise InputError(f"hardness must lie between 0 (random) and 1 (as similar as possible), not {hardness}")
    if hardness != 1 and mode != "cover":
        raise InputError(f"hardness steers the mode cover; {mode!r} has none")
    if mode == "paper":
        load_faiss()  # which `cover` needs for more videos than a cell holds only


def _cover(embeddings: np.ndarray, videos_per_batch: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Group cells into batches, again and again with what is left over, until one cell holds the rest."""
    most = max(2 * CELL, 4 * videos_per_batch)  # so that the average cell holds a batch, and every round makes some
    batches: list[np.ndarray] = []
    rest = generator.permutation(len(embeddings))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        while len(rest) > most:
            cells = _cells(embeddings, rest, most, generator)
            grouped = threads.map(
                lambda cell: _group_cell(embeddings, cell[0], videos_per_batch, cell[1]),
                zip(cells, generator.spawn(len(cells))),
            )
            groups = [group for groups in grouped for group in groups]
            batches += [group for group in groups if len(group) == videos_per_batch]
            left = [group for group in groups if len(group) < videos_per_batch]
            rest = generator.permutation(np.concatenate([np.zeros(0, np.int64), *left]))
    return batches + (_group_cell(embeddings, rest, videos_per_batch, generator) if len(rest) else [])


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
    embeddings: np.ndarray, cell: np.ndarray, videos_per_batch: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Partition one cell into groups of `videos_per_batch` similar videos and at most one smaller group."""
    rows = unit_rows(embeddings, cell)
    groups = list(_leaves(rows, np.arange(len(rows)), videos_per_batch, generator))
    return [cell[group].astype(np.int64) for group in _exchange(rows @ rows.T, groups)]


def _soften(batches: list[np.ndarray], hardness: float, generator: np.random.Generator) -> list[np.ndarray]:
    """Keep a share sqrt(hardness) of every batch, so that this share squared of its pairs, and shuffle the others."""
    members = np.concatenate(batches)
    stays = generator.random(len(members)) < np.sqrt(hardness)
    members[~stays] = generator.permutation(members[~stays])
    return np.split(members, np.cumsum([len(batch) for batch in batches])[:-1])


def _leaves(
    embeddings: np.ndarray, rows: np.ndarray, videos_per_batch: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Cut `rows` in two until every group is one batch."""
    stack = [rows]
    while stack:
        rows = stack.pop()
        if len(rows) <= videos_per_batch:
            yield rows
            continue
        chosen = embeddings[rows]
        stack += _cut(rows, chosen @ _separating_direction(chosen, generator), videos_per_batch, generator)[::-1]


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
    rows: np.ndarray, score: np.ndarray, videos_per_batch: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Split where the score changes sign, moved to a multiple of the batch size, neither side empty."""
    natural = (score > 0).sum() / videos_per_batch
    batches = int(np.floor(natural + generator.random()))  # up or down, in proportion: seeds differ
    full = -(-len(rows) // videos_per_batch)
    place = int(np.clip(batches, 1, full - 1)) * videos_per_batch
    order = np.argsort(-score, kind="stable")
    return rows[order[:place]], rows[order[place:]]


def _exchange(similarity: np.ndarray, groups: list[np.ndarray]) -> list[np.ndarray]:
    """Swap members between groups while that raises the sum of similarities inside groups.

    `similarity`: float32 [n, n]; `groups`: a partition of 0 … n - 1. Sizes are kept. A round looks at every row's
    best partner and carries out, best first, those swaps whose groups no earlier swap of the round has touched.
    """
    count = len(groups)
    if count < 2:
        return groups
    group_of = np.empty(len(similarity), np.int64)
    for number, members in enumerate(groups):
        group_of[members] = number
    rows = np.arange(len(similarity))
    diagonal = np.diagonal(similarity)
    membership = np.zeros((len(similarity), count), np.float32)
    membership[rows, group_of] = 1
    to_group = similarity @ membership  # [n, groups]: summed similarity of a row to a group
    for _ in range(EXCHANGE_ROUNDS):
        own = to_group[rows, group_of] - diagonal
        attraction = to_group[:, group_of] - own[:, None]  # what row i gains from the place of row j
        gain = attraction + attraction.T - 2 * similarity
        gain[group_of[:, None] == group_of[None, :]] = -np.inf
        partner = gain.argmax(1)
        best = gain[rows, partner]
        touched = np.zeros(count, bool)
        swapped = False
        for i in np.argsort(-best, kind="stable"):
            if best[i] <= 1e-4:
                break
            j = partner[i]
            a, b = group_of[i], group_of[j]
            if touched[a] or touched[b]:
                continue
            touched[a] = touched[b] = swapped = True
            group_of[i], group_of[j] = b, a
            change = similarity[:, j] - similarity[:, i]
            to_group[:, a] += change
            to_group[:, b] -= change
        if not swapped:
            break
    return [np.flatnonzero(group_of == number) for number in range(count)]


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
