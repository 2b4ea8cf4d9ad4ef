"""Section 3.3: batches of similar videos. Every video appears exactly once an epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videoclip.batches import batch_similarity
from videoclip.errors import InputError
from videoclip.retrieval import _exchange, cluster_videos
from videoclip.similarity import SimilarityIndex


def grouped(videos: int, groups: int, width: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around random centres, and which centre each belongs to."""
    generator = np.random.default_rng(seed)
    group = generator.integers(0, groups, videos)
    rows = generator.standard_normal((groups, width))[group] + 0.3 * generator.standard_normal((videos, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), group


@given(st.integers(1, 400), st.integers(1, 40), st.integers(0, 50), st.sampled_from(["cover", "random"]))
@settings(max_examples=60, deadline=None)
def test_every_video_appears_exactly_once_and_all_batches_but_one_are_full(
    videos: int, size: int, seed: int, mode: str
) -> None:
    rows, _ = grouped(videos, 7)
    batches = cluster_videos(rows, size, seed, mode)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(videos))
    assert all(batch.dtype == np.int64 for batch in batches)
    assert sorted(len(batch) for batch in batches)[1:] == [size] * (len(batches) - 1)


def test_the_same_seed_gives_the_same_batches_and_another_seed_others() -> None:
    rows, _ = grouped(3000, 40)
    first, again, other = (cluster_videos(rows, 32, seed) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    as_sets = [{frozenset(batch.tolist()) for batch in batches} for batches in (first, other)]
    assert as_sets[0] != as_sets[1]


def test_batches_are_made_of_similar_videos() -> None:
    rows, group = grouped(2000, 40)
    similar, random = (cluster_videos(rows, 16, 0, mode) for mode in ("cover", "random"))
    assert batch_similarity(rows, similar) > 5 * max(batch_similarity(rows, random), 0.05)
    purity = np.mean([np.bincount(group[batch]).max() / len(batch) for batch in similar])
    assert purity > 0.8


def test_a_cover_is_as_hard_as_the_papers_batches() -> None:
    rows, _ = grouped(4000, 60, seed=3)
    paper, cover = (batch_similarity(rows, cluster_videos(rows, 32, 0, mode)) for mode in ("paper", "cover"))
    assert cover >= 0.95 * paper


def test_the_order_of_the_videos_does_not_change_hardness() -> None:
    rows, _ = grouped(1500, 30)
    shuffled = rows[np.random.default_rng(1).permutation(len(rows))]
    first, second = (batch_similarity(x, cluster_videos(x, 32)) for x in (rows, shuffled))
    assert first == pytest.approx(second, rel=0.05)


def test_exchanging_members_never_lowers_similarity_and_keeps_sizes() -> None:
    rows, _ = grouped(300, 10)
    random = cluster_videos(rows, 32, 0, "random")
    better = _exchange(rows @ rows.T, random)
    assert sorted(map(len, better)) == sorted(map(len, random))
    assert np.array_equal(np.sort(np.concatenate(better)), np.arange(300))
    assert batch_similarity(rows, better) > batch_similarity(rows, random)


def test_two_pairs_are_put_together_by_hand() -> None:
    rows = np.array([[1, 0], [0, 1], [1, 0.1], [0.1, 1]], np.float32)
    batches = {frozenset(batch.tolist()) for batch in cluster_videos(rows, 2)}
    assert batches == {frozenset({0, 2}), frozenset({1, 3})}


def test_paper_mode_takes_neighbours_of_random_anchors() -> None:
    rows, group = grouped(900, 6)
    batches = cluster_videos(rows, 32, 0, "paper")
    assert all(len(set(batch.tolist())) == 32 for batch in batches)
    assert np.mean([len(set(group[batch])) == 1 for batch in batches]) > 0.9


@pytest.mark.parametrize("rows", [np.ones((50, 4), np.float32), np.zeros((50, 4), np.float32)])
def test_vectors_that_are_all_alike_still_give_a_cover(rows: np.ndarray) -> None:
    batches = cluster_videos(rows, 8, 0)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(50))


def test_half_precision_and_memory_maps_are_read(tmp_path) -> None:
    rows, _ = grouped(200, 5)
    np.save(tmp_path / "rows.npy", rows.astype(np.float16))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    direct, from_disk = cluster_videos(rows.astype(np.float16), 16), cluster_videos(mapped, 16)
    assert all(np.array_equal(a, b) for a, b in zip(direct, from_disk))


def test_unusable_embeddings_are_refused() -> None:
    rows, _ = grouped(40, 4)
    rows[17, 2] = np.nan
    with pytest.raises(InputError, match="row 17"):
        cluster_videos(rows, 8)
    with pytest.raises(InputError, match="shape"):
        cluster_videos(np.zeros((0, 4), np.float32), 8)
    with pytest.raises(InputError, match="mode"):
        cluster_videos(rows[:10], 8, mode="best")


def test_an_approximate_index_reaches_its_recall() -> None:
    rows, _ = grouped(6000, 100)
    index = SimilarityIndex.build(rows, "IVF300,Flat")
    assert "inverted lists" in index.description
    _, found = index.search(rows[:200], 64)
    truth = np.argsort(-(rows[:200] @ rows.T), axis=1)[:, :64]
    assert np.mean([len(np.intersect1d(a, b)) / 64 for a, b in zip(found, truth)]) > 0.9
