"""Captions are checked line by line, and rolling repeats are removed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from videoclip.data.captions import Captions, read_captions, remove_rolling_repeats


def captions(*lines: tuple[float, float, str]) -> Captions:
    start, end, text = zip(*lines)
    return Captions(np.array(start, np.float32), np.array(end, np.float32), list(text))


def test_lines_that_cannot_be_used_are_left_out_and_counted() -> None:
    raw = {
        "start": [5, 1, 9, 2, 3, None, 4, 99],
        "end": [7, 2, 8, 3, 4, 5, float("nan"), 100],
        "text": ["b", " a  a ", "backwards", "", 17, "no start", "no end", "after the end"],
    }
    kept, rejected = read_captions(raw, duration=60)
    assert kept.text == ["a a", "b"]
    assert kept.start.tolist() == [1, 5]
    assert rejected == {
        "end is not after start": 1,
        "text is empty": 1,
        "text is not a string": 1,
        "start or end is not a number": 2,
        "outside the video": 1,
    }


@pytest.mark.parametrize("raw", [None, [], {"start": [1]}, {"start": [1], "end": [2, 3], "text": ["a"]}])
def test_captions_of_another_form_are_refused(raw: object) -> None:
    with pytest.raises(ValueError, match="captions"):
        read_captions(raw)


def test_a_line_contained_in_its_predecessors_tail_is_merged() -> None:
    result = remove_rolling_repeats(captions((0, 2, "chop the onion"), (2, 4, "the onion")), np.random.default_rng(0))
    assert result.text == ["chop the onion"]
    assert (result.start[0], result.end[0]) == (0, 4)


def test_a_superset_replaces_its_predecessor() -> None:
    result = remove_rolling_repeats(captions((0, 2, "chop the"), (2, 4, "chop the onion")), np.random.default_rng(0))
    assert result.text == ["chop the onion"]


def test_a_partial_overlap_goes_to_one_side_at_random() -> None:
    lines = captions((0, 2, "now chop the onion"), (2, 4, "the onion in half"))
    results = {tuple(remove_rolling_repeats(lines, np.random.default_rng(seed)).text) for seed in range(20)}
    assert results == {("now chop", "the onion in half"), ("now chop the onion", "in half")}


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=8), st.integers(0, 9))
def test_removing_repeats_keeps_order_and_leaves_no_line_empty(lines: list[list[str]], seed: int) -> None:
    given_lines = captions(*((float(i), i + 1.5, " ".join(words)) for i, words in enumerate(lines)))
    result = remove_rolling_repeats(given_lines, np.random.default_rng(seed))
    assert all(result.text)
    assert (np.diff(result.start) >= 0).all() and (result.end > result.start).all()
