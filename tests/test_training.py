"""One step learns, an epoch uses every video once on every number of workers, and a resume changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from videoclip.checkpoints import TrainingState, load_checkpoint, save_checkpoint
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.shards import Shards
from videoclip.data.words import train_wordpiece
from videoclip.embedding import embed_videos, shares_of_blocks
from videoclip.errors import InputError
from videoclip.losses import contrastive_loss
from videoclip.model import VideoCLIPConfig
from videoclip.recipes.videoclip import Recipe
from videoclip.retrieval import cluster_videos
from videoclip.retrieval.false_negatives import PAPER, FalseNegativeConfig
from videoclip.training import (
    EpochBatches,
    OptimizerConfig,
    StuckLoss,
    learning_rate_at,
    make_optimizer,
    spread_batches,
    step,
    train_epoch,
)

OPTIMIZER = OptimizerConfig(learning_rate=2e-3, warmup_steps=5)


def make_model(vocabulary: int) -> Recipe:
    torch.manual_seed(0)
    return Recipe(
        VideoCLIPConfig(
            video_dimension=16,
            width=32,
            layers=1,
            heads=2,
            intermediate=64,
            vocabulary=vocabulary,
            cls_id=2,
            sep_id=3,
            dropout=0.0,
        )
    )


@pytest.fixture
def sampler(make_shards: Callable[..., Shards], tmp_path: Path) -> ClipSampler:
    shards = make_shards()
    tokenizer = train_wordpiece(text for record in shards for text in record.captions.text)
    sampler = ClipSampler(shards, tokenizer, ClipConfig(clips_per_video=4), tmp_path / "cache")
    sampler.vocabulary = tokenizer.vocabulary  # type: ignore[attr-defined]
    return sampler


def run(sampler: ClipSampler, epochs: int, stop: int = 0, folder: Path | None = None) -> tuple[Recipe, list[float]]:
    """Train `epochs` epochs; with `stop`, save after that many and go on with a fresh process's objects."""
    model = make_model(sampler.vocabulary)  # type: ignore[attr-defined]
    optimizer, state, losses = make_optimizer(model, OPTIMIZER), TrainingState(), []
    rows = sampler.usable_rows()
    while state.epoch < epochs:
        if folder is not None and state.epoch == stop:
            save_checkpoint(folder, model, optimizer, state, {"seed": 1})
            model = make_model(sampler.vocabulary)  # type: ignore[attr-defined]
            optimizer = make_optimizer(model, OPTIMIZER)
            state = load_checkpoint(folder, model, optimizer, {"seed": 1})
        embeddings = embed_videos(model, sampler, rows, 1, state.epoch)
        batches = [rows[batch] for batch in cluster_videos(embeddings, 5, state.epoch)]
        drawn = EpochBatches(sampler, spread_batches(batches, 1), 1, state.epoch)
        epoch = train_epoch(model, optimizer, drawn, state, 60, OPTIMIZER)
        losses += [metrics["loss"] for _, metrics in epoch]
    return model, losses


def test_training_lowers_the_loss(sampler: ClipSampler) -> None:
    _, losses = run(sampler, 15)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_a_resumed_run_ends_with_the_same_weights(sampler: ClipSampler, tmp_path: Path) -> None:
    straight, _ = run(sampler, 4)
    resumed, _ = run(sampler, 4, stop=2, folder=tmp_path / "checkpoint")
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_a_checkpoint_of_another_run_is_refused(sampler: ClipSampler, tmp_path: Path) -> None:
    model = make_model(sampler.vocabulary)  # type: ignore[attr-defined]
    optimizer = make_optimizer(model, OPTIMIZER)
    save_checkpoint(tmp_path, model, optimizer, TrainingState(), {"seed": 1, "epochs": 3})
    with pytest.raises(InputError, match="other seed"):
        load_checkpoint(tmp_path, model, optimizer, {"seed": 2, "epochs": 3})


