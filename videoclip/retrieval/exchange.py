"""Making groups of equal size more similar inside, by exchanging members between them."""

from __future__ import annotations

import numpy as np

EXCHANGE_ROUNDS = 60
WORTH = 1e-4  # a swap that gains less is not made


def exchange(similarity: np.ndarray, groups: list[np.ndarray]) -> list[np.ndarray]:
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
            if best[i] <= WORTH:
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


def split_blocks(blocks: np.ndarray, similarity: np.ndarray, size: int) -> list[np.ndarray]:
    """Split every block into clusters of `size` similar members, and one of fewer if they do not come out even.

    `blocks`: int64 [B, n], row numbers; `similarity`: float32 [B, n, n], of their members. In every round each block
    makes the one swap that gains most; blocks without one are done.
    """
    count, n = blocks.shape
    place = np.broadcast_to(np.arange(n) // size, (count, n)).copy()  # [B, n]: the cluster of every member
    clusters = int(place[0, -1]) + 1
    to_cluster = similarity @ np.eye(clusters, dtype=np.float32)[place]  # [B, n, clusters]
    todo = np.arange(count)
    for _ in range(2 * n):
        gain = _gains(similarity[todo], to_cluster[todo], place[todo]).reshape(len(todo), -1)
        best = gain.argmax(1)
        better = gain[np.arange(len(todo)), best] > WORTH
        todo, (i, j) = todo[better], np.divmod(best[better], n)
        if not len(todo):
            break
        a, b = place[todo, i], place[todo, j]
        change = similarity[todo, :, j] - similarity[todo, :, i]  # [blocks, n]: what a's sums gain and b's lose
        to_cluster[todo, :, a] += change
        to_cluster[todo, :, b] -= change
        place[todo, i], place[todo, j] = b, a
    order = np.argsort(place, 1, kind="stable")
    ordered = np.take_along_axis(blocks, order, 1)
    return [cluster for block in ordered for cluster in np.split(block, range(size, n, size))]


def _gains(similarity: np.ndarray, to_cluster: np.ndarray, place: np.ndarray) -> np.ndarray:
    """float32 [B, n, n]: what the similarity inside clusters gains if i and j change places; -inf where they share one.

    `to_cluster` [B, n, clusters]: summed similarity of a member to a cluster; `place` [B, n]: its own.
    """
    own = np.take_along_axis(to_cluster, place[:, :, None], 2) - np.diagonal(similarity, axis1=1, axis2=2)[..., None]
    attraction = np.take_along_axis(to_cluster, np.broadcast_to(place[:, None], similarity.shape), 2) - own
    gain = attraction + attraction.swapaxes(1, 2) - 2 * similarity
    gain[place[:, :, None] == place[:, None]] = -np.inf
    return gain
