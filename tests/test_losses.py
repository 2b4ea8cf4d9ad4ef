"""The loss is InfoNCE in both directions, and negatives come from every worker."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st

from videoclip.data.clips import ClipBatch
from videoclip.errors import InputError
from videoclip.losses import contrastive_loss, first_row, gather, gather_with_gradient
from videoclip.retrieval.false_negatives import (
    PAPER,
    FalseNegativeConfig,
    false_negatives,
    near_duplicates,
    pair_labels,
)


def test_loss_of_two_pairs_by_hand() -> None:
    video, text = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # similarities [[1, 1], [0, 0]]: video -> text is a coin toss; text -> video is right once and wrong once
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert contrastive_loss(video, text).item() == pytest.approx(math.log(2) + (right + wrong) / 2, abs=1e-6)


def test_a_lower_temperature_sharpens() -> None:
    rows = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assert contrastive_loss(rows, rows, 0.05) < contrastive_loss(rows, rows, 1.0)


def test_a_pair_that_is_left_out_changes_the_loss_by_hand() -> None:
    video = text = torch.eye(3)
    excluded = torch.zeros(3, 3, dtype=torch.bool)
    excluded[0, 1] = excluded[1, 0] = True
    two, one = math.log(1 + 2 * math.exp(-1)), math.log(1 + math.exp(-1))  # two negatives; one is left
    assert contrastive_loss(video, text, excluded=excluded).item() == pytest.approx(2 * (2 * one + two) / 3, abs=1e-6)


def batch_of(videos: list[int], texts: list[list[int]]) -> ClipBatch:
    lengths = np.array([len(text) for text in texts])
    words = np.concatenate([np.array(text, np.int32) for text in texts])
    ones = np.ones(len(videos), np.int64)
    return ClipBatch(np.zeros((len(videos), 4), np.float16), ones, words, lengths, np.array(videos))


def test_same_texts_and_near_duplicate_videos_are_no_negatives() -> None:
    batch = batch_of([0, 0, 1, 2], [[2, 7, 3], [2, 8, 3], [2, 8, 8, 3], [2, 7, 3]])
    duplicates = np.array([0, 0, 2])  # video 1 is video 0 again
    labels = pair_labels(batch, duplicates)
    both = false_negatives(labels, labels, 0, FalseNegativeConfig())
    assert both.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    texts_only = false_negatives(labels, labels, 0, FalseNegativeConfig(duplicate_similarity=None))
    assert texts_only.int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert not false_negatives(labels, labels, 0, PAPER).any(), "both rules off is the paper"
    second_worker = false_negatives(labels[2:], labels, 2, FalseNegativeConfig())
    assert torch.equal(second_worker, both[2:]), "each worker sees its own rows of the same relation"


def test_near_duplicates_are_found_inside_batches_and_linked() -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((40, 16)).astype(np.float32)
    rows[7], rows[21] = rows[3] + 0.01, rows[3] * 1.5  # twice more in the same batch
    rows[30] = rows[5]  # in another batch: not looked for
    batches = [np.array([3, 7, 21, 5]), np.array([30, 1])]
    label = near_duplicates(rows + 5, batches, 0.97)  # a common offset does not make everything alike
    assert label[3] == label[7] == label[21] and label[5] != label[30]
    assert len(set(label.tolist())) == 38
    with pytest.raises(InputError, match="duplicate_similarity"):
        FalseNegativeConfig(duplicate_similarity=2.0)


@given(st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_near_duplicates_are_linked_over_batches_that_share_videos(seed: int) -> None:
    generator = np.random.default_rng(seed)
    group = generator.integers(0, 6, 30)
    rows = np.eye(7, dtype=np.float32)[group]
    batches = [generator.choice(30, 4, replace=False) for _ in range(12)]  # as Algorithm 1 draws them
    label = near_duplicates(rows, batches, 0.97)
    linked = np.eye(30, dtype=bool)
    for batch in batches:
        linked[np.ix_(batch, batch)] |= group[batch][:, None] == group[batch]
    for _ in range(5):
        linked = linked @ linked  # whoever is reached over any number of links
    assert np.array_equal(label[:, None] == label, linked)


BATCH = batch_of([0, 0, 1, 1, 2, 2, 3, 3], [[2, n % 5, 3] for n in range(8)])  # three texts stand there twice


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    video, text = (torch.load(f"{folder}/{name}.pt") for name in ("video", "text"))
    rows = slice(0, 3) if rank == 0 else slice(3, 8)  # unequal shares
    v, t = (x[rows].clone().requires_grad_() for x in (video, text))
    gathered = gather_with_gradient(v), gather_with_gradient(t)
    labels = pair_labels(BATCH)[rows]
    first = first_row(len(v))
    excluded = false_negatives(labels, gather(labels), first, FalseNegativeConfig())
    loss = contrastive_loss(v, t, 0.1, gathered, first, excluded) * len(v) / len(video)
    loss.backward()
    torch.save({"loss": loss.detach(), "video": v.grad, "text": t.grad}, f"{folder}/out{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_have_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    video, text = (torch.randn(8, 6, generator=generator) for _ in range(2))
    torch.save(video, tmp_path / "video.pt")
    torch.save(text, tmp_path / "text.pt")
    multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    v, t = video.clone().requires_grad_(), text.clone().requires_grad_()
    labels = pair_labels(BATCH)
    loss = contrastive_loss(v, t, 0.1, excluded=false_negatives(labels, labels, 0, FalseNegativeConfig()))
    loss.backward()
    outputs = [torch.load(tmp_path / f"out{rank}.pt") for rank in range(2)]
    assert sum(out["loss"] for out in outputs).item() == pytest.approx(loss.item(), rel=1e-5)
    for name, grad in (("video", v.grad), ("text", t.grad)):
        together = torch.cat([out[name] for out in outputs])
        np.testing.assert_allclose(together.numpy(), grad.numpy(), atol=1e-5)
