"""Batches of mutually similar videos (VideoCLIP, section 3.3), found by retrieval.

The paper's Algorithm 1 draws random anchors and takes their neighbours, which shows about half of the videos in an
epoch and some of them many times. Our default, `cover`, puts every video into exactly one batch: the set is cut in
two again and again between the centres of a two-means clustering, always at a multiple of the batch size, and
inside pieces of about a thousand videos pairs of videos are exchanged between batches for as long as that makes
both batches more alike together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.errors import InputError

MODES = ("cover", "random", "paper")
PIECE = 1024  # rows whose pairwise similarities are looked at together: 4 MB of float32
SAMPLE = 16384  # rows that a two-means clustering is fitted to
BLOCK = 65536  # rows of a memory-mapped array that are read at once
EXCHANGE_ROUNDS = 60


def cluster_videos(
    embeddings: np.ndarray, videos_per_batch: int = 32, seed: int = 0, mode: str = "cover"
) -> list[np.ndarray]:
    """Group the rows of `embeddings` (float32 or float16 [N, H], also memory-mapped) into batches.

    `cover`: similar videos, each row in exactly one batch, all batches full but at most one.
    `random`: a random cover. `paper`: Algorithm 1 (anchors at random, `videos_per_batch` of their
    2 * videos_per_batch nearest neighbours), N / videos_per_batch batches in which rows may repeat or be missing.

    Returns int64 arrays of row numbers, in random order; the same for the same seed.
    Raises InputError if there are no rows, a value is not finite, or the mode is unknown.
    """
    if mode not in MODES:
        raise InputError(f"unknown clustering mode {mode!r}; choose one of {', '.join(MODES)}")
    if videos_per_batch < 1:
        raise InputError("videos_per_batch must be at least 1")
    if embeddings.ndim != 2 or not len(embeddings):
        raise InputError(f"cannot cluster embeddings of shape {embeddings.shape}; expected [videos, width]")
    generator = np.random.default_rng([seed, MODES.index(mode)])
    if mode == "random":
        order = generator.permutation(len(embeddings))
        batches = np.split(order, range(videos_per_batch, len(order), videos_per_batch))
        return [batch.astype(np.int64) for batch in batches]
    _check_finite(embeddings)
    if mode == "paper":
        return _anchors_and_neighbours(embeddings, videos_per_batch, generator)
    batches = []
    for piece in _pieces(embeddings, generator.permutation(len(embeddings)), videos_per_batch, generator):
        rows = _unit_rows(embeddings, piece)
        groups = list(_leaves(rows, np.arange(len(rows)), videos_per_batch, generator))
        batches += [piece[group] for group in _exchange(rows @ rows.T, groups)]
    return [batches[i] for i in generator.permutation(len(batches))]


def _pieces(
    embeddings: np.ndarray, rows: np.ndarray, videos_per_batch: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Cut `rows` in two until nothing is larger than PIECE; only row numbers are held, not embeddings."""
    size = max(PIECE // videos_per_batch, 2) * videos_per_batch
    stack = [rows]
    while stack:
        rows = stack.pop()
        if len(rows) <= size:
            yield rows
            continue
        direction = _separating_direction(_unit_rows(embeddings, rows[:SAMPLE]), generator)
        score = np.concatenate(
            [_unit_rows(embeddings, rows[i : i + BLOCK]) @ direction for i in range(0, len(rows), BLOCK)]
        )
        left, right = _cut(rows, score, videos_per_batch, generator)
        # Shuffled, so that the first SAMPLE rows of a side stay a fair sample of it.
        stack += [generator.permutation(right), generator.permutation(left)]


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
        centres = np.stack([rows[nearer_first].mean(0), rows[~nearer_first].mean(0)])
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
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
    embeddings: np.ndarray, videos_per_batch: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Algorithm 1 of the paper: random anchors, and for each `k` of its `2k` nearest neighbours."""
    anchors = generator.permutation(len(embeddings))[: -(-len(embeddings) // videos_per_batch)]
    wanted = min(2 * videos_per_batch, len(embeddings))
    index = SimilarityIndex.build(embeddings)
    _, neighbours = index.search(_unit_rows(embeddings, anchors), wanted)
    chosen = min(videos_per_batch, wanted)
    return [generator.choice(row[row >= 0], chosen, replace=False).astype(np.int64) for row in neighbours]


@dataclass
class SimilarityIndex:
    """A Faiss index over unit vectors; inner products are cosines. `description` says what was built."""

    index: Any
    description: str

    @classmethod
    def build(cls, embeddings: np.ndarray, exact_below: int = 50_000) -> SimilarityIndex:
        """Index all rows of float [N, H]: exactly below `exact_below` rows, by inverted lists above.

        The number of lists probed is raised until 64 neighbours of a sample are found with recall 0.95.
        """
        import faiss

        count, width = embeddings.shape
        if count < exact_below:
            index: Any = faiss.IndexFlatIP(width)
            _add_rows(index, embeddings)
            return cls(index, f"exact search over {count} x {width}")
        lists = int(4 * np.sqrt(count))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        step = max(1, count // (40 * lists))
        index.train(_unit_rows(embeddings, np.arange(0, count, step)))
        _add_rows(index, embeddings)
        recall = _tune_probes(index, embeddings, lists)
        return cls(index, f"{lists} inverted lists, {index.nprobe} probed, over {count} x {width}: recall {recall:.3f}")

    def save(self, path: Path) -> None:
        """Write the index to a file."""
        import faiss

        faiss.write_index(self.index, str(path))

    @classmethod
    def load(cls, path: Path, description: str) -> SimilarityIndex:
        """Read what `save` wrote. Faiss trusts its files: check where one comes from before reading it."""
        import faiss

        return cls(faiss.read_index(str(path)), description)

    def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 [Q, H] -> cosines float32 [Q, count] and rows int64 [Q, count], best first; -1 where none is left."""
        return self.index.search(np.ascontiguousarray(queries, np.float32), count)


def _add_rows(index: Any, embeddings: np.ndarray) -> None:
    for first in range(0, len(embeddings), BLOCK):
        rows = np.arange(first, min(first + BLOCK, len(embeddings)))
        index.add(_unit_rows(embeddings, rows))


def _tune_probes(index: Any, embeddings: np.ndarray, lists: int, recall: float = 0.95) -> float:
    """Double the number of probed lists until recall@64 on 256 evenly spaced rows is reached; return that recall."""
    rows = np.linspace(0, len(embeddings) - 1, 256).astype(np.int64)
    queries = _unit_rows(embeddings, rows)
    index.nprobe = lists
    _, truth = index.search(queries, 64)
    probes, reached = 1, 0.0
    while True:
        index.nprobe = probes
        _, found = index.search(queries, 64)
        reached = float(np.mean([len(np.intersect1d(a, b)) / 64 for a, b in zip(truth, found)]))
        if reached >= recall or probes >= lists:
            return reached
        probes = min(2 * probes, lists)


def _unit_rows(embeddings: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Chosen rows as float32 of unit length; zero rows stay zero."""
    chosen = np.asarray(embeddings[rows], np.float32)
    return chosen / np.maximum(np.linalg.norm(chosen, axis=1, keepdims=True), 1e-12)


def _check_finite(embeddings: np.ndarray) -> None:
    for first in range(0, len(embeddings), BLOCK):
        bad = np.flatnonzero(~np.isfinite(embeddings[first : first + BLOCK]).all(1))
        if len(bad):
            raise InputError(f"embedding row {first + int(bad[0])} holds values that are not finite; leave it out")


def batch_similarity(embeddings: np.ndarray, batches: list[np.ndarray]) -> float:
    """Mean cosine between different members of a batch, averaged over batches of at least two."""
    means = []
    for batch in batches:
        if len(batch) > 1:
            rows = _unit_rows(embeddings, batch)
            total = np.square(np.linalg.norm(rows.sum(0))) - np.square(rows).sum()
            means.append(total / (len(batch) * (len(batch) - 1)))
    return float(np.mean(means)) if means else 0.0
