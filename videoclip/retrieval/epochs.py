"""An epoch's batches: made of embeddings, described, written to a file and read back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from videoclip.errors import InputError
from videoclip.files import read_json, write_arrays, write_json
from videoclip.retrieval.clustering import Mode, Skip, check_options, cluster_videos
from videoclip.retrieval.false_negatives import near_duplicates
from videoclip.retrieval.figures import describe_batches
from videoclip.retrieval.index import finite_rows


@dataclass(frozen=True)
class BatchOptions:
    """How videos are grouped into batches; as `cluster_videos` takes them."""

    videos_per_batch: int = 32
    mode: Mode = "cover"
    clusters_per_batch: int | None = None
    skip: Skip = field(default_factory=Skip)
    faiss_index: str = ""
    duplicate_similarity: float | None = None
    """Videos of one batch with at least this cosine are labelled as near-duplicates; None: none is."""

    @property
    def videos_per_cluster(self) -> int:
        """Raises InputError if clusters cannot be so many."""
        clusters = check_options(self.videos_per_batch, self.mode, self.clusters_per_batch)
        return self.videos_per_batch // (clusters if self.mode == "cover" else 1)


@dataclass(frozen=True)
class Clustering:
    """Batches of rows of the shards, int64 each; `duplicates`, int64 [rows of the shards], a label that near-duplicate
    videos share; `figures` about the batches; and the rows that were `left_out` for want of a finite embedding."""

    batches: list[np.ndarray]
    duplicates: np.ndarray
    figures: dict[str, float]
    left_out: np.ndarray

    def save(self, path: Path) -> None:
        """Write to `path` (.npz), its figures beside it as .json."""
        write_json(path.with_suffix(".json"), self.figures)
        write_arrays(
            path,
            rows=np.concatenate(self.batches),
            sizes=np.array([len(batch) for batch in self.batches]),
            duplicates=self.duplicates,
            left_out=self.left_out,
        )

    @classmethod
    def load(cls, path: Path) -> Clustering:
        """Read what `save` wrote."""
        with np.load(path) as stored:
            batches = np.split(stored["rows"], np.cumsum(stored["sizes"])[:-1])
            return cls(batches, stored["duplicates"], read_json(path.with_suffix(".json")), stored["left_out"])


def make_clustering(
    embeddings: np.ndarray,
    options: BatchOptions,
    seed: int = 0,
    rows: np.ndarray | None = None,
    videos: int | None = None,
    topics: Sequence[str | None] | None = None,
) -> Clustering:
    """Group videos by their embeddings [N, H], also memory-mapped, into the batches of an epoch.

    `rows` int64 [N]: the row of each in shards of `videos` videos; by default they are numbered as they come.
    `topics`, one an embedding and None where unknown, are for the figures. Embeddings that are not finite are left out.
    Raises InputError if none is left, or an option cannot be.
    """
    start = time.perf_counter()
    rows = np.arange(len(embeddings)) if rows is None else rows
    good = finite_rows(embeddings)
    if not len(good):
        raise InputError("no video has a finite embedding; is the model's learning rate too high?")
    left_out = np.delete(rows, good)
    if len(good) < len(rows):
        rows, embeddings = rows[good], embeddings[good]
        topics = None if topics is None else [topics[place] for place in good]
    grouping = options.mode, options.clusters_per_batch, options.skip, options.faiss_index
    batches = cluster_videos(embeddings, options.videos_per_batch, seed, *grouping)
    duplicates = np.arange(int(rows.max()) + 1 if videos is None else videos)
    if options.duplicate_similarity is not None:
        duplicates[rows] = rows[near_duplicates(embeddings, batches, options.duplicate_similarity)]
    figures = describe_batches(embeddings, batches, topics, seed, options.videos_per_cluster)
    figures["near_duplicates"] = int((duplicates[rows] != rows).sum())
    figures["cluster_seconds"] = round(time.perf_counter() - start, 3)
    return Clustering([rows[batch] for batch in batches], duplicates, figures, left_out)
