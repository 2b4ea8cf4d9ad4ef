"""What is in an epoch's batches: how many of the videos, how similar they are, and of how many topics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from videoclip.retrieval.index import unit_rows

BATCHES_LOOKED_AT = 2000  # evenly spaced; enough for two digits of any mean
PERCENTILES = (10, 50, 90)


def batch_similarities(embeddings: np.ndarray, batches: list[np.ndarray]) -> np.ndarray:
    """float64: mean cosine between different members, of every batch that has at least two."""
    means = []
    for batch in batches:
        if len(batch) > 1:
            rows = unit_rows(embeddings, batch)
            total = np.square(np.linalg.norm(rows.sum(0))) - np.square(rows).sum()
            means.append(total / (len(batch) * (len(batch) - 1)))
    return np.array(means, np.float64)


def batch_similarity(embeddings: np.ndarray, batches: list[np.ndarray]) -> float:
    """Mean cosine between different members of a batch, averaged over batches of at least two."""
    means = batch_similarities(embeddings, batches)
    return float(means.mean()) if len(means) else 0.0


def describe_batches(
    embeddings: np.ndarray,
    batches: list[np.ndarray],
    topics: Sequence[str | None] | None = None,
    seed: int = 0,
    videos_per_cluster: int = 0,
) -> dict[str, float]:
    """Figures of one clustering of `embeddings` [N, H], each similarity beside that of random batches.

    `coverage`: percent of the videos that appear; `most_repeated`: how often the most frequent one does;
    `cosine` and `cosine_p10` … `cosine_p90`: mean and percentiles, over batches, of the mean cosine inside a batch;
    `random_cosine` …: the same of random batches. With `topics`, one a row or None where unknown: `purity` and
    `random_purity`, the percentage of a batch's members that share its most frequent topic. `cluster_cosine` and
    `cluster_purity`: the same of the clusters that batches consist of, where `videos_per_cluster` says their size.
    """
    seen = np.bincount(np.concatenate(batches), minlength=len(embeddings))
    order = np.random.default_rng(seed).permutation(len(embeddings))
    size = max(map(len, batches))
    random = np.split(order, range(size, len(order), size))
    figures: dict[str, float] = {
        "videos": len(embeddings),
        "batches": len(batches),
        "coverage": round(100 * float((seen > 0).mean()), 2),
        "most_repeated": int(seen.max()),
    }
    for prefix, groups in (("", batches), ("random_", random)):
        looked_at = groups[:: -(-len(groups) // BATCHES_LOOKED_AT)]
        means = batch_similarities(embeddings, looked_at)
        figures[f"{prefix}cosine"] = float(means.mean()) if len(means) else 0.0
        for percentile in PERCENTILES:
            figures[f"{prefix}cosine_p{percentile}"] = float(np.percentile(means, percentile)) if len(means) else 0.0
        if topics is not None:
            figures[f"{prefix}purity"] = 100 * purity(looked_at, topics)
    if videos_per_cluster:
        looked_at = batches[:: -(-len(batches) // BATCHES_LOOKED_AT)]
        starts = range(0, size, videos_per_cluster)
        clusters = [batch[i : i + videos_per_cluster] for batch in looked_at for i in starts if i < len(batch)]
        figures["cluster_cosine"] = batch_similarity(embeddings, clusters)
        if topics is not None:
            figures["cluster_purity"] = 100 * purity(clusters, topics)
    return {name: value if isinstance(value, int) else round(value, 4) for name, value in figures.items()}


def describe_in_words(figures: dict[str, float]) -> str:
    """One line of `describe_batches`."""
    words = (
        f"{figures['videos']} videos in {figures['batches']} batches, coverage {figures['coverage']:g}%, "
        f"at most {figures['most_repeated']} times each, mean cosine inside a batch {figures['cosine']:.3f} "
        f"(random {figures['random_cosine']:.3f})"
    )
    if "cluster_cosine" in figures:
        words += f", inside a cluster {figures['cluster_cosine']:.3f}"
    if "purity" in figures:
        words += f", purity {figures['purity']:.0f}% (random {figures['random_purity']:.0f}%)"
    return words


def purity(batches: list[np.ndarray], topics: Sequence[str | None]) -> float:
    """Share of a batch's members that have its most frequent topic, averaged; members without a topic are left out."""
    shares = []
    for batch in batches:
        known = [topics[row] for row in batch if topics[row] is not None]
        if known:
            shares.append(max(known.count(topic) for topic in set(known)) / len(known))
    return float(np.mean(shares)) if shares else 0.0
