"""Several folders of shards in one training: each has its share of the batches, and clusters stay within a source."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import random_record
from hypothesis import given
from hypothesis import strategies as st
from test_interruptions import plan, run, same_bits  # noqa: F401  # a fixture

from pipelines.options import read_options
from pipelines.pretrain import PretrainConfig, _check_options, _identity, _with_limits
from pipelines.pretrain_worker import TrainingPlan
from pipelines.runs import with_absolute_paths
from pipelines.stopping import STOP_FILE
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.shards import Manifest, Shards, ShardWriter
from videoclip.data.sources import JoinedShards, open_shards, rows_by_source
from videoclip.data.words import train_wordpiece
from videoclip.errors import InputError
from videoclip.retrieval.epochs import BatchOptions, Clustering
from videoclip.retrieval.mixing import Mix, apportion, make_mixed_clustering, rows_drawn


def folder_of(path: Path, numbers: range, fingerprint: str = "f" * 64, dimension: int = 16) -> Path:
    writer = ShardWriter(path, Manifest("random", fingerprint, dimension), 4)
    for number in numbers:
        writer.add(random_record(number, dimension))
    writer.close()
    return path


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Nine videos and fifteen; two of them bear the same id in both."""
    return [folder_of(tmp_path / "a", range(9)), folder_of(tmp_path / "b", range(7, 22))]


# --- Opened as one ------------------------------------------------------------------------------------------------


def test_rows_are_counted_through_all_folders(folders: list[Path], tmp_path: Path) -> None:
    shards, alone = open_shards(tuple(folders)), [Shards(folder) for folder in folders]
    assert isinstance(shards, JoinedShards) and len(shards) == 24
    expected = [record for source in alone for record in source]
    for found, record in zip(shards, expected, strict=True):
        assert found.video_id == record.video_id and np.array_equal(found.tokens, record.tokens)
    assert [rows.tolist() for rows in rows_by_source(shards, np.array([3, 8, 9, 23]))] == [[3, 8], [9, 23]]
    assert shards.video_ids() == [record.video_id for record in expected]
    with pytest.raises(InputError, match=r"'video_00[78]' stands in two folders"):
        shards.rows_by_id()
    tokenizer = train_wordpiece(text for record in expected for text in record.captions.text)
    sampler = ClipSampler(shards, tokenizer, ClipConfig(clips_per_video=2), tmp_path)
    other = ClipSampler(alone[1], tokenizer, ClipConfig(clips_per_video=2), tmp_path)
    rows = np.array([0, 7, 14])
    drawn, of_other = (
        each.batch(some, np.random.default_rng(3)) for each, some in ((sampler, rows + 9), (other, rows))
    )
    assert torch.equal(drawn.word_ids.rows, of_other.word_ids.rows)
    assert torch.equal(drawn.video_tokens.rows, of_other.video_tokens.rows)


def test_one_folder_is_opened_as_ever(folders: list[Path]) -> None:
    assert type(open_shards(folders[0])) is Shards and type(open_shards((folders[0],))) is Shards


def test_tokens_of_different_encoders_or_one_folder_twice_are_refused(folders: list[Path], tmp_path: Path) -> None:
    other = folder_of(tmp_path / "other", range(3), "0" * 64)
    with pytest.raises(InputError, match=r"other: tokens of the encoder random \(000000000000\)"):
        open_shards((folders[0], other))
    with pytest.raises(InputError, match="given twice"):
        open_shards((folders[0], folders[1], folders[0]))
    with pytest.raises(InputError, match="tokens 8 wide, not 16"):
        open_shards((folders[0], folder_of(tmp_path / "narrow", range(3), dimension=8)))


# --- Shares -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 500), st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_shares_are_rounded_to_whole_numbers_that_add_up(total: int, shares: list[float]) -> None:
    counts, exact = apportion(total, shares), total * np.array(shares) / sum(shares)
    assert sum(counts) == total and np.all(np.abs(np.array(counts) - exact) < 1)


def mix_of(sizes: tuple[int, ...], shares: tuple[float, ...], mixed: bool = False, size: int = 4) -> Mix:
    bounds = np.cumsum((0, *sizes))
    return Mix([np.arange(a, b) for a, b in itertools.pairwise(bounds)], size, shares, mixed, seed=3)


