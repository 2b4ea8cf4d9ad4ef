"""How hard, how complete and how fast the batches of `retrieval.cluster_videos` are, beside the paper's algorithm.

Vectors are drawn around N / 50 centres of Pareto-like size, nested in larger groups, of unit norm. `--full` clusters
1,200,000 x 768 of them, HowTo100M's size, from a memory-mapped float16 file (1.8 GB in the temporary folder).
"""

from __future__ import annotations

import argparse
import math
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from videoclip.retrieval import cluster_videos
from videoclip.retrieval.clustering import Mode
from videoclip.retrieval.figures import describe_batches

VIDEOS_PER_BATCH = 32


class ClusteredVectors:
    """Draws unit vectors: within a cluster their cosine is 0.7, between clusters of one group 0.28, else 0."""

    def __init__(self, count: int, width: int, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)
        clusters = count // 50
        groups = clusters // 20
        of_group = self._unit(groups, width)[self.generator.integers(groups, size=clusters)]
        self.centres = math.sqrt(0.4) * of_group + math.sqrt(0.6) * self._unit(clusters, width)
        sizes = self.generator.pareto(1.2, clusters) + 1
        self.shares = sizes / sizes.sum()

    def draw(self, count: int) -> np.ndarray:
        """float32 [count, width]."""
        chosen = self.generator.choice(len(self.centres), count, p=self.shares)
        rows = math.sqrt(0.7) * self.centres[chosen] + math.sqrt(0.3) * self._unit(count, self.centres.shape[1])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def _unit(self, count: int, width: int) -> np.ndarray:
        rows = self.generator.standard_normal((count, width), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def timed(embeddings: np.ndarray, mode: Mode, clusters: int | None = None) -> tuple[list[np.ndarray], float]:
    """Batches of one clustering and the seconds it took."""
    start = time.perf_counter()
    batches = cluster_videos(embeddings, VIDEOS_PER_BATCH, 0, mode, clusters)
    return batches, time.perf_counter() - start


def compare_modes(count: int, width: int) -> None:
    """Coverage, repeats, similarity inside clusters and time of every mode; one cluster's in units of the paper's."""
    embeddings = ClusteredVectors(count, width).draw(count)
    print(f"{count} x {width}, batches of {VIDEOS_PER_BATCH}")
    head = ("mode", "coverage %", "most repeated", "not full", "cosine", "in a cluster", "s")
    print("{:22s}{:>11s}{:>15s}{:>10s}{:>9s}{:>14s}{:>7s}".format(*head))
    cosine = {}
    variants: list[tuple[Mode, int | None]] = [("random", None), ("paper", None)]
    variants += [("cover", clusters) for clusters in (1, 2, 4, 8, 16)]
    for mode, clusters in variants:
        batches, seconds = timed(embeddings, mode, clusters)
        size = VIDEOS_PER_BATCH // (clusters or 1)
        figures = describe_batches(embeddings, batches, videos_per_cluster=size)
        name = f"cover, {clusters} of {size}" if clusters else mode
        cosine[name] = figures["cosine"]
        not_full = sum(len(batch) < VIDEOS_PER_BATCH for batch in batches)
        print(
            f"{name:22s}{figures['coverage']:11.1f}{figures['most_repeated']:15d}{not_full:10d}"
            f"{figures['cosine']:9.3f}{figures['cluster_cosine']:14.3f}{seconds:7.1f}",
            flush=True,
        )
    print(f"cover of one cluster / paper, mean cosine: {cosine['cover, 1 of 32'] / cosine['paper']:.3f}\n")


def show_growth(width: int) -> None:
    """Seconds of `cover` from 50 to 400 thousand rows, beside N log N from the first of them."""
    print(f"{'rows':>8s}{'seconds':>9s}{'N log N':>9s}{'ratio':>7s}")
    first = 0.0
    for count in (50_000, 100_000, 200_000, 400_000):
        _, seconds = timed(ClusteredVectors(count, width).draw(count), "cover")
        first = first or seconds / (count * math.log(count))
        expected = first * count * math.log(count)
        print(f"{count:8d}{seconds:9.1f}{expected:9.1f}{seconds / expected:7.2f}", flush=True)


def cluster_howto100m(count: int = 1_200_000, width: int = 768) -> None:
    """Time, peak memory and similarity at HowTo100M's size, from a memory-mapped file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embeddings.npy"
        written = np.lib.format.open_memmap(path, "w+", np.float16, (count, width))
        vectors = ClusteredVectors(count, width)
        for first in range(0, count, 50_000):
            written[first : first + 50_000] = vectors.draw(min(50_000, count - first))
        written.flush()
        del written, vectors
        before = peak_gigabytes()
        embeddings = np.load(path, mmap_mode="r")
        batches, seconds = timed(embeddings, "cover")
        figures = describe_batches(embeddings, batches, videos_per_cluster=4)
        print(
            f"{count} x {width}: {seconds / 60:.1f} minutes, peak memory {peak_gigabytes():.1f} GB "
            f"({before:.1f} of it before clustering), coverage {figures['coverage']}%, "
            f"most repeated {figures['most_repeated']}, cosine {figures['cosine']:.3f} "
            f"(random {figures['random_cosine']:.3f}), inside a cluster {figures['cluster_cosine']:.3f}"
        )


def peak_gigabytes() -> float:
    """Largest resident size of this process so far; mapped pages of the file count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Print the comparison and the growth, or with --full the one large run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    if options.full:
        cluster_howto100m()
        return
    compare_modes(options.rows, options.width)
    show_growth(options.width)


if __name__ == "__main__":
    main()
