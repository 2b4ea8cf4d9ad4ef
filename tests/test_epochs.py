"""An epoch's batches: rows of the shards, whatever the order of the embeddings; near-duplicates; what is left out."""

from pathlib import Path

import numpy as np
import pytest

from videoclip.errors import InputError
from videoclip.files import read_json
from videoclip.retrieval.epochs import BatchOptions, Clustering, make_clustering


def embeddings() -> np.ndarray:
    """Nine videos in three groups of three; the second of a group is the first again, almost."""
    rows = np.eye(12, dtype=np.float32)[np.repeat([0, 4, 8], 3)]
    rows[[2, 5, 8]] += 0.5 * np.eye(12, dtype=np.float32)[[1, 5, 9]]
    return rows


def test_batches_and_labels_are_rows_of_the_shards() -> None:
    rows = np.array([1, 2, 3, 10, 11, 12, 20, 21, 22])
    clustering = make_clustering(embeddings(), BatchOptions(3, duplicate_similarity=0.99), rows=rows, videos=30)
    groups = {frozenset(batch.tolist()) for batch in clustering.batches}
    assert groups == {frozenset((1, 2, 3)), frozenset((10, 11, 12)), frozenset((20, 21, 22))}
    expected = np.arange(30)
    expected[[2, 11, 21]] = [1, 10, 20]
    assert clustering.duplicates.tolist() == expected.tolist()
    assert clustering.figures["near_duplicates"] == 3 and clustering.figures["hardness"] == 1
    assert 0 <= clustering.figures["cluster_seconds"] < 60 and clustering.figures["coverage"] == 100
    assert not len(clustering.left_out)


def test_without_rows_videos_are_numbered_as_they_come_and_without_a_rule_none_is_a_duplicate() -> None:
    clustering = make_clustering(embeddings(), BatchOptions(3, "random"), seed=4)
    assert clustering.duplicates.tolist() == list(range(9)) and "hardness" not in clustering.figures
    assert sorted(np.concatenate(clustering.batches).tolist()) == list(range(9))
    other = make_clustering(embeddings(), BatchOptions(3, "random"), seed=5)
    assert [b.tolist() for b in clustering.batches] != [b.tolist() for b in other.batches]
    sparse = make_clustering(embeddings(), BatchOptions(3), rows=np.arange(9) + 5)
    assert sparse.duplicates.tolist() == list(range(14))


def test_what_is_not_finite_is_left_out_and_topics_stay_with_their_videos() -> None:
    rows, vectors = np.arange(9) + 5, embeddings()
    vectors[4, 3] = np.inf
    topics = ["a"] * 3 + [None, "x", "b"] + ["c"] * 3  # the one that is left out is of no other's topic
    clustering = make_clustering(vectors, BatchOptions(3), rows=rows, videos=20, topics=topics)
    assert clustering.left_out.tolist() == [9] and 9 not in np.concatenate(clustering.batches)
    assert clustering.figures["videos"] == 8
    full = [batch for batch in clustering.batches if len(batch) == 3]
    assert len(full) == 2 and clustering.figures["purity"] > clustering.figures["random_purity"]
    with pytest.raises(InputError, match="no video has a finite embedding"):
        make_clustering(np.full((2, 3), np.nan, np.float32), BatchOptions(3))


def test_a_clustering_is_read_as_it_was_written(tmp_path: Path) -> None:
    batches = [np.array([3, 1]), np.array([0]), np.array([2, 4, 5])]
    Clustering(batches, np.array([0, 0, 2]), {"cosine": 0.5}, np.array([6])).save(tmp_path / "c.npz")
    again = Clustering.load(tmp_path / "c.npz")
    assert [batch.tolist() for batch in again.batches] == [[3, 1], [0], [2, 4, 5]]
    assert again.duplicates.tolist() == [0, 0, 2] and again.left_out.tolist() == [6]
    assert again.figures == {"cosine": 0.5} == read_json(tmp_path / "c.json")
