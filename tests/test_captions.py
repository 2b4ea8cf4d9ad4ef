"""Captions are checked line by line, and rolling repeats are removed."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.caption_source import CaptionSource
from pipelines.convert import ConvertFeaturesConfig, convert_features
from pipelines.runs import Quarantine
from videoclip.data.captions import Captions, read_captions, remove_rolling_repeats
from videoclip.data.shards import Shards
from videoclip.errors import InputError
from videoclip.files import read_json_lines


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


# --- Every road to a shard ----------------------------------------------------------------------------------------

LINES = st.lists(
    st.tuples(
        st.floats(-5, 90) | st.sampled_from([29.999999999, 30.0, 10**400, None]),
        st.floats(0, 20),
        st.sampled_from(["chop", "chop the", "chop the onion", "the onion in half", ""]),
    ),
    min_size=1,
    max_size=12,
)


def raw_captions(lines: list[tuple]) -> dict[str, list]:
    starts = [start for start, _, _ in lines]
    ends = [None if start is None or start > 1e9 else start + length for start, length, _ in lines]
    return {"start": starts, "end": ends, "text": [text for _, _, text in lines]}


@given(LINES, st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_no_caption_of_a_shard_starts_after_its_last_token(lines: list[tuple], seconds: int, seed: int) -> None:
    tokens = np.ones((seconds, 4), np.float16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "features").mkdir()
        np.save(folder / "features" / "v.npy", tokens)
        (folder / "raw_caption.json").write_text(json.dumps({"v": raw_captions(lines)}))
        convert_features(
            ConvertFeaturesConfig(
                folder / "features", folder / "shards", captions=folder / "raw_caption.json", seed=seed
            )
        )
        converted = Shards(folder / "shards").record(0).captions
        noted = Quarantine(folder / "shards")
        quarantine = Quarantine(folder / "other")
        extracted = CaptionSource(folder / "raw_caption.json", False, seed, quarantine).of_video("v", seconds)
    assert (converted.start < seconds).all() and (converted.end <= seconds).all()
    assert (converted.end > converted.start).all()
    assert converted.text == extracted.text, "both roads say the same"
    assert np.array_equal(converted.start, extracted.start) and np.array_equal(converted.end, extracted.end)
    assert noted.rows == quarantine.rows, "and leave out the same lines, counted"


def test_features_lose_rolling_repeats_and_lines_beyond_their_tokens(tmp_path: Path) -> None:
    (tmp_path / "npy").mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / "npy" / f"{name}.npy", np.ones((30, 4), np.float32))
    lines = [(0, 2, "chop the"), (2, 2, "chop the onion"), (20, 20, "stir"), (30, 5, "too late"), (80, 5, "too late")]
    path = tmp_path / "raw_caption.json"
    path.write_text(json.dumps({"a": raw_captions(lines), "b": "not captions"}))
    convert_features(ConvertFeaturesConfig(tmp_path / "npy", tmp_path / "out", captions=path))
    first, second = Shards(tmp_path / "out")
    assert first.captions.text == ["chop the onion", "stir"] and first.captions.end.tolist() == [4, 30]
    assert len(second.captions) == 0 and len(second.tokens) == 30, "a video stays without its bad captions"
    rows = read_json_lines(tmp_path / "out" / "quarantine.jsonl")
    assert [(row["video_id"], row["what"]) for row in rows] == [("a", "captions"), ("b", "captions")]
    assert rows[0]["reason"] == "2 caption lines left out: outside the video"
    convert_features(
        ConvertFeaturesConfig(tmp_path / "npy", tmp_path / "kept", captions=path, keep_rolling_repeats=True)
    )
    assert Shards(tmp_path / "kept").record(0).captions.text == ["chop the", "chop the onion", "stir"]


def test_features_get_captions_later_and_no_token_is_written_again(tmp_path: Path) -> None:
    """`convert features`, then again with captions, with others, and without."""
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "a.npy", np.ones((30, 4), np.float32))

    def convert(captions: Path | None, encoder: str = "s3d") -> list[str]:
        convert_features(ConvertFeaturesConfig(tmp_path / "npy", tmp_path / "out", encoder, captions))
        return list(Shards(tmp_path / "out", verify=True).record(0).captions.text)

    assert convert(None) == []
    stamp = (tmp_path / "out" / "part-00000.arrow").stat().st_mtime_ns
    for words in ("chop", "stir"):
        (tmp_path / f"{words}.json").write_text(json.dumps({"a": raw_captions([(1, 2, words)])}))
        assert convert(tmp_path / f"{words}.json") == [words]
    with pytest.raises(InputError, match="give --captions again"):
        convert(None)
    with pytest.raises(InputError, match="tokens of the encoder s3d"):
        convert(tmp_path / "chop.json", "clip")
    np.save(tmp_path / "npy" / "b.npy", np.ones((5, 4), np.float32))
    assert convert(tmp_path / "stir.json") == ["stir"] and len(Shards(tmp_path / "out")) == 2, "videos may be added"
    assert stamp == (tmp_path / "out" / "part-00000.arrow").stat().st_mtime_ns
