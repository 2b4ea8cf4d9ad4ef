"""What videos are compared by, besides embeddings of a model: their frozen tokens."""

from __future__ import annotations

import numpy as np

from videoclip.data.shards import Shards

VIDEOS_OF_MEAN = 4096  # evenly spaced, whose mean stands for that of all videos


def mean_tokens(shards: Shards, rows: np.ndarray, of: np.ndarray | None = None) -> np.ndarray:
    """The mean of each video's frozen tokens, about the mean of all videos: float32 [V, D].

    `rows`: int64 [V]; `of`: the rows of all videos, where `rows` are a share of them. Frozen tokens all point much the
    same way; what tells videos apart is what differs from that.
    """
    everyone = rows if of is None else of
    some = everyone[:: max(1, len(everyone) // VIDEOS_OF_MEAN)]
    return _means(shards, rows) - _means(shards, some).mean(0)


def _means(shards: Shards, rows: np.ndarray) -> np.ndarray:
    means = np.empty((len(rows), shards.manifest.dimension), np.float32)
    for place, row in enumerate(rows):
        means[place] = shards.tokens(int(row)).mean(0, dtype=np.float32)
    return means
