"""A step is what the options say, whoever computes it, in however many parts and blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import videoclip.parts.pairs as pairs_module
from videoclip.checkpoints import (
    TrainingState,
    damage,
    finish_checkpoint,
    load_checkpoint,
    restore_random_state,
    save_checkpoint,
    snapshot,
    write_share,
)
from videoclip.data.clips import ClipBatch, ClipConfig, ClipSampler
from videoclip.data.shards import Shards
from videoclip.data.words import train_wordpiece
from videoclip.errors import InputError
from videoclip.gradient_caching import embedding_in_parts, in_parts
from videoclip.model import VideoCLIPConfig
from videoclip.packed import Packed
from videoclip.parts.pairs import gather_pairs
from videoclip.recipes import recipe_named
from videoclip.retrieval.false_negatives import FalseNegativeConfig, pair_labels
from videoclip.training import (
    Computation,
    EpochBatches,
    OptimizerConfig,
    make_optimizer,
    spread_batches,
    train_epoch,
    update,
)

OPTIMIZER = OptimizerConfig(learning_rate=2e-3, warmup_steps=2)


@pytest.fixture
def sampler(make_shards: Callable[..., Shards], tmp_path: Path) -> ClipSampler:
    return make_sampler(make_shards(), tmp_path)


def make_sampler(shards: Shards, folder: Path) -> ClipSampler:
    tokenizer = train_wordpiece(text for record in shards for text in record.captions.text)
    sampler = ClipSampler(shards, tokenizer, ClipConfig(clips_per_video=4), folder / "cache")
    sampler.vocabulary = tokenizer.vocabulary  # type: ignore[attr-defined]
    return sampler


def make_recipe(sampler: ClipSampler, dropout: float = 0.0, name: str = "videoclip") -> torch.nn.Module:
    torch.manual_seed(0)
    config = VideoCLIPConfig(16, 32, 1, 1, 2, 64, vocabulary=sampler.vocabulary, cls_id=2, sep_id=3, dropout=dropout)  # type: ignore[attr-defined]
    return recipe_named(name).Recipe(config).train()


def batch_of(sampler: ClipSampler, videos: int = 6) -> ClipBatch:
    rows = sampler.usable_rows()[:videos]
    return EpochBatches(sampler, [[rows]], 1, 0, 0, FalseNegativeConfig()).draw(0)


# --- What a step is -----------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 70))
def test_steps_are_even_and_use_every_batch_once(count: int, size: int) -> None:
    steps = spread_batches([np.array([number]) for number in range(count)], size)
    sizes = [len(step) for step in steps]
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1 and len(steps) == -(-count // size)
    assert [int(rows[0]) for step in steps for rows in step] == list(range(count))


@pytest.mark.parametrize("workers", [2, 3, 5])
@pytest.mark.parametrize("batches_per_step", [1, 2, 4])
def test_the_shares_of_any_number_of_workers_are_the_batch_of_one(
    sampler: ClipSampler, workers: int, batches_per_step: int
) -> None:
    batches = np.split(sampler.usable_rows(), [3, 6, 9])
    steps = spread_batches(batches, batches_per_step)
    rules = FalseNegativeConfig(same_text=False)
    alone = EpochBatches(sampler, steps, 1, 4, 0, rules)
    shared = [EpochBatches(sampler, steps, 1, 4, rank, rules, None, workers) for rank in range(workers)]
    for place in range(len(steps)):
        whole, shares = alone.draw(place), [of_worker.draw(place) for of_worker in shared]
        together = ClipBatch.together(shares)
        assert torch.equal(together.video_tokens.rows, whole.video_tokens.rows)
        assert torch.equal(together.word_ids.rows, whole.word_ids.rows) and torch.equal(together.video, whole.video)
        assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
        counts = [len(share) for share in shares]
        assert max(counts) - min(counts) <= 1 and all(share.rows_per_rank == tuple(counts) for share in shares)


def test_a_step_with_fewer_pairs_than_workers_is_refused(sampler: ClipSampler) -> None:
    with pytest.raises(InputError, match="4 pairs cannot be shared by 5 workers"):
        EpochBatches(sampler, spread_batches([sampler.usable_rows()[:1]]), 1, 0, workers=5)


# --- Blocks and parts ---------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made while the block runs."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(options or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("name", ["videoclip", "margin"])
def test_the_loss_in_blocks_is_the_loss_and_never_holds_all_pairs(
    sampler: ClipSampler, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, batch = make_recipe(sampler, name=name), batch_of(sampler, 10)
    with torch.no_grad():
        video, text = recipe.embed_video(batch.video_tokens), recipe.embed_text(batch.word_ids)

    def computed() -> tuple[dict[str, torch.Tensor], list[torch.Tensor], int]:
        own = [rows.clone().requires_grad_() for rows in (video, text)]
        monkeypatch.setattr(recipe, "embed_video", lambda _: own[0])
        monkeypatch.setattr(recipe, "embed_text", lambda _: own[1])
        with LargestTensor() as largest:
            outputs = recipe(batch)
            outputs["loss"].backward()
        return outputs, [rows.grad for rows in own], largest.elements

    whole, gradients, elements = computed()
    assert elements == 40 * 40
    monkeypatch.setattr(pairs_module, "BLOCK", 7 * 40)
    blocks, of_blocks, fewer = computed()
    assert fewer <= 32 * 40, "a block, or the embeddings themselves"
    assert whole["excluded"] >= 0 and blocks.keys() == whole.keys()
    for figure in whole:
        torch.testing.assert_close(blocks[figure], whole[figure], rtol=1e-6, atol=1e-7, check_dtype=False)
    for one, other in zip(gradients, of_blocks):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


def gradients(recipe: torch.nn.Module, batch: ClipBatch, pairs_at_once: int) -> dict[str, torch.Tensor]:
    recipe.zero_grad()
    with embedding_in_parts(recipe, pairs_at_once):
        loss = recipe(batch)["loss"]
    loss.backward()
    return {name: value.grad.clone() for name, value in recipe.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", ["videoclip", "margin"])
def test_gradients_of_a_large_batch_in_small_parts(sampler: ClipSampler, name: str) -> None:
    recipe, batch = make_recipe(sampler, name=name), batch_of(sampler)
    whole, cached = gradients(recipe, batch, 0), gradients(recipe, batch, 5)
    assert whole.keys() == cached.keys() and len(whole) > 10
    for parameter, value in whole.items():
        torch.testing.assert_close(cached[parameter], value, rtol=1e-5, atol=1e-5, msg=parameter)
    assert "embed_video" not in vars(recipe), "the recipe is as it was"


def test_both_passes_over_a_part_draw_the_same_dropout(sampler: ClipSampler) -> None:
    recipe, batch = make_recipe(sampler, dropout=0.5), batch_of(sampler)
    torch.manual_seed(3)
    cached = gradients(recipe, batch, 5)
    recipe.zero_grad()
    torch.manual_seed(3)
    video = torch.cat([recipe.embed_video(part) for part in batch.video_tokens.parts(5)])
    text = torch.cat([recipe.embed_text(part) for part in batch.word_ids.parts(5)])
    pairs = gather_pairs(video, text, batch)
    logits = (video @ text.T / recipe.temperature).masked_fill(pairs.excluded, float("-inf"))
    target = torch.arange(len(batch))
    cross_entropy = torch.nn.functional.cross_entropy
    (cross_entropy(logits, target) + cross_entropy(logits.T, target)).backward()
    for parameter, value in recipe.named_parameters():
        torch.testing.assert_close(cached[parameter], value.grad, rtol=1e-4, atol=1e-5)


def test_a_part_is_never_larger_than_asked_and_its_inner_values_are_forgotten() -> None:
    layer, seen, kept = torch.nn.Linear(4, 4), [], []

    def tower(x: Packed) -> torch.Tensor:
        seen.append(len(x))
        return torch.stack([rows.sum(0) for rows in x.with_rows(layer(x.rows).relu()).split()])

    x = Packed.of([torch.randn(n, 4) for n in (1, 2, 3, 4, 5)])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = in_parts(tower, x, 2, torch.device("cpu"))
    assert seen == [2, 2, 1] and out.shape == (5, 4)
    out.sum().backward()
    assert seen == [2, 2, 1, 1, 2, 2], "each again, the last first"


def test_parts_are_refused_where_a_recipe_embeds_otherwise() -> None:
    class Other(torch.nn.Linear):
        pass

    with pytest.raises(InputError, match="--pairs-at-once"), embedding_in_parts(Other(2, 2), 3):
        pass


def test_bfloat16_keeps_float32_weights_and_nearly_the_loss(sampler: ClipSampler) -> None:
    batch = batch_of(sampler)
    losses = []
    for half in (False, True):
        recipe = make_recipe(sampler)
        figures = update(recipe, make_optimizer(recipe, OPTIMIZER), batch, 1e-3, 2.0, Computation(bfloat16=half))
        losses.append(float(figures["loss"]))
        assert all(value.dtype == torch.float32 for value in recipe.parameters())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_fused_optimiser_leaves_everything_where_the_gradient_is_not_finite(sampler: ClipSampler) -> None:
    recipe, good = make_recipe(sampler), batch_of(sampler)
    bad = replace(good, video_tokens=good.video_tokens.with_rows(good.video_tokens.rows * torch.inf))
    optimizer = torch.optim.AdamW(recipe.parameters(), 1e-3, fused=True)
    assert update(recipe, optimizer, good, 1e-3, 2.0)["skipped"] == 0
    before = [
        value.clone() for value in (*recipe.parameters(), *(v for s in optimizer.state.values() for v in s.values()))
    ]
    assert update(recipe, optimizer, bad, 1e-3, 2.0)["skipped"] == 1
    after = [*recipe.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    assert all(torch.equal(one, other) for one, other in zip(before, after))


def test_figures_are_logged_every_few_steps_as_their_mean(sampler: ClipSampler) -> None:
    def rows_of(log_every: int) -> list[dict[str, float]]:
        recipe = make_recipe(sampler)
        batches = EpochBatches(sampler, spread_batches(np.split(sampler.usable_rows(), [2, 4, 6, 8])), 1, 0)
        computation = Computation(log_every=log_every)
        epoch = train_epoch(
            recipe, make_optimizer(recipe, OPTIMIZER), batches, TrainingState(), 9, OPTIMIZER, computation
        )
        return [row for _, row in epoch]

    each, few = rows_of(1), rows_of(2)
    assert [bool(row) for row in few] == [False, True, False, True, True], "the last step of an epoch is logged"
    assert few[1]["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2, rel=1e-6)
    assert few[4]["loss"] == each[4]["loss"]


# --- Checkpoints --------------------------------------------------------------------------------------------------


def train(sampler: ClipSampler, folder: Path | None = None, stop: int = 0) -> dict[str, torch.Tensor]:
    """Two epochs of four steps with dropout; after `stop` steps from a checkpoint, with a new process's objects."""
    recipe, state = make_recipe(sampler, dropout=0.1), TrainingState()
    optimizer = make_optimizer(recipe, OPTIMIZER)
    steps = spread_batches(np.split(sampler.usable_rows(), [3, 6, 9]))
    while state.epoch < 2:
        torch.manual_seed(state.epoch)
        if state.random:
            restore_random_state(state.random)
        batches = EpochBatches(sampler, steps, 1, state.epoch, first=state.place)
        for _ in train_epoch(recipe, optimizer, batches, state, 8, OPTIMIZER):
            if folder and state.step == stop:
                save_checkpoint(folder, recipe, optimizer, state, {})
                break
        if folder and state.step == stop and state.epoch * 4 + state.place == stop:
            recipe = make_recipe(sampler, dropout=0.1)
            optimizer = make_optimizer(recipe, OPTIMIZER)
            state, folder = load_checkpoint(folder, recipe, optimizer, {}), None
    return recipe.state_dict()