@pytest.mark.parametrize("mixed", [False, True])
def test_over_the_epochs_every_video_of_a_source_is_used_equally_often(mixed: bool) -> None:
    mix = mix_of((50, 30, 7), (0.5, 0.25, 0.25), mixed)
    seen = [Counter[int]() for _ in mix.rows]
    for epoch in range(9):
        drawn = mix.draw(epoch)
        places = [sum(map(len, source.passes)) for source in drawn]
        assert places == [source.batches * source.size for source in drawn]
        if mixed:
            assert [source.size for source in drawn] == [2, 1, 1] and {source.batches for source in drawn} == {22}
        else:
            assert [source.batches for source in drawn] == [11, 6, 5] and mix.batches == 22
        for counter, source in zip(seen, drawn):
            for of_pass in source.passes:
                assert len(np.unique(of_pass)) == len(of_pass)
                counter.update(of_pass.tolist())
    for counter, rows in zip(seen, mix.rows):
        assert set(counter) == set(rows.tolist()) and max(counter.values()) - min(counter.values()) <= 1


def test_draws_follow_from_seed_and_epoch_alone() -> None:
    mix = mix_of((50, 30), (0.3, 0.7))

    def rows(of: Mix, epoch: int) -> list[list[int]]:
        return [of_pass.tolist() for source in of.draw(epoch) for of_pass in source.passes]

    assert rows(mix, 5) == rows(mix_of((50, 30), (0.3, 0.7)), 5)
    assert rows(mix, 5) != rows(mix, 6) and rows(mix, 5) != rows(replace(mix, seed=4), 5)


