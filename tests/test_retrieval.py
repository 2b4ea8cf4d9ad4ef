"""Section 3.3: batches of similar videos. Every video appears exactly once an epoch."""

import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videoclip.errors import InputError
from videoclip.retrieval.clustering import Skip, check_options, cluster_videos
from videoclip.retrieval.exchange import exchange
from videoclip.retrieval.figures import batch_similarity, describe_batches
from videoclip.retrieval.index import FAISS_PACKAGES, SimilarityIndex, choose_index, load_faiss, unit


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


@given(st.integers(0, 2**31 - 2), st.sampled_from([600, 2600]))
@settings(max_examples=8, deadline=None)
def test_the_same_seed_gives_the_same_batches_and_another_seed_others(seed: int, videos: int) -> None:
    rows, _ = grouped(videos, 40)
    first, again, other = (cluster_videos(rows, 32, s) for s in (seed, seed, seed + 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    as_sets = [{frozenset(batch.tolist()) for batch in batches} for batches in (first, other)]
    assert as_sets[0] != as_sets[1]


def test_batches_are_made_of_similar_videos() -> None:
    rows, group = grouped(2000, 40)
    similar, random = (cluster_videos(rows, 16, 0, mode, 1) for mode in ("cover", "random"))
    assert batch_similarity(rows, similar) > 5 * max(batch_similarity(rows, random), 0.05)
    purity = np.mean([np.bincount(group[batch]).max() / len(batch) for batch in similar])
    assert purity > 0.8


def test_a_cover_is_as_hard_as_the_papers_batches() -> None:
    rows, _ = grouped(4000, 60, seed=3)
    paper, cover = (batch_similarity(rows, cluster_videos(rows, 32, 0, mode, 1)) for mode in ("paper", "cover"))
    assert cover >= 0.95 * paper


@given(st.integers(0, 99), st.sampled_from([500, 1500]))
@settings(max_examples=8, deadline=None)
def test_the_order_of_the_videos_does_not_change_hardness(seed: int, videos: int) -> None:
    rows, _ = grouped(videos, 30)
    shuffled = rows[np.random.default_rng(seed).permutation(len(rows))]
    # Of one order, seeds alone move the smaller set's hardness by a few percent: means of four are compared.
    first, second = (
        np.mean([batch_similarity(x, cluster_videos(x, 32, start, clusters_per_batch=1)) for start in range(4)])
        for x in (rows, shuffled)
    )
    assert first == pytest.approx(second, rel=0.1)


@given(st.integers(2, 300), st.integers(1, 6), st.sampled_from([1, 2, 3, 8]), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_any_number_of_clusters_gives_a_cover(videos: int, size: int, clusters: int, seed: int) -> None:
    batches = cluster_videos(grouped(videos, 5)[0], size * clusters, seed, clusters_per_batch=clusters)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(videos))
    assert sorted(len(batch) for batch in batches)[1:] == [size * clusters] * (len(batches) - 1)


@pytest.mark.parametrize("clusters", [2, 8, 16])
def test_a_batch_is_clusters_of_similar_videos_from_all_over_the_corpus(clusters: int) -> None:
    rows, group = grouped(3200, 40)
    batches = np.stack(cluster_videos(rows, 32, 0, clusters_per_batch=clusters))
    pure = [np.bincount(cluster).max() for cluster in group[batches.reshape(-1, 32 // clusters)]]
    assert np.mean(pure) * clusters / 32 > 0.9
    # Clusters meet at random: of 40 groups, so many draws find as many different ones as chance says.
    expected = 40 * (1 - (39 / 40) ** clusters)
    assert np.mean([len(set(group[batch])) for batch in batches]) == pytest.approx(expected, rel=0.3)


def test_clusters_are_by_default_of_four_videos_or_the_next_number_that_divides_a_batch() -> None:
    sizes = {batch: batch // check_options(batch) for batch in (1, 2, 6, 7, 8, 10, 16, 32, 33, 64)}
    assert sizes == {1: 1, 2: 2, 6: 6, 7: 7, 8: 4, 10: 5, 16: 4, 32: 4, 33: 11, 64: 4}


def test_small_clusters_are_at_least_as_similar_as_large_ones() -> None:
    rows, _ = grouped(2000, 60, seed=2)
    within = []
    for clusters in (1, 2, 4, 8, 16):
        batches = np.stack(cluster_videos(rows[:1984], 32, 0, clusters_per_batch=clusters))
        within.append(batch_similarity(rows, list(batches.reshape(-1, 32 // clusters))))
    assert all(later > 0.98 * earlier for earlier, later in itertools.pairwise(within)) and within[-1] > 1.1 * within[0]


@pytest.mark.parametrize(("skip", "clusters"), [(Skip(similarity=0.9), 8), (Skip(nearest=12), 8), (Skip(0, 0.9), 1)])
def test_likely_false_negatives_are_kept_out_of_each_others_clusters(skip: Skip, clusters: int) -> None:
    rows, _ = grouped(640, 20, width=6, seed=4)

    def share_together(skipping: Skip) -> float:
        batches = np.stack(cluster_videos(rows, 32, 0, clusters_per_batch=clusters, skip=skipping))
        found = [rows[cluster] @ rows[cluster].T for cluster in batches.reshape(-1, 32 // clusters)]
        return float(np.mean([np.triu(cosines >= 0.97, 1).sum() for cosines in found]))

    assert share_together(skip) < 0.5 * share_together(Skip())


def test_skipping_takes_a_pair_apart_by_hand() -> None:
    rows = np.array([[1, 0], [1, 0.02], [-1, 1], [-1, -3]], np.float32)
    together = {frozenset(batch.tolist()) for batch in cluster_videos(rows, 2, skip=Skip(similarity=0.99))}
    assert frozenset({0, 1}) in {frozenset(batch.tolist()) for batch in cluster_videos(rows, 2)}
    assert frozenset({0, 1}) not in together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters_per_batch": 5}, "5 clusters do not divide a batch of 32"),
        ({"clusters_per_batch": 64}, "32 videos cannot make 64 clusters"),
        ({"clusters_per_batch": 0}, "cannot make 0 clusters"),
        ({"clusters_per_batch": 2, "mode": "paper"}, "one cluster each"),
        ({"videos_per_batch": 0}, "at least 1"),
    ],
)
def test_clusters_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cluster_videos(np.eye(8, dtype=np.float32), **options)
    for wrong in ({"nearest": -1}, {"similarity": 1.5}, {"similarity": 0.0}):
        with pytest.raises(InputError):
            Skip(**wrong)


@given(st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_several_cells_and_their_leftovers_still_make_a_cover(seed: int) -> None:
    rows, _ = grouped(2600, 33, seed=seed)  # clusters of 79 videos: every cell has some left over
    batches = cluster_videos(rows, 32, seed)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(2600))
    assert sorted(len(batch) for batch in batches)[1:] == [32] * (len(batches) - 1)


def test_cells_of_cells_still_make_a_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("videoclip.retrieval.clustering.CELL", 16)
    monkeypatch.setattr("videoclip.retrieval.clustering.CELLS_AT_ONCE", 3)  # three centres at once for a hundred cells
    rows, group = grouped(1500, 40)
    batches = cluster_videos(rows, 8, 0, clusters_per_batch=1)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(1500))
    assert np.mean([np.bincount(group[batch]).max() / len(batch) for batch in batches]) > 0.8


def test_exchanging_members_never_lowers_similarity_and_keeps_sizes() -> None:
    rows, _ = grouped(300, 10)
    random = cluster_videos(rows, 32, 0, "random")
    better = exchange(rows @ rows.T, random)
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


@pytest.mark.parametrize("count", [50, 3000])
@pytest.mark.parametrize("value", [0, 1])
def test_vectors_that_are_all_alike_still_give_a_cover(count: int, value: int) -> None:
    batches = cluster_videos(np.full((count, 4), value, np.float32), 8, 0)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(count))


def test_some_zero_vectors_do_no_harm() -> None:
    rows, _ = grouped(500, 8)
    rows[::9] = 0
    for mode in ("cover", "paper"):
        assert all(len(batch) for batch in cluster_videos(rows, 16, 0, mode))


def test_fewer_videos_than_a_batch_are_one_batch() -> None:
    rows, _ = grouped(7, 2)
    for mode in ("cover", "random", "paper"):
        assert [sorted(batch.tolist()) for batch in cluster_videos(rows, 32, 0, mode)] == [list(range(7))]


def test_half_precision_and_memory_maps_are_read(tmp_path) -> None:
    rows, _ = grouped(200, 5)
    np.save(tmp_path / "rows.npy", rows.astype(np.float16))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    direct, from_disk = cluster_videos(rows.astype(np.float16), 16), cluster_videos(mapped, 16)
    assert all(np.array_equal(a, b) for a, b in zip(direct, from_disk))


def test_unusable_embeddings_are_refused() -> None:
    rows, _ = grouped(40, 4)
    rows[17, 2] = np.nan
    with pytest.raises(InputError, match=r"1 embeddings hold values that are not finite \(row 17\)"):
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


def recall(index: SimilarityIndex, rows: np.ndarray, queries: np.ndarray) -> float:
    """Share of the 64 nearest rows, by exact search, that the index finds."""
    _, found = index.search(queries, 64)
    truth = np.argsort(-(queries @ rows.T), axis=1)[:, :64]
    return float(np.mean([len(np.intersect1d(a, b)) / 64 for a, b in zip(found, truth)]))


def test_the_printed_recall_is_that_of_texts_which_lie_elsewhere_than_the_windows() -> None:
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((200, 64))[generator.integers(0, 200, 12000)]
    rows = unit(centres + 0.7 * generator.standard_normal((12000, 64))).astype(np.float32)
    offset = unit(generator.standard_normal((1, 64)))
    meant = rows[generator.integers(0, len(rows), 700)] + 0.7 / 8 * generator.standard_normal((700, 64))
    texts = unit(meant + offset).astype(np.float32)
    asked, held_out = texts[:400], texts[400:]
    of_windows = SimilarityIndex.build(rows, "IVF128,Flat")
    index = SimilarityIndex.build(rows, "IVF128,Flat", asked, "captions")
    assert recall(of_windows, rows, held_out) < 0.9, "what is enough for windows is not for texts"
    printed = float(re.search(r"recall@64 ([\d.]+) of 400 captions", index.description)[1])
    assert printed >= 0.95 and recall(index, rows, held_out) == pytest.approx(printed, abs=0.02)
    of_rows = float(re.search(r", ([\d.]+) of 256 rows", index.description)[1])
    assert recall(index, rows, rows[:300]) == pytest.approx(of_rows, abs=0.02), "beside it, that of windows"


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_the_papers_batches_are_full_on_uneven_data(seed: int) -> None:
    generator = np.random.default_rng(seed)
    crowded = np.repeat(generator.standard_normal((15, 24)), 200, 0) + 0.02 * generator.standard_normal((3000, 24))
    rows = np.concatenate([crowded, generator.standard_normal((100, 24))]).astype(np.float32)
    batches = cluster_videos(rows, 32, 0, "paper", faiss_index="IVF64,Flat")
    assert len(batches) == 97 and {len(set(batch.tolist())) for batch in batches} == {32}
    index = SimilarityIndex.build(rows, "IVF64,Flat")
    scores, _ = index.search_all(unit(rows[3000:]), 64)
    np.testing.assert_allclose(scores, -np.sort(-unit(rows[3000:]) @ unit(rows).T)[:, :64], atol=1e-5)
    assert (index.search(unit(rows[3000:]), 64)[1] < 0).any(), "and the index goes on with as few lists as before"


@pytest.mark.parametrize(
    ("count", "width", "kind"),
    [
        (1000, 256, "Flat"),
        (1_200_000, 768, "IVF4381,Flat"),
        (5_000_000, 768, "IVF8944,SQ8"),
        (120_000_000, 768, "IVF43817,PQ96"),
    ],
)
def test_the_index_follows_from_number_and_width(count: int, width: int, kind: str) -> None:
    assert choose_index(count, width) == kind


def test_shortened_rows_and_a_bad_index_string() -> None:
    rows, _ = grouped(3000, 50)
    index = SimilarityIndex.build(rows, "IVF50,SQ8")
    assert index.description.startswith("IVF50,SQ8 over 3000 x 24:")
    with pytest.raises(InputError, match="cannot build 'IVF5000,Flat'"):
        SimilarityIndex.build(rows, "IVF5000,Flat")
    with pytest.raises(InputError, match="cannot build 'nonsense'"):
        cluster_videos(rows, 32, 0, "paper", faiss_index="nonsense")


def test_batches_are_described_by_hand() -> None:
    rows = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    figures = describe_batches(rows, [np.array([0, 1]), np.array([1, 2])], topics=["a", "a", "b", None])
    assert figures["coverage"] == 75 and figures["most_repeated"] == 2
    assert figures["cosine"] == pytest.approx(0.5) and figures["cosine_p90"] == pytest.approx(0.9)
    assert figures["purity"] == pytest.approx(75)  # "a a" is pure, "a b" half; the row without a topic is not in them
    assert 0 <= figures["random_cosine"] <= 1


# --- Faiss comes once ---------------------------------------------------------------------------------------------


def test_no_way_to_install_brings_both_packages_that_own_the_module() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", project, re.M | re.S)[1]
    extras = dict(re.findall(r"^(\w+) = \[(.*?)\]", project.split("[project.optional-dependencies]")[1], re.M))
    assert "faiss" not in dependencies, "a default that is one package would be joined by the other"
    owners = {extra: re.findall(r'"(faiss[\w-]*)', needs) for extra, needs in extras.items()}
    assert {extra: found for extra, found in owners.items() if found} == {"cpu": ["faiss-cpu"], "gpu": ["faiss-gpu"]}
    assert {"faiss-cpu", "faiss-gpu"} <= set(FAISS_PACKAGES)
    assert "'.[cpu," in (Path(__file__).parents[1] / "Makefile").read_text()


def test_no_faiss_and_two_of_them_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = grouped(40, 4)
    load_faiss.cache_clear()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "faiss", None)
        with pytest.raises(InputError, match=r"Faiss is not installed; run: pip install 'videoclip\[cpu\]'"):
            SimilarityIndex.build(rows)
    with monkeypatch.context() as twice:
        twice.setattr("videoclip.retrieval.index._is_installed", lambda package: package in ("faiss-cpu", "faiss-gpu"))
        with pytest.raises(InputError, match="faiss-cpu and faiss-gpu are both installed and overwrite each other"):
            SimilarityIndex.build(rows)
    assert SimilarityIndex.build(rows).search(rows[:1], 1)[1].tolist() == [[0]]