def test_a_run_resumed_within_an_epoch_ends_with_the_same_bits(sampler: ClipSampler, tmp_path: Path) -> None:
    straight, resumed = train(sampler), train(sampler, tmp_path / "checkpoint", stop=6)
    assert (tmp_path / "checkpoint" / "state.json").exists()
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_workers_write_shares_of_about_a_size_and_any_number_reads_them(sampler: ClipSampler, tmp_path: Path) -> None:
    recipe = make_recipe(sampler)
    optimizer = make_optimizer(recipe, OPTIMIZER)
    update(recipe, optimizer, batch_of(sampler), 1e-3, 2.0)
    shares = [snapshot(recipe, optimizer, rank, 3) for rank in range(3)]
    sizes = [sum(tensor.nbytes for name, tensor in share.items() if "random" not in name) for share in shares]
    assert max(sizes) < 0.5 * sum(sizes)
    for rank, share in enumerate(shares):
        write_share(tmp_path, share, rank, 3)
    finish_checkpoint(tmp_path, TrainingState(1, 7, 3), {"seed": 1}, 3)
    fresh = make_recipe(sampler)
    of_fresh = make_optimizer(fresh, OPTIMIZER)
    state = load_checkpoint(tmp_path, fresh, of_fresh, {"seed": 1}, rank=0)
    assert (state.epoch, state.step, state.place) == (1, 7, 3)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in recipe.state_dict().items())
    update(recipe, optimizer, batch_of(sampler), 1e-3, 2.0), update(fresh, of_fresh, batch_of(sampler), 1e-3, 2.0)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in recipe.state_dict().items())


