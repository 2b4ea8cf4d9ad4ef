"""The loss is InfoNCE in both directions, and negatives come from every worker."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videoclip.data.clips import ClipBatch
from videoclip.errors import InputError
from videoclip.losses import chance_of_contrastive_loss, contrastive_loss, margin_ranking_loss
from videoclip.packed import Packed
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
    words = Packed.of([torch.tensor(text, dtype=torch.int32) for text in texts])
    seconds = Packed(torch.zeros(len(videos), 4, dtype=torch.float16), torch.ones(len(videos), dtype=torch.int64))
    return ClipBatch(seconds, words, torch.tensor(videos))


def test_same_texts_and_near_duplicate_videos_are_no_negatives() -> None:
    batch = batch_of([0, 0, 1, 2], [[2, 7, 3], [2, 8, 3], [2, 8, 8, 3], [2, 7, 3]])
    duplicates = np.array([0, 0, 2])  # video 1 is video 0 again

    def excluded(config: FalseNegativeConfig, rows: slice = slice(None), offset: int = 0) -> torch.Tensor:
        labels = pair_labels(batch, config, duplicates)
        return false_negatives(labels[rows], labels, offset).int()

    both = excluded(FalseNegativeConfig())
    assert both.tolist() == [[0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    texts_only = excluded(FalseNegativeConfig(duplicate_similarity=None))
    assert texts_only.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    videos_only = excluded(FalseNegativeConfig(same_text=False))
    assert videos_only.tolist() == [[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert not excluded(PAPER).any(), "both rules off is the paper"
    assert torch.equal(excluded(FalseNegativeConfig(), slice(2, 4), 2), both[2:]), "a worker sees its own rows"


def test_pairs_of_two_workers_with_the_rule_off_never_seem_to_share_a_text() -> None:
    batch = batch_of([0, 1], [[2, 7, 3], [2, 7, 3]])
    first, second = pair_labels(batch, PAPER), pair_labels(batch, PAPER, rank_offset=2)
    assert len(set(torch.cat([first, second])[:, 2].tolist())) == 4


def test_the_margin_loss_by_hand() -> None:
    similarity = torch.tensor([[0.5, 0.45], [0.0, 0.9]])
    # row 0 misses its margin of 0.1 by 0.05; the column of 0.9 (text to video: rows of the transpose) by nothing
    assert margin_ranking_loss(similarity, similarity.T, 0.1).item() == pytest.approx(0.05 / 2, abs=1e-6)
    excluded = torch.tensor([[False, True], [False, False]])
    assert margin_ranking_loss(similarity, similarity.T, 0.1, excluded=excluded).item() == pytest.approx(0, abs=1e-6)


def test_guessing_has_the_loss_of_chance() -> None:
    rows = torch.ones(5, 3)
    excluded = torch.zeros(5, 5, dtype=torch.bool)
    excluded[0, 1:3] = True
    loss = contrastive_loss(rows, rows, 0.1, excluded=excluded)
    assert loss.item() == pytest.approx(chance_of_contrastive_loss(excluded).item(), rel=1e-5)


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
