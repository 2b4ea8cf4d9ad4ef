"""Parts of recipes on frames, by hand: matching, hidden words, crops, soft labels, prompts."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from videoclip.errors import InputError
from videoclip.losses import IGNORED, mean_cross_entropy, share_right
from videoclip.packed import Packed
from videoclip.parts.masked_words import CHANCES, NOT_MASKED, WordMask, hide_words
from videoclip.parts.matching import NONE, matching_negatives, matching_pairs
from videoclip.parts.pairs import Pairs
from videoclip.parts.pixels import CLIP_MEAN, CLIP_STD, inside, normalised, zeroed_outside
from videoclip.parts.prompter import entity_loss, kept_labels, prompts
from videoclip.retrieval.false_negatives import false_negatives, text_labels


def pairs_of(similarity: Tensor, excluded: Tensor | None = None) -> Pairs:
    """Pairs of which video v and text t are so alike; `excluded` [P, P] bool are no negatives."""
    count = len(similarity)
    labels = torch.arange(count)[:, None].expand(-1, 3)
    pairs = Pairs(similarity, torch.eye(count), similarity, torch.eye(count), 0, labels, labels)
    pairs.__dict__["excluded"] = torch.zeros(count, count, dtype=torch.bool) if excluded is None else excluded
    return pairs


def test_negatives_are_drawn_by_likeness_and_never_the_own_or_an_excluded_pair() -> None:
    similarity = torch.zeros(4, 4)
    similarity[0, 1] = 9.0  # video 0 is much like text 1
    excluded = torch.zeros(4, 4, dtype=torch.bool)
    excluded[2, 3] = excluded[3, 2] = True
    pairs, generator = pairs_of(similarity, excluded), torch.Generator().manual_seed(0)
    chances = torch.rand(200, 4, 2, generator=generator, dtype=torch.float64)
    videos, texts = zip(*(matching_negatives(pairs, 1.0, chance) for chance in chances))
    of_texts, of_videos = torch.stack(videos), torch.stack(texts)
    own = torch.arange(4)
    assert bool((of_texts != own).all() and (of_videos != own).all())
    assert bool((of_texts[:, 2] != 3).all() and (of_videos[:, 3] != 2).all())
    assert float((of_videos[:, 0] == 1).float().mean()) > 0.95 and float((of_texts[:, 1] == 0).float().mean()) > 0.95
    assert len(of_videos[:, 1].unique()) == 3, "drawn, not the hardest"
    evenly = torch.stack([matching_negatives(pairs, math.inf, chance)[1] for chance in chances])
    assert float((evenly[:, 0] == 1).float().mean()) < 0.5, "likeness means nothing where nothing was contrasted"


def test_where_everything_is_excluded_there_is_no_negative() -> None:
    pairs = pairs_of(torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool))
    drawn = matching_negatives(pairs, 1.0, torch.rand(3, 2, dtype=torch.float64))
    assert all(bool((numbers == NONE).all()) for numbers in drawn)
    words = Packed.of([torch.ones(2, 4)] * 3)
    texts, _, labels = matching_pairs(words, words, *drawn)
    assert len(texts) == 3 and labels.tolist() == [1, 1, 1]


def test_words_are_hidden_as_bert_hides_them_and_special_ones_never() -> None:
    how = WordMask(4, 1000, (0, 1, 2, 3, 4))
    words = Packed(
        torch.cat([torch.tensor([2]), torch.randint(5, 1000, (60000,)), torch.tensor([3])]), torch.tensor([60002])
    )
    chance = torch.rand(60002, CHANCES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden, labels = hide_words(words, how, chance)
    asked = labels != NOT_MASKED
    assert float(asked.float().mean()) == pytest.approx(0.15, abs=0.01)
    assert not bool(asked[[0, -1]].any()) and torch.equal(labels[asked], words.rows[asked])
    shares = [(hidden.rows == 4)[asked], (hidden.rows == words.rows)[asked]]
    assert [round(float(share.float().mean()), 1) for share in shares] == [0.8, 0.1]
    assert torch.equal(hidden.rows[~asked], words.rows[~asked])
    always, labels = hide_words(words, replace(how, always=True), chance)
    assert bool((always.rows[labels != NOT_MASKED] == 4).all())


def test_outside_a_crop_is_black_before_normalisation_and_the_crop_stays_where_it_was() -> None:
    frames = torch.randint(0, 256, (6, 2, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()
    places = torch.tensor([[i % 3, 1, 2, 2] for i in range(6)])
    crops = normalised(zeroed_outside(frames, places, 8))
    mask = inside(places, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
    everything = normalised(frames)
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    for clip in range(len(frames)):
        assert torch.equal(crops[clip][..., mask[clip]], everything[clip][..., mask[clip]])
        torch.testing.assert_close(crops[clip, 0][:, ~mask[clip]], black[:, None].expand(-1, int((~mask[clip]).sum())))


def test_a_batch_in_which_no_label_is_sure_gives_no_loss_and_no_nan() -> None:
    q = torch.full((4, 8), 1 / 8)
    kept = kept_labels(q, "probability")
    logits = torch.randn(4, 8, requires_grad=True)
    loss = entity_loss(logits, q, kept)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not bool(logits.grad.any())
    assert kept_labels(torch.eye(8)[:4], "release").tolist() == [False, True, True, True]
    with pytest.raises(InputError, match="discard"):
        kept_labels(q, "always")


def test_prompts_are_the_papers() -> None:
    assert len(prompts("dog")) == 12 and "A video of a dog." in prompts("dog")
    assert prompts("dog", "image")[0] == "A photo of a dog." and len(set(prompts("dog", "image"))) == 12


def test_pairs_with_the_same_words_are_no_negatives() -> None:
    words = Packed.of([torch.tensor([2, word, 3]) for word in (7, 8, 7)])
    labels = text_labels(torch.arange(3), words)
    excluded = false_negatives(labels, labels, 0)
    assert excluded.tolist() == [[False, False, True], [False, False, False], [True, False, False]]


def test_means_over_what_is_asked_are_no_nan_where_nothing_is() -> None:
    scores, labels = torch.randn(3, 4, requires_grad=True), torch.full((3,), IGNORED)
    loss = mean_cross_entropy(scores, labels)
    loss.backward()
    assert loss.item() == 0 and share_right(scores, labels).item() == 0
    assert scores.grad is not None and not bool(scores.grad.any())