def test_a_flipped_bit_or_a_missing_file_is_noticed(sampler: ClipSampler, tmp_path: Path) -> None:
    recipe = make_recipe(sampler)
    save_checkpoint(tmp_path, recipe, make_optimizer(recipe, OPTIMIZER), TrainingState(), {})
    assert damage(tmp_path) == ""
    share = tmp_path / "share-00000-of-00001.safetensors"
    data = bytearray(share.read_bytes())
    data[-100] ^= 1
    share.write_bytes(data)
    assert "not what was written" in damage(tmp_path)
    share.unlink()
    assert "missing" in damage(tmp_path)


# --- Real processes -----------------------------------------------------------------------------------------------


def _train_steps(shards: Path, folder: Path, rank: int, workers: int, last: bool, first: Path | None) -> None:
    """The first or the last two of four steps, on so many workers, in blocks and in parts where there are several."""
    torch.set_num_threads(1)
    sampler = make_sampler(Shards(shards), folder / str(rank))
    recipe = make_recipe(sampler)
    optimizer = torch.optim.SGD(recipe.parameters(), 0.05, momentum=0.9)
    state = load_checkpoint(first, recipe, optimizer, {}, rank) if first else TrainingState()
    module = DistributedDataParallel(recipe) if workers > 1 else recipe
    steps = spread_batches(np.split(sampler.usable_rows(), [2, 5, 7, 9, 10, 11]), 2)
    batches = EpochBatches(sampler, steps, 1, 0, rank, FalseNegativeConfig(), None, workers, state.place)
    computation = Computation(pairs_at_once=2 if workers > 1 else 0)
    for _ in train_epoch(module, optimizer, batches, state, 8, OPTIMIZER, computation):
        if state.step == 2 and not last:
            break
    write_share(folder, snapshot(recipe, optimizer, rank, workers), rank, workers)


