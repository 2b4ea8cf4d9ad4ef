"""Figures as the benchmarks' authors compute them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videoclip.data.qvhighlights import MomentQuery, read_qvhighlights
from videoclip.data.youcook2 import read_youcook2
from videoclip.embedding import embed_seconds
from videoclip.errors import InputError
from videoclip.evaluation.baseline import query_blind_predictions
from videoclip.evaluation.localization import (
    LocalizationConfig,
    candidate_windows,
    excess_over_threshold,
    find_moments,
    sliding_windows,
    suppress_overlaps,
)
from videoclip.evaluation.moments import MomentPrediction, moment_metrics, overlap, read_predictions
from videoclip.evaluation.retrieval import best_matches, ranks_of_best_query, ranks_of_positives, retrieval_metrics
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.report.page import Example, Section, Table, choose_examples, moment_example, render_report


def query(number: int, windows: list[list[float]], duration: float = 20.0) -> MomentQuery:
    truth = np.array(windows, np.float64).reshape(-1, 2)
    clips = np.array([c for c in range(int(duration // 2)) if any(a < 2 * c + 2 and b > 2 * c for a, b in windows)])
    return MomentQuery(number, "q", f"v{number}", duration, truth, clips, np.full((len(clips), 3), 4))


def prediction(number: int, windows: list[list[float]], saliency: list[float] | None = None) -> MomentPrediction:
    scores = np.zeros(10) if saliency is None else np.array(saliency, np.float64)
    return MomentPrediction(number, "q", f"v{number}", np.array(windows, np.float64), scores)


# --- Retrieval ----------------------------------------------------------------------------------------------------


def test_a_rank_is_the_mean_place_among_equal_scores() -> None:
    gallery = np.array([[1.0, 0], [0, 1], [1, 0], [2, 0]])
    queries = np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    assert ranks_of_positives(queries, gallery).tolist() == [2.5, 1, 2.5, 3]
    assert ranks_of_best_query(queries, gallery).tolist() == [1.5, 1.5, 1.5, 3.5]
    assert retrieval_metrics(np.array([1, 2, 6, 11]), 4) == {
        "queries": 4,
        "R@1": 25.0,
        "R@5": 50.0,
        "R@10": 75.0,
        "MedR": 4.0,
        "MeanR": 5.0,
        "chance_R@1": 25.0,
    }


@pytest.mark.parametrize("width", [3, 64, 300])
def test_a_model_that_maps_everything_to_one_point_does_no_better_than_chance(width: int) -> None:
    point = np.random.default_rng(width).standard_normal(width).astype(np.float32)
    point /= np.linalg.norm(point)
    gallery, queries = np.tile(point, (301, 1)), np.tile(point, (602, 1))
    positives = np.arange(602) // 2
    forward = ranks_of_positives(queries, gallery, positives)
    assert (forward == 151).all(), "the middle of 301 places"
    assert retrieval_metrics(forward, 301)["R@10"] == 0
    # The best of two own queries among 600 others: a third of the way.
    assert (ranks_of_best_query(queries, gallery, positives) == 201).all()


@given(st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_blocks_give_the_ranks_of_the_full_matrix(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    queries, gallery = generator.integers(-2, 3, (2, count, 3)).astype(np.float32)
    scores = queries @ gallery.T
    own = np.diagonal(scores)[:, None]
    expected = (scores > own).sum(1) + ((scores == own).sum(1) + 1) / 2
    from videoclip.evaluation import retrieval

    original, retrieval.BLOCK = retrieval.BLOCK, 7
    try:
        assert np.array_equal(ranks_of_positives(queries, gallery), expected)
        best = best_matches(queries, gallery, 3)
    finally:
        retrieval.BLOCK = original
    np.testing.assert_allclose(np.take_along_axis(scores, best, 1), -np.sort(-scores, 1)[:, : best.shape[1]])


@given(st.integers(1, 20), st.integers(0, 30), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_with_several_captions_a_video_each_direction_has_its_own_ranks(clips: int, more: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    positives = generator.permutation(np.concatenate([np.arange(clips), generator.integers(0, clips, more)]))
    queries = generator.integers(-2, 3, (len(positives), 3)).astype(np.float32)
    gallery = generator.integers(-2, 3, (clips, 3)).astype(np.float32)
    scores = queries @ gallery.T
    shuffled = [generator.permutation(len(queries)) for _ in range(1500)]  # ties in every order
    for q, own in enumerate(positives):
        better, equal = (scores[q] > scores[q, own]).sum(), (scores[q] == scores[q, own]).sum()
        assert ranks_of_positives(queries, gallery, positives)[q] == better + (equal + 1) / 2
    backward = ranks_of_best_query(queries, gallery, positives)
    for g in range(min(clips, 3)):
        best = scores[positives == g, g].max()
        better, tied = (scores[:, g] > best).sum(), scores[:, g] == best
        places = [1 + int(np.argmax((positives == g)[order][tied[order]])) for order in shuffled]
        assert backward[g] == pytest.approx(better + np.mean(places), abs=0.2 * max(1, np.std(places)))


def test_retrieval_that_cannot_be_is_refused() -> None:
    rows = np.eye(3, dtype=np.float32)
    with pytest.raises(InputError, match="needs a row of the gallery"):
        ranks_of_positives(rows, rows, np.array([0, 1, 3]))
    with pytest.raises(InputError, match="clip 2 of the gallery has no query"):
        ranks_of_best_query(rows, rows, np.array([0, 1, 1]))
    with pytest.raises(InputError, match="one width"):
        ranks_of_positives(rows, np.eye(2, dtype=np.float32))


def test_embeddings_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        ranks_of_positives(np.array([[np.nan]]), np.array([[1.0]]))


def test_youcook2_reads_the_json_and_the_csv(tmp_path: Path, reference: Path) -> None:
    clips = read_youcook2(reference / "youcook2_validation.csv")
    assert len(clips) == 3350
    assert (clips[0].video_id, clips[0].start, clips[0].end) == ("xHr8X2Wpmno", 47.0, 60.0)


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"segment": [5, 5], "sentence": "a"}, "cannot be"),
        ({"segment": [1, 2], "sentence": " "}, "sentence"),
        ({"segment": [1], "sentence": "a"}, "segment"),
        ({"segment": ["x", 2], "sentence": "a"}, "not a number"),
    ],
)
def test_youcook2_clips_that_cannot_be_are_named(tmp_path: Path, annotation: dict, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"database": {"v1": {"subset": "validation", "annotations": [annotation]}}}))
    with pytest.raises(InputError, match=f"v1.*{reason}"):
        read_youcook2(path)


# --- QVHighlights -------------------------------------------------------------------------------------------------


def test_every_official_figure_is_reproduced(reference: Path) -> None:
    ours = moment_metrics(
        read_predictions(reference / "qvhighlights_val_predictions.jsonl"),
        read_qvhighlights(reference / "qvhighlights_val.jsonl"),
    )
    official = json.loads((reference / "qvhighlights_val_predictions.metrics.json").read_text())
    assert ours == official


def test_overlap_is_intersection_over_union() -> None:
    assert overlap(np.array([0.0, 4.0]), np.array([2.0, 6.0])) == pytest.approx(2 / 6)
    assert overlap(np.array([0.0, 4.0]), np.array([5.0, 6.0])) == 0


def test_a_ground_truth_window_can_be_claimed_only_once() -> None:
    truth = [query(0, [[0, 10]])]
    once = moment_metrics([prediction(0, [[0, 10, 0.9]])], truth)["brief"]
    twice = moment_metrics([prediction(0, [[0, 10, 0.9], [0, 9, 0.8]])], truth)["brief"]
    late = moment_metrics([prediction(0, [[12, 14, 0.9], [0, 10, 0.8]])], truth)["brief"]
    assert once["MR-full-mAP"] == twice["MR-full-mAP"] == 100.0
    assert late["MR-full-mAP"] == 50.0 and late["MR-full-R1@0.5"] == 0.0


def test_average_precision_of_two_windows_by_hand() -> None:
    truth = [query(0, [[0, 4], [10, 14]])]
    found = prediction(0, [[0, 4, 0.9], [6, 8, 0.8], [10, 14, 0.7]])
    # precision 1 at recall 1/2, 2/3 at recall 1
    assert moment_metrics([found], truth)["brief"]["MR-full-mAP"] == pytest.approx(50 + 100 / 3, abs=0.01)


def test_windows_count_by_score_but_only_the_first_ten_listed() -> None:
    truth = [query(0, [[0, 4]])]
    wrong = [[6, 8, 0.5]] * 10
    assert moment_metrics([prediction(0, [*wrong, [0, 4, 0.9]])], truth)["brief"]["MR-full-mAP"] == 0.0
    assert moment_metrics([prediction(0, [*wrong[:9], [0, 4, 0.9]])], truth)["brief"]["MR-full-mAP"] == 100.0


def test_highlights_by_hand() -> None:
    truth = [query(0, [[0, 4]])]  # clips 0 and 1 of ten are positive for all raters
    brief = moment_metrics([prediction(0, [[0, 4, 1]], [5, 3, 4] + [0] * 7)], truth)["brief"]
    assert brief["HL-min-VeryGood-Hit1"] == 100.0
    assert brief["HL-min-VeryGood-mAP"] == pytest.approx(100 * (1 + 2 / 3) / 2, abs=0.01)


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_highlight_precision_agrees_with_the_precision_recall_curve(seed: int) -> None:
    """The official recipe, followed point by point in plain Python, ties included."""
    from videoclip.evaluation.moments import _interpolated_precisions

    generator = np.random.default_rng(seed)
    count = int(generator.integers(2, 12))
    scores = generator.integers(0, 4, count).astype(float)
    positive = generator.random((3, count)) < 0.4
    ours = _interpolated_precisions(scores[None], positive[None], np.array([count]))[0]
    for rater in range(3):
        labels = positive[rater]
        if labels.all() or not labels.any():
            assert ours[rater] == float(labels.all())
            continue
        points = [(labels[scores >= s].mean(), labels[scores >= s].sum() / labels.sum()) for s in np.unique(scores)]
        precision, recall = map(list, zip(*points, (1.0, 0.0)))  # recall decreasing
        for i in range(1, len(precision)):
            precision[i] = max(precision[i - 1], precision[i])
        rises = np.flatnonzero(np.diff(np.array(recall, np.float32)))
        assert ours[rater] == pytest.approx(np.mean(np.array(precision)[rises]))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", r":2: not valid JSON"),
        ('{"qid": 1, "pred_relevant_windows": [[0, 2, 1]]}', ":2: .*appears twice"),
        ('{"qid": 2, "pred_relevant_windows": [[0, 4, NaN]]}', ":2: .*not finite"),
        ('{"qid": 2, "pred_relevant_windows": [[0, 4]]}', ":2: .*3 numbers"),
        ('{"qid": 2, "pred_relevant_windows": [[0, 4, 1]], "pred_saliency_scores": [1, Infinity]}', ":2: .*not finite"),
        ("[]", ":2: expected a JSON object"),
    ],
)
def test_bad_prediction_lines_are_named_with_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"qid": 1, "pred_relevant_windows": [[0, 2, 1]]}\n' + line + "\n")
    with pytest.raises(InputError, match=reason):
        read_predictions(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"relevant_windows": [[4, 4]]}, "a.jsonl:2: a window from 4 to 4 seconds cannot be"),
        ({"relevant_windows": [[-2, 4]]}, "a.jsonl:2: a window from -2 to 4 seconds cannot be"),
        ({"relevant_windows": [[0, float("nan")]]}, "a.jsonl:2: a window holds a value that is not finite"),
        ({"saliency_scores": [[1, 2, 3]]}, "a.jsonl:2: every relevant clip needs the ratings of three raters"),
        ({"saliency_scores": [[1, 2], [1, 2]]}, "a.jsonl:2: every relevant clip needs the ratings of three raters"),
        ({"relevant_clip_ids": [0, 10]}, "a.jsonl:2: a relevant clip lies outside the video's 10 clips"),
        ({"qid": 0}, "a.jsonl:2: query id 0 appears twice"),
        ({"query": None}, "a.jsonl:2: 'query' is missing"),
        (None, "a.jsonl:2: not valid JSON"),
    ],
)
def test_bad_annotation_lines_are_named_with_file_and_line(
    tmp_path: Path, change: dict[str, object] | None, reason: str
) -> None:
    row = {"qid": 0, "query": "q", "vid": "v", "duration": 20, "relevant_windows": [[0, 4]]}
    row |= {"relevant_clip_ids": [0, 1], "saliency_scores": [[1, 2, 3], [4, 4, 4]]}
    second = "{" if change is None else json.dumps({**row, "qid": 1, **change})
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + second + "\n")
    with pytest.raises(InputError, match=re.escape(reason)):
        read_qvhighlights(tmp_path / "a.jsonl")


def test_a_query_without_windows_cannot_be_scored_and_says_so() -> None:
    with pytest.raises(InputError, match="query id 1 has no relevant_windows"):
        moment_metrics([prediction(0, [[0, 4, 1]]), prediction(1, [[0, 4, 1]])], [query(0, [[0, 4]]), query(1, [])])


def test_windows_outside_the_video_and_saliency_of_another_length_count_as_officially() -> None:
    beyond = prediction(0, [[0, 40, 1]], [1.0] * 4)  # twice as long as the video; six clips have no score
    figures = moment_metrics([beyond], [query(0, [[0, 20]])])["brief"]
    assert figures["MR-full-R1@0.5"] == 100 and figures["MR-full-R1@0.7"] == 0
    assert figures["HL-min-VeryGood-Hit1"] == 100


def test_predicted_windows_without_length_overlap_nothing_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "p.jsonl").write_text('{"qid": 0, "pred_relevant_windows": [[4, 4, 3], [9, 2, 2], [0, 10, 1]]}\n')
    predictions = read_predictions(tmp_path / "p.jsonl")
    assert "2 predicted windows end where or before they start" in caplog.text and "p.jsonl:1" in caplog.text
    figures = moment_metrics(predictions, [query(0, [[0, 10]])])["brief"]
    assert figures["MR-full-R1@0.5"] == 0, "the first window overlaps nothing"
    assert figures["MR-full-mAP@0.5"] == pytest.approx(100 / 3, abs=0.01), "the third one is right"


def test_predictions_and_queries_must_be_the_same() -> None:
    with pytest.raises(InputError, match="without a prediction"):
        moment_metrics([prediction(0, [[0, 1, 1]])], [query(0, [[0, 1]]), query(1, [[0, 1]])])
    with pytest.raises(InputError, match="unknown"):
        moment_metrics([prediction(0, [[0, 1, 1]]), prediction(9, [[0, 1, 1]])], [query(0, [[0, 1]])])


# --- Localisation -------------------------------------------------------------------------------------------------


def test_a_window_scores_what_its_seconds_exceed_the_threshold_by() -> None:
    curve = np.array([[0, 0, 1, 1, 1, 0, 0, 0.0]])
    windows = np.array([[a, b] for a in range(8) for b in range(a + 1, 9)])
    score = excess_over_threshold(curve, windows, 0.5)[0]
    assert windows[score.argmax()].tolist() == [2, 5], "a window finds its own ends"


def test_suppression_drops_what_overlaps_a_better_window() -> None:
    windows = np.array([[0, 10], [1, 10], [20, 30], [0, 30]])
    assert suppress_overlaps(windows, np.array([3.0, 2, 1, 0]), 0.5).tolist() == [0, 2, 3]


def test_a_first_look_at_the_best_windows_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = candidate_windows(120, LocalizationConfig())
    scores = np.random.default_rng(0).standard_normal(len(windows))
    expected = suppress_overlaps(windows, scores, 0.5)
    monkeypatch.setattr("videoclip.evaluation.localization.FIRST_LOOK", 200)
    assert suppress_overlaps(windows, scores, 0.5).tolist() == expected.tolist()
    few = np.zeros(len(windows))
    few[:300] = 1.0  # the best windows overlap too much: the rest must be looked at
    assert len(suppress_overlaps(windows, few, 0.0)) == 10


@given(st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_windows_lie_inside_the_video_whatever_its_length(seconds: int) -> None:
    config = LocalizationConfig()
    for windows in (sliding_windows(seconds, config), candidate_windows(seconds, config)):
        assert len(windows) and (windows[:, 0] >= 0).all() and (windows[:, 1] <= seconds).all()
        assert (windows[:, 1] > windows[:, 0]).all()


@pytest.mark.parametrize("method", ["threshold", "sliding"])
@pytest.mark.parametrize("seconds", [1, 3, 90])
def test_moments_of_short_and_long_videos(method: str, seconds: int) -> None:
    torch.manual_seed(0)
    config = VideoCLIPConfig(video_dimension=8, width=16, layers=1, heads=2, intermediate=32, vocabulary=200)
    model = VideoCLIP(config).eval()
    tokens = np.random.default_rng(0).standard_normal((seconds, 8)).astype(np.float16)
    texts = np.random.default_rng(1).standard_normal((2, 16)).astype(np.float32)
    for windows, curve in find_moments(model, tokens, texts, LocalizationConfig(method)):
        assert curve.shape == (seconds,) and 1 <= len(windows) <= 10
        assert (np.diff(windows[:, 2]) <= 0).all()
    features = embed_seconds(model, tokens)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


def test_the_baseline_never_looks_at_the_query_and_fits_the_training_windows() -> None:
    train = [query(n, [[10, 15]]) for n in range(5)]
    asked = [query(7, [[1, 3]], 40.0), query(8, [[5, 9]], 40.0)]
    first, second = query_blind_predictions(train, asked)
    assert np.array_equal(first.windows, second.windows) and np.array_equal(first.saliency, second.saliency)
    assert overlap(first.windows[0, :2], np.array([20.0, 30.0])) > 0.8, "the same share of a longer video"


# --- Report -------------------------------------------------------------------------------------------------------


def test_the_page_is_self_contained_escapes_what_it_shows_and_puts_failures_first(tmp_path: Path) -> None:
    hostile = MomentQuery(0, "<script>alert(1)</script>", "v0", 20.0, np.array([[0.0, 4.0]]), None, None)
    queries = [hostile, query(1, [[0, 4]])]
    predictions = [prediction(0, [[10, 14, 1.0]], [0.1] * 10), prediction(1, [[0, 4, 1.0]], [0.1] * 10)]
    chosen = choose_examples(predictions, queries, 2)
    assert [q.query_id for q, _ in chosen] == [0, 1]
    examples = [moment_example(q, p, None) for q, p in chosen]
    path = tmp_path / "report.html"
    tables = [Table("T", ["", "R@1"], [["a & b", 1.0]], "note")]
    render_report(path, "Title", "summary", tables, [], [Section("S", "n", [*examples, Example("plain", "x")])])
    page = path.read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "a &amp; b" in page and "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
