"""Section 3.2 of the paper: a positive pair overlaps in time, and need not start or end together."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videoclip.data.clips import ClipConfig, ClipSampler, sample_pairs
from videoclip.data.shards import Shards
from videoclip.data.words import train_wordpiece
from videoclip.errors import InputError


@st.composite
def videos(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Captions of one to four videos: starts, ends, words, captions a video, seconds a video."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    captions = np.array(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
    seconds = generator.integers(1, 90, len(captions))
    starts = np.concatenate([np.sort(generator.uniform(0, s, c)) for s, c in zip(seconds, captions)]).astype(np.float32)
    ends = (starts + generator.uniform(0.1, 8, len(starts))).astype(np.float32)
    ends = np.minimum(ends, np.repeat(seconds, captions) + np.float32(0.5))
    words = generator.integers(1, 40, len(starts)) * (generator.random(len(starts)) < 0.7)  # some have no word
    first = np.cumsum(captions) - captions
    words[first + generator.integers(0, captions)] += 1  # but every video has one
    return (
        starts,
        np.maximum(ends, starts + np.float32(0.01)),
        words,
        captions,
        seconds,
    )


@given(videos(), st.integers(0, 1000), st.sampled_from(["overlap", "exact"]))
@settings(max_examples=200, deadline=None)
def test_a_sampled_video_clip_overlaps_its_text_clip(drawn: tuple, seed: int, positives: str) -> None:
    starts, ends, words, captions, seconds = drawn
    config = ClipConfig(positives, clips_per_video=8)
    pairs = sample_pairs(starts, ends, words, captions, seconds, config, np.random.default_rng(seed))
    first = np.cumsum(captions) - captions
    for v, a, b, i, j, count in zip(pairs.video, pairs.a, pairs.b, pairs.i, pairs.j, pairs.words):
        chosen = slice(first[v] + i, first[v] + j)
        assert 0 <= i < j <= captions[v], "captions are consecutive and of the same video"
        assert 0 <= a < b <= seconds[v], "the video clip lies inside its video"
        assert b - a <= config.max_seconds
        begin, finish = starts[chosen].min(), ends[chosen].max()
        # Captions may outlast the last whole second, the only place where the two can but touch.
        assert a < finish and (b > begin or b == seconds[v])
        assert 1 <= count <= config.max_words, "the text clip is within its budget"
        assert count == words[chosen].sum() or (words[chosen] > 0).sum() == 1, "only a single caption is ever cut"


def test_overlapping_clips_start_elsewhere_than_their_text_but_exact_ones_do_not() -> None:
    starts = np.arange(0, 100, 5, dtype=np.float32)
    arguments = (starts, starts + 5, np.full(20, 10), np.array([20]), np.array([100]))
    config = ClipConfig("overlap", clips_per_video=500, min_words=10, max_words=10)
    overlapping = sample_pairs(*arguments, config, np.random.default_rng(0))
    assert len(set((overlapping.a - 5 * overlapping.i).tolist())) > 10
    lengths = overlapping.b - overlapping.a
    assert lengths.min() == 3 and lengths.max() == 32
    exact = sample_pairs(*arguments, ClipConfig("exact", 500, 10, 10), np.random.default_rng(0))
    assert (exact.a == 5 * exact.i).all() and (exact.b == exact.a + 5).all()


def test_a_caption_without_a_word_beside_one_over_budget_makes_no_empty_text() -> None:
    starts = np.arange(2, dtype=np.float32)
    config = ClipConfig(clips_per_video=100, min_words=8, max_words=8)
    words, one = np.array([0, 30]), np.array([2])
    pairs = sample_pairs(starts, starts + 1, words, one, one, config, np.random.default_rng(0))
    assert (pairs.words == 8).all()


def test_text_grows_to_both_sides_of_its_first_caption() -> None:
    starts = np.arange(9, dtype=np.float32)
    config = ClipConfig(clips_per_video=2000, min_words=3, max_words=3)
    ones = np.ones(9, np.int64)
    pairs = sample_pairs(starts, starts + 1, ones, np.array([9]), np.array([9]), config, np.random.default_rng(0))
    assert (pairs.j - pairs.i == 3).all(), "a budget of three one-word captions is always filled"
    assert set(pairs.i.tolist()) == set(range(7))


@pytest.mark.parametrize(
    "options", [{"positives": "near"}, {"min_words": 9, "max_words": 8}, {"min_seconds": 0}, {"clips_per_video": 0}]
)
def test_impossible_configurations_are_refused(options: dict) -> None:
    with pytest.raises(InputError):
        ClipConfig(**options)


def test_a_batch_holds_the_tokens_and_words_of_its_pairs(make_shards: Callable[..., Shards], tmp_path: Path) -> None:
    shards = make_shards()
    tokenizer = train_wordpiece(text for record in shards for text in record.captions.text)
    sampler = ClipSampler(shards, tokenizer, ClipConfig(clips_per_video=4, min_words=3, max_words=12), tmp_path)
    rows = np.array([11, 0, 5])
    batch = sampler.batch(rows, np.random.default_rng(1))
    assert batch.video.tolist() == [11] * 4 + [0] * 4 + [5] * 4
    assert batch.video_tokens.lengths.sum() == len(batch.video_tokens.rows)
    for row, clip, ids in zip(batch.video.tolist(), batch.video_tokens.split(), batch.word_ids.split()):
        record, length, words = shards.record(row), len(clip), ids[1:-1].tolist()
        whole = np.asarray(record.tokens)
        assert any(np.array_equal(whole[a : a + length], clip) for a in range(len(whole) - length + 1))
        assert ids[0] == tokenizer.cls_id and ids[-1] == tokenizer.sep_id
        spoken = [i for text in tokenizer.word_ids(record.captions.text) for i in text]
        assert any(spoken[s : s + len(words)] == words for s in range(len(spoken)))


def test_the_same_seed_gives_the_same_batch(make_shards: Callable[..., Shards], tmp_path: Path) -> None:
    shards = make_shards()
    tokenizer = train_wordpiece(text for record in shards for text in record.captions.text)
    first, second = (ClipSampler(shards, tokenizer, ClipConfig(), tmp_path) for _ in range(2))
    rows = np.arange(6)
    one, two, other = (s.batch(rows, np.random.default_rng(n)) for s, n in ((first, 3), (second, 3), (first, 4)))
    assert torch.equal(one.video_tokens.rows, two.video_tokens.rows)
    assert torch.equal(one.word_ids.rows, two.word_ids.rows)
    assert not torch.equal(one.word_ids.rows, other.word_ids.rows)


def test_videos_without_captions_cannot_be_sampled(make_shards: Callable[..., Shards], tmp_path: Path) -> None:
    shards = make_shards(count=3, captions=0)
    tokenizer = train_wordpiece(["some words"])
    assert not len(ClipSampler(shards, tokenizer, ClipConfig(), tmp_path).usable_rows())


def test_a_fitted_vocabulary_is_the_same_in_every_process() -> None:
    code = (
        "from videoclip.data.words import train_wordpiece\n"
        "texts = ['chop the onion', 'stir the soup slowly', 'chopping onions', 'fold the eggs in'] * 3\n"
        "print(train_wordpiece(texts, 90).fingerprint())"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)]
    prints = {process.communicate()[0] for process in processes}
    assert len(prints) == 1 and prints != {""}


def test_words_are_cut_by_the_vocabulary_and_special_words_are_not_words_of_a_text() -> None:
    tokenizer = train_wordpiece(["chop the onion", "chop the onions"], 60)
    (ids,) = tokenizer.word_ids(["chop the onion"])
    assert len(ids) == 3
    packed = tokenizer.clip_ids(["chop the onion", "chop"], 2)
    assert packed.rows.tolist() == [
        tokenizer.cls_id,
        *ids[:2],
        tokenizer.sep_id,
        tokenizer.cls_id,
        ids[0],
        tokenizer.sep_id,
    ]
    assert packed.lengths.tolist() == [4, 3]