def _worker(rank: int, workers: int, shards: Path, folder: Path, last: bool, first: Path | None) -> None:
    pairs_module.BLOCK = 50
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)
    _train_steps(shards, folder, rank, workers, last, first)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_another_number_of_workers_continues_and_ends_as_one_alone_does(
    make_shards: Callable[..., Shards], tmp_path: Path
) -> None:
    """One worker, then two, in blocks and with cached gradients; against one that did it all at once."""
    shards, folders = make_shards().folder, [tmp_path / name for name in ("one", "two", "alone")]
    for folder in folders:
        folder.mkdir()
    one, two, alone = folders
    _train_steps(shards, one, 0, 1, False, None)
    finish_checkpoint(one, TrainingState(0, 2, 2), {}, 1)
    multiprocessing.spawn(_worker, (2, shards, two, True, one), nprocs=2)
    finish_checkpoint(two, TrainingState(1, 4, 0), {}, 2)
    _train_steps(shards, alone, 0, 1, True, None)
    finish_checkpoint(alone, TrainingState(1, 4, 0), {}, 1)
    sampler, ends = make_sampler(Shards(shards), tmp_path), []
    for folder in (two, alone):
        recipe = make_recipe(sampler)
        load_checkpoint(folder, recipe, torch.optim.SGD(recipe.parameters(), 0.05, momentum=0.9), {})
        ends.append(recipe.state_dict())
    start = make_recipe(sampler).state_dict()
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert any(not torch.allclose(value, start[name], atol=1e-3) for name, value in ends[1].items()), "it has learned"


def test_labels_say_which_pair_of_all_it_is() -> None:
    words = Packed.of([torch.tensor([2, 7, 3])] * 2)
    batch = ClipBatch(Packed(torch.zeros(2, 4), torch.ones(2, dtype=torch.int64)), words, torch.arange(2))
    assert pair_labels(batch, FalseNegativeConfig(same_text=False), None, 5)[:, 2].tolist() == [5, 6]
