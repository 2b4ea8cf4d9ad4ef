"""Every pair beside those that it is contrasted with: figures by hand, and clips of one video that stay negatives."""

import numpy as np
import pytest
import torch

from videoclip.data.clips import ClipBatch
from videoclip.gather import gather, gather_with_gradient, mean_over_workers, rank, rank_offset, rows_per_rank
from videoclip.packed import Packed
from videoclip.parts.pairs import Pairs, gather_pairs
from videoclip.retrieval.false_negatives import FalseNegativeConfig, pair_labels


def batch_of(videos: list[int]) -> ClipBatch:
    words = Packed.of([torch.tensor([2, 9, 3], dtype=torch.int32)] * len(videos))  # all say the same
    seconds = Packed(torch.zeros(len(videos), 4), torch.ones(len(videos), dtype=torch.int64))
    return ClipBatch(seconds, words, torch.tensor(videos))


def test_figures_of_a_workers_pairs_by_hand() -> None:
    video = torch.eye(4)[2:]  # this worker's pairs are the last two of four
    all_text = torch.tensor([[0, 0, 0.5, 0], [0, 0, 2, 1], [0, 0, 1, 0], [0, 0, 0, 0.5]])
    # Video, near-duplicates, text: the own clips are of one video, and say the same.
    labels = torch.tensor([[5, 5, 1], [6, 6, 2], [9, 9, 3], [9, 9, 3]])
    figures = Pairs(video, all_text[2:], torch.eye(4), all_text, 2, labels[2:], labels).figures()
    # Clip 2 scores 0.5, 2, [1], 0: one of two others is as near as its own. Clip 3 scores 0, 1, 0, [0.5]: likewise.
    assert figures["accuracy"] == 0 and figures["hard_negatives"] == pytest.approx(1 / 2)
    assert figures["excluded"] == pytest.approx(2 / 8)
    own = Pairs(video, video, torch.eye(4), torch.eye(4), 2, labels[2:], labels).figures()
    assert own["accuracy"] == 1 and own["hard_negatives"] == 0
    tied = Pairs(video, video, torch.eye(4), torch.ones(4, 4), 2, labels[2:], labels).figures()
    assert tied["hard_negatives"] == 1, "as near as its own is hard"
    alone = labels[3:].expand(4, 3)
    nobody = Pairs(video, video, torch.eye(4), torch.eye(4), 2, alone[2:], alone).figures()
    assert nobody["hard_negatives"] == 0


def test_pairs_without_labels_are_contrasted_with_all_others_as_in_the_paper() -> None:
    rows = torch.randn(4, 3, requires_grad=True)
    pairs = gather_pairs(rows, rows, batch_of([5, 5, 8, 9]))
    assert pairs.rank_offset == 0 and not pairs.excluded.any()
    expected = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]).bool()
    assert torch.equal(pairs.other_videos, expected)
    assert pairs.all_video.requires_grad and torch.equal(pairs.all_text, rows)


def test_pairs_that_say_the_same_are_neither_negatives_nor_hard() -> None:
    batch = batch_of([5, 5, 8])
    labels = pair_labels(batch, FalseNegativeConfig(), np.arange(9))
    batch = ClipBatch(batch.video_tokens, batch.word_ids, batch.video, labels, (3,))
    pairs = gather_pairs(torch.ones(3, 2), torch.ones(3, 2), batch)
    assert torch.equal(pairs.excluded, ~torch.eye(3, dtype=torch.bool)) and not pairs.other_videos.any()


def test_one_process_alone_is_a_world_of_one() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert rank() == 0 and rank_offset([3, 4]) == 0 and rows_per_rank(3) == [3]
    assert gather(rows) is rows and gather_with_gradient(rows, [3]) is rows
    assert mean_over_workers(rows, 3, [3]) is rows
