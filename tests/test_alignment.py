"""HTM-Align: which second a sentence belongs to, and whether it is shown at all."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluate_actions import AlignmentConfig, evaluate_htm_align
from videoclip.data.htm_align import AlignedVideo, read_htm_align
from videoclip.errors import InputError
from videoclip.evaluation.alignment import area_under_curve, expected_times
from videoclip.files import read_json_lines

SENTENCES = [[1, 10.7, 17.5, "add oil and garlic"], [0, 18, 21.25, "my mother liked it"], [1, 40, 41, " stir it "]]


def write(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_the_benchmarks_file_is_read(tmp_path: Path) -> None:
    video, other = read_htm_align(write(tmp_path / "htm_align.json", {"abc": SENTENCES, "d": SENTENCES[:1]}))
    assert (video.video_id, other.video_id) == ("abc", "d")
    assert video.alignable.tolist() == [True, False, True] and video.text[2] == "stir it"
    assert video.start.tolist() == [10.7, 18, 40] and video.end.tolist() == [17.5, 21.25, 41]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "expected"),
        ({}, "expected"),
        ({"v": []}, "list of sentences"),
        ({"v": [[1, 2, 3]]}, "sentence 1: expected"),
        ({"v": [SENTENCES[0], [2, 0, 1, "x"]]}, "sentence 2: alignable must be 0 or 1"),
        ({"v": [[1, 5, 4, "x"]]}, "cannot be"),
        ({"v": [[1, "a", 4, "x"]]}, "cannot be"),
        ({"v": [[1, 3, 4, "  "]]}, "text is missing"),
    ],
)
def test_faults_in_the_file_are_named_with_video_and_sentence(tmp_path: Path, values: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_htm_align(write(tmp_path / "bad.json", values))


def test_where_a_sentence_is_expected_never_comes_from_its_answer() -> None:
    alignable = np.array([True, False, True, False])
    start = np.array([500.0, 10, 900, 30])
    video = AlignedVideo("v", alignable, start, start + 2, ["a"] * 4)
    assert expected_times(video) == pytest.approx([11, 11, 21, 31])
    all_alignable = AlignedVideo("v", np.ones(4, bool), start, start + 2, ["a"] * 4)
    assert (np.diff(expected_times(all_alignable)) > 0).all()


def test_area_under_curve_by_hand() -> None:
    score, positive = np.array([3.0, 1, 2, 2]), np.array([True, False, True, False])
    assert area_under_curve(score, positive) == pytest.approx((2 + 1.5) / 4)
    assert area_under_curve(score, np.ones(4, bool)) == 1


@pytest.mark.parametrize("near", [None, 96.0])
def test_sentences_of_videos_in_the_shards_are_placed(
    trained: Path, tokens: Path, tmp_path: Path, near: float | None
) -> None:
    spoken = [[i % 2, 5.0 * i, 5.0 * i + 6, text] for i, text in enumerate(["stir the egg", "hello", "cut the fish"])]
    annotations = write(tmp_path / "a.json", {"test_0000": spoken, "test_0001": spoken, "elsewhere": spoken})
    output = tmp_path / "out" / "metrics.json"
    config = AlignmentConfig(trained / "model", tokens / "test", annotations, output, near=near)
    metrics = evaluate_htm_align(config)
    assert metrics["videos"] == 2 and metrics["dropped"] == 1 and metrics["sentences"] == 6
    assert metrics["recall"] in (0, 50, 100) and 0 < metrics["chance_recall"] < 60 and 0 <= metrics["AUC"] <= 100
    rows = read_json_lines(output.parent / "predictions.jsonl")
    assert [len(row["seconds"]) for row in rows] == [3, 3]
    unknown = write(tmp_path / "b.json", {"elsewhere": spoken})
    with pytest.raises(InputError, match="none of the 1 annotated videos"):
        evaluate_htm_align(AlignmentConfig(trained / "model", tokens / "test", unknown, output))