def test_without_shares_every_video_is_used_once_an_epoch() -> None:
    mix = mix_of((10, 6), ())
    assert rows_drawn(mix.draw(3)).tolist() == list(range(16)) and mix.batches == 3 + 2


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ((0.5, 0.3, 0.2), "3 shares for 2 folders"),
        ((0.5,), "1 shares for 2 folders"),
        ((1.0, 0.0), "more than zero"),
        ((1.5, -0.5), "more than zero"),
        ((float("nan"), 0.5), "more than zero"),
        ((0.5, 0.3), "adds up to 0.8"),
    ],
)
def test_shares_that_cannot_be_are_refused(folders: list[Path], mix: tuple[float, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        _check_options(PretrainConfig(tuple(folders), mix=mix))


def test_mixed_batches_need_shares_and_clusters_that_fit_them(folders: list[Path]) -> None:
    config = PretrainConfig(tuple(folders), batch_sources="mixed")
    with pytest.raises(InputError, match="give --mix"):
        _check_options(config)
    with pytest.raises(InputError, match="8 clusters do not divide a batch of 19"):
        _check_options(replace(config, mix=(0.6, 0.4), clusters_per_batch=8, videos_per_batch=32))


def test_a_source_that_would_get_no_place_is_named() -> None:
    with pytest.raises(InputError, match="folder 2: an epoch of 20 videos has only 5 batches"):
        mix_of((15, 5), (0.95, 0.05)).counts()
    with pytest.raises(InputError, match="folder 2: a batch has only 4 videos"):
        mix_of((15, 5), (0.95, 0.05), mixed=True).counts()
    with pytest.raises(InputError, match="folder 2 of --shards has no video"):
        mix_of((15, 0), (0.5, 0.5)).counts()


# --- Batches ------------------------------------------------------------------------------------------------------


def clustered(mix: Mix, mixed: bool, embeddings: np.ndarray, mode: str = "cover") -> Clustering:
    drawn = mix.draw(1)
    rows = rows_drawn(drawn)
    options = BatchOptions(mix.videos_per_batch, mode, duplicate_similarity=0.999)  # type: ignore[arg-type]
    return make_mixed_clustering(embeddings[rows], rows, drawn, options, mixed, 5, len(embeddings))


@pytest.mark.parametrize("mode", ["cover", "random", "paper"])
def test_batches_of_one_source_each_have_their_shares(mode: str) -> None:
    mix = mix_of((40, 25), (0.4, 0.6))
    embeddings = np.random.default_rng(0).standard_normal((65, 6)).astype(np.float32)
    clustering = clustered(mix, False, embeddings, mode)
    sources = [set((batch >= 40).tolist()) for batch in clustering.batches]
    assert all(len(source) == 1 for source in sources), "no batch has videos of both"
    assert Counter(source.pop() for source in sources) == {False: 7, True: 10}
    assert all(len(batch) == 4 for batch in clustering.batches)
    assert clustering.figures["source_1"] == pytest.approx(100 * 7 / 17, abs=0.01)


def test_mixed_batches_have_videos_of_all_sources_and_clusters_of_one() -> None:
    """Twin videos stand two by two in each source, and the sources look alike: twins must meet within their own."""
    mix = mix_of((16, 16), (0.5, 0.5), mixed=True)
    twins = np.repeat(np.eye(8, dtype=np.float32), 2, axis=0)
    clustering = clustered(mix, True, np.concatenate([twins, twins]))
    assert len(clustering.batches) == 8
    for batch in clustering.batches:
        first, second = sorted(batch[batch < 16].tolist()), sorted(batch[batch >= 16].tolist())
        assert len(first) == len(second) == 2
        assert first[0] // 2 == first[1] // 2 and second[0] // 2 == second[1] // 2
    assert clustering.duplicates[1::2].tolist() == list(range(0, 32, 2)), "the same in another source is another video"


def test_what_is_not_finite_is_left_out_and_a_source_of_nothing_else_is_refused() -> None:
    mix = mix_of((12, 12), ())
    embeddings = np.random.default_rng(0).standard_normal((24, 6)).astype(np.float32)
    embeddings[3, 2] = np.nan
    clustering = clustered(mix, False, embeddings)
    assert clustering.left_out.tolist() == [3]
    assert sorted(np.concatenate(clustering.batches).tolist()) == [n for n in range(24) if n != 3]
    embeddings[12:] = np.inf
    with pytest.raises(InputError, match="no video of source 2 has a finite"):
        clustered(mix, False, embeddings)


# --- The run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True])
def test_a_mixed_run_that_is_stopped_goes_on_with_the_same_bits(
    plan: TrainingPlan,  # noqa: F811
    folders: list[Path],
    mixed: bool,
) -> None:
    batches = replace(plan.batches, options=BatchOptions(4), shares=(0.25, 0.75), mixed=mixed)
    straight = replace(plan, shards=tuple(folders), batches=batches, epochs=2, output=plan.output / "straight")
    stopped = replace(straight, output=plan.output / "stopped")
    run(straight)
    stopped.output.mkdir()
    for _ in range(2):
        (stopped.output / STOP_FILE).touch()  # after one step of each attempt
        run(stopped)
    (stopped.output / STOP_FILE).unlink()
    run(stopped)
    assert same_bits(straight, stopped)
    clusterings = [Clustering.load(path) for path in sorted((straight.output / "batches").glob("clustering-*.npz"))]
    assert len(clusterings) == 2
    for clustering in clusterings:
        assert len(clustering.batches) == 6
        of_first = [int((batch < 9).sum()) for batch in clustering.batches]
        assert of_first == [1] * 6 if mixed else sorted(of_first) == [0, 0, 0, 0, 4, 4]


def test_shards_and_shares_are_read_from_the_command_and_from_a_file(tmp_path: Path) -> None:
    words = ["--shards", "A", "B", "C", "--mix", "0.5", "0.3", "0.2", "--batch-sources", "mixed"]
    config = tyro.cli(PretrainConfig, args=words)
    assert config.shards == (Path("A"), Path("B"), Path("C")) and config.mix == (0.5, 0.3, 0.2)
    assert with_absolute_paths(config).shards == tuple(Path.cwd() / name for name in "ABC")
    (tmp_path / "o.yaml").write_text("shards: [A, B]\nmix: [0.5, 0.5]\n")
    assert read_options(tmp_path / "o.yaml", PretrainConfig).shards == (Path("A"), Path("B"))
    (tmp_path / "o.yaml").write_text("shards: A\n")
    assert read_options(tmp_path / "o.yaml", PretrainConfig).shards == Path("A")
    assert tyro.cli(PretrainConfig, args=["--shards", "A"]).shards == Path("A")


def test_a_run_on_one_folder_is_the_run_that_it_was_before_there_was_a_mix(
    make_shards: Callable[..., Shards], folders: list[Path]
) -> None:
    shards = make_shards()
    identity = _identity(_with_limits(PretrainConfig(shards.folder)), shards)
    assert not {"mix", "batch_sources", "source_rows"} & identity.keys()
    joined = open_shards(tuple(folders))
    assert _identity(_with_limits(PretrainConfig(tuple(folders))), joined)["source_rows"] == [0, 9, 24]