def test_a_videos_embedding_does_not_depend_on_who_computes_it(
    sampler: ClipSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("videoclip.embedding.VIDEOS_AT_ONCE", 4)
    model = make_model(sampler.vocabulary)  # type: ignore[attr-defined]
    rows = sampler.usable_rows()
    together = embed_videos(model, sampler, rows, 3, 0)
    parts = shares_of_blocks(rows, 3)
    assert len(parts) == 3 and np.array_equal(np.concatenate(parts), rows)
    shares = np.concatenate([embed_videos(model, sampler, share, 3, 0) for share in parts])
    np.testing.assert_allclose(together, shares, atol=1e-5)


@given(st.integers(4, 120), st.integers(1, 9), st.integers(1, 4))
def test_every_video_is_used_once(videos: int, size: int, batches_per_step: int) -> None:
    batches = np.split(np.arange(videos), range(size, videos, size))
    steps = spread_batches(batches, batches_per_step)
    assert all(1 <= len(step) <= batches_per_step and all(len(rows) for rows in step) for step in steps)
    assert np.array_equal(np.concatenate([rows for step in steps for rows in step]), np.arange(videos))


def test_the_rate_warms_up_and_decays_to_zero() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate_at(number, 100, config) for number in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) == rates[10] and rates[100] == 0
    assert (np.diff(rates[10:]) < 0).all()


def test_every_epoch_draws_other_clips_and_the_same_epoch_the_same(sampler: ClipSampler) -> None:
    steps = spread_batches([sampler.usable_rows()[:5]], 1)

    def drawn(epoch: int) -> torch.Tensor:
        return next(iter(EpochBatches(sampler, steps, 1, epoch))).video_tokens.rows

    assert torch.equal(drawn(3), drawn(3))
    assert drawn(3).shape != drawn(4).shape or not torch.equal(drawn(3), drawn(4))


def test_what_clustering_and_options_say_of_negatives_reaches_the_loss(sampler: ClipSampler) -> None:
    rows = sampler.usable_rows()[:2]
    duplicates = np.zeros(len(sampler.shards), np.int64)  # every video is every other one
    steps = spread_batches([rows], 1)
    model = make_model(sampler.vocabulary).train()  # type: ignore[attr-defined]

    def excluded(rules: FalseNegativeConfig, labels: np.ndarray | None) -> float:
        batch = next(iter(EpochBatches(sampler, steps, 1, 0, 0, rules, labels)))
        assert len(batch) == 8 and batch.rows_per_rank == (8,)
        return float(model(batch)["excluded"])

    only_videos = FalseNegativeConfig(same_text=False)
    assert excluded(only_videos, duplicates) == pytest.approx(0.5), "all pairs of the other video"
    assert excluded(only_videos, None) == 0 == excluded(PAPER, duplicates)


def test_excluded_pairs_are_left_out_of_the_loss_itself(sampler: ClipSampler) -> None:
    rows, duplicates = sampler.usable_rows()[:2], np.zeros(len(sampler.shards), np.int64)
    steps = spread_batches([rows])
    model = make_model(sampler.vocabulary)  # type: ignore[attr-defined]
    batch = next(iter(EpochBatches(sampler, steps, 1, 0, 0, FalseNegativeConfig(same_text=False), duplicates)))
    with torch.no_grad():
        video, text = model.embed_video(batch.video_tokens), model.embed_text(batch.word_ids)
        other_video = batch.video[:, None] != batch.video
        expected = contrastive_loss(video, text, model.temperature, excluded=other_video)
        assert model(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        assert expected < 0.9 * contrastive_loss(video, text, model.temperature)


def test_an_update_whose_gradient_is_not_finite_changes_nothing_and_a_few_end_the_run(sampler: ClipSampler) -> None:
    model = make_model(sampler.vocabulary)  # type: ignore[attr-defined]
    optimizer = make_optimizer(model, OPTIMIZER)
    good = EpochBatches(sampler, spread_batches([sampler.usable_rows()[:4]], 1), 1, 0).draw(0)
    bad = replace(good, video_tokens=good.video_tokens.with_rows(good.video_tokens.rows * torch.inf))
    assert step(model.train(), optimizer, good, 1e-3, 2.0)["skipped"] == 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    assert step(model, optimizer, bad, 1e-3, 2.0)["skipped"] == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(moments, (v for s in optimizer.state.values() for v in s.values())))
    state = TrainingState()
    taken = list(train_epoch(model, optimizer, [good, bad, good, bad], state, 60, OPTIMIZER))
    assert [figures["skipped"] for _, figures in taken] == [0, 1, 0, 1] and state == TrainingState(1, 4)
    with pytest.raises(InputError, match="not finite in 5 steps in a row"):
        list(train_epoch(model, optimizer, [good, *[bad] * 9], state, 60, OPTIMIZER))
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_a_loss_that_stays_at_chance_is_said_once() -> None:
    stuck = StuckLoss()
    said = [stuck.notice(9.69, 9.7) for _ in range(500)]
    assert sum(map(bool, said)) == 1 and said[199] and "--model.temperature" in said[199]
    learning = StuckLoss()
    assert not any(learning.notice(9.7 if n % 150 else 8.0, 9.7) for n in range(1000))
