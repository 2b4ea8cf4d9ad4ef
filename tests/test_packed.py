"""Sequences end to end: everything that padding would do, without the padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from videoclip.errors import InputError
from videoclip.packed import Packed
from videoclip.transformer import SelfAttention, TransformerShape, attention_of_all_lengths

TWO = Packed(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([2, 3]))
lengths = st.lists(st.integers(1, 6), min_size=1, max_size=7)


def packed_of(sizes: list[int], width: int = 2) -> Packed:
    return Packed(torch.arange(sum(sizes) * width, dtype=torch.float32).reshape(-1, width), torch.tensor(sizes))


def test_starts_positions_and_owners_by_hand() -> None:
    assert TWO.starts.tolist() == [0, 2]
    assert TWO.positions.tolist() == [0, 1, 0, 1, 2]
    assert TWO.owners.tolist() == [0, 0, 1, 1, 1]
    assert [part.tolist() for part in TWO.split()] == [[1, 2], [3, 4, 5]]


def test_wrapping_puts_the_special_rows_around_every_sequence() -> None:
    wrapped = TWO.wrapped(torch.tensor([8]), torch.tensor([9]))
    assert [part.tolist() for part in wrapped.split()] == [[8, 1, 2, 9], [8, 3, 4, 5, 9]]
    assert wrapped.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]


def test_joining_two_sides_goes_on_counting() -> None:
    joined = TWO.cat(Packed(torch.tensor([6, 7, 8]), torch.tensor([1, 2])))
    assert [part.tolist() for part in joined.split()] == [[1, 2, 6], [3, 4, 5, 7, 8]]
    assert joined.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def test_dropped_rows_leave_the_others_their_positions() -> None:
    kept = TWO.keep(torch.tensor([False, True, True, False, True]))
    assert kept.positions.tolist() == [1, 0, 2] and kept.lengths.tolist() == [1, 2]
    wrapped = kept.wrapped(torch.tensor([8]), torch.tensor([9]))
    assert wrapped.positions.tolist() == [0, 2, 3, 0, 1, 3, 4]
    assert kept.take(torch.tensor([1, 0])).positions.tolist() == [0, 2, 1]
    assert kept.cat(TWO).positions.tolist() == [1, 2, 3, 0, 2, 3, 4, 5]
    assert TWO.cat(kept).positions.tolist() == [0, 1, 3, 0, 1, 2, 3, 5]
    with pytest.raises(InputError, match="nothing of sequence 1"):
        TWO.keep(torch.tensor([True, True, False, False, False]))


def test_rows_and_lengths_must_add_up() -> None:
    with pytest.raises(ValueError, match="add up"):
        Packed(torch.zeros(3), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="joined"):
        TWO.cat(Packed(torch.zeros(3), torch.tensor([3])))


@given(lengths)
def test_padding_and_back_changes_nothing(sizes: list[int]) -> None:
    packed = packed_of(sizes)
    padded, mask = packed.padded(-1)
    assert padded.shape == (len(sizes), max(sizes), 2) and (padded[~mask] == -1).all()
    again = Packed.from_padded(padded, mask)
    assert torch.equal(again.rows, packed.rows) and torch.equal(again.lengths, packed.lengths)


@given(lengths)
def test_sorting_by_length_makes_one_run_a_length_and_can_be_undone(sizes: list[int]) -> None:
    packed = packed_of(sizes)
    ordered, order = packed.by_length()
    assert len(ordered.runs) == len(set(sizes)) and sum(count for count, _ in ordered.runs) == len(sizes)
    assert torch.equal(ordered.take(torch.argsort(order)).rows, packed.rows)
    for run, (count, length) in zip(ordered.by_run(), ordered.runs):
        assert run.shape == (count, length, 2)


@given(lengths, st.randoms(use_true_random=False))
def test_keeping_all_or_taking_all_changes_nothing(sizes: list[int], random: object) -> None:
    packed = packed_of(sizes)
    everything = packed.keep(torch.ones(sum(sizes), dtype=torch.bool))
    assert torch.equal(everything.rows, packed.rows) and torch.equal(everything.positions, packed.positions)
    assert torch.equal(Packed.of(packed.split()).rows, packed.rows)


def test_attention_of_all_lengths_at_once_is_attention_run_by_run() -> None:
    """What a GPU computes in one kernel; here by PyTorch's plain path for jagged tensors."""
    torch.manual_seed(0)
    attention = SelfAttention(TransformerShape(32, 4, 64, 1, 0.0))
    x = Packed(torch.randn(17, 32), torch.tensor([3, 3, 5, 6]))
    rows = (layer(x.rows).unflatten(1, (4, -1)) for layer in (attention.query, attention.key, attention.value))
    torch.testing.assert_close(attention_of_all_lengths(*rows, x).flatten(1), attention(x), atol=1e-6, rtol=1e-5)
