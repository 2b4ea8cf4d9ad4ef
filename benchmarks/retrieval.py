"""Ranks of a large gallery in both directions without its similarity matrix: time and memory, beside the full matrix.

50,000 queries against 50,000 clips, 512 wide, on embeddings drawn at random; the whole matrix, which the plain way
holds with its sorted copy, is measured on a tenth of the queries and its memory scaled.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from videoclip.evaluation.retrieval import best_matches, ranks_of_best_query, ranks_of_positives


def peak_gigabytes() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ranks_by_sorting(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """The plain way: sort the whole matrix, and look for each positive's place in its row."""
    scores = queries @ gallery.T
    ordered = -np.sort(-scores, axis=1)
    own = np.diagonal(scores)
    return np.array([int((row > value).sum()) + 1 for row, value in zip(ordered, own)])


def main() -> None:
    """Print seconds, peak memory and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    gallery = generator.standard_normal((options.clips, options.width), dtype=np.float32)
    queries = gallery + 4 * generator.standard_normal(gallery.shape, dtype=np.float32)
    start = time.perf_counter()
    ranks = ranks_of_positives(queries, gallery)
    forward = time.perf_counter() - start
    backward = ranks_of_best_query(queries, gallery)
    best = best_matches(queries, gallery, 3)
    seconds, memory = time.perf_counter() - start, peak_gigabytes()
    print(
        f"{options.clips} x {options.clips}: R@1 {100 * (ranks == 1).mean():.1f} and {100 * (backward == 1).mean():.1f}"
    )
    print(f"both directions and the first three of every query: {seconds:.1f} s, peak memory {memory:.2f} GB")
    few = options.clips // 10
    start = time.perf_counter()
    plain = ranks_by_sorting(queries[:few], gallery)
    sorting = (time.perf_counter() - start) * 10
    # Scores that differ by no more than rounding share their places, which sorting does not do.
    assert np.abs(plain - ranks[:few]).max() <= 1 and np.mean(plain == ranks[:few]) > 0.99
    assert len(best) == options.clips
    gigabytes = 2 * options.clips**2 * 4 / 2**30
    print(f"by sorting the matrix, one direction: {sorting:.1f} s, {gigabytes:.0f} GB for two copies")
    print(f"ratio, one direction: {sorting / forward:.1f}")


if __name__ == "__main__":
    main()
