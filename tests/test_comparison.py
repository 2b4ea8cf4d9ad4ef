"""A difference between two models is told with its interval, and with how often chance alone would make it."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.cli import main
from pipelines.compare import CompareConfig, compare
from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.errors import InputError
from videoclip.evaluation.comparison import recall_at, recall_difference
from videoclip.evaluation.retrieval import _galleries, ranks_of_positives, retrieval_metrics, retrieve


def ranks(share: float, queries: int, seed: int) -> np.ndarray:
    """[1, Q]: rank 1 for a share of the queries, 50 for the others."""
    return np.where(np.random.default_rng(seed).random((1, queries)) < share, 1.0, 50.0)


def test_an_interval_holds_the_true_recall_as_often_as_it_says() -> None:
    estimates = [recall_at(ranks(0.4, 200, seed), 1, draws=500) for seed in range(200)]
    held = np.mean([one.low <= 40 <= one.high for one in estimates])
    assert 0.9 <= held <= 0.99
    widths = [recall_at(ranks(0.4, queries, 0), 1) for queries in (100, 10_000)]
    assert widths[0].high - widths[0].low > 8 * (widths[1].high - widths[1].low), "ten times narrower"


def test_two_equal_models_differ_significantly_as_often_as_p_says() -> None:
    found = [recall_difference(ranks(0.4, 300, s), ranks(0.4, 300, 1000 + s), 1, draws=400).p for s in range(200)]
    assert 0.01 <= np.mean(np.array(found) <= 0.05) <= 0.1


def test_pairing_sees_what_separate_intervals_do_not() -> None:
    first = ranks(0.4, 400, 0)
    second = first.copy()
    second[0, np.flatnonzero(first[0] > 1)[:12]] = 1  # the same answers, and twelve more right
    apart = recall_at(first, 1), recall_at(second, 1)
    assert apart[0].high > apart[1].low
    difference = recall_difference(first, second, 1)
    assert difference.value == pytest.approx(3) and 0 < difference.low < 3 < difference.high
    assert difference.p < 0.002, "twelve heads in twelve throws"
    turned = recall_difference(second, first, 1)
    assert turned.value == pytest.approx(-3) and turned.high < 0
    assert recall_difference(first, first, 1).p == 1


def test_p_is_the_share_of_sign_changes_counted_by_hand() -> None:
    first, second = np.array([[5.0, 5, 5, 1, 9]]), np.array([[1.0, 1, 1, 1, 9]])
    # Three queries gain: of eight sign changes two are as far from zero.
    assert recall_difference(first, second, 1, draws=40_000).p == pytest.approx(0.25, abs=0.02)


def test_one_query_has_no_interval() -> None:
    with pytest.raises(InputError, match="at least two queries"):
        recall_at(np.ones((1, 1)), 1)
    with pytest.raises(InputError, match="cannot be compared one by one"):
        recall_difference(np.ones((1, 3)), np.ones((1, 4)), 1)


def write(folder: Path, values: np.ndarray, order: np.ndarray | None = None) -> Path:
    """A retrieval evaluation's predictions with these ranks, its rows in any order."""
    folder.mkdir(parents=True)
    rows = [
        {"video_id": f"v{n // 3}", "start": 0.0, "end": 9.0, "sentence": "stir" if n % 3 else "chop", "rank": value}
        for n, value in enumerate(values.tolist())
    ]
    order = np.arange(len(rows)) if order is None else order
    (folder / "predictions.jsonl").write_text("".join(json.dumps(rows[n]) + "\n" for n in order))
    return folder


def test_two_evaluations_are_compared_query_by_query(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    better = ranks(0.7, 300, 1)[0]
    first = write(tmp_path / "a", ranks(0.4, 300, 0)[0])
    blocks = np.arange(300).reshape(100, 3)[::-1].ravel()  # the same queries in another order
    second = write(tmp_path / "b", better, blocks)
    assert main(["compare", str(first), str(second), "--output", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["R@1"]["second"]["value"] == pytest.approx(100 * (better == 1).mean())
    assert figures["R@1"]["difference"]["p"] < 0.001 and figures["R@1"]["difference"]["low"] > 0
    assert "300 queries" in printed and f"{figures['R@1']['difference']['value']:+.1f}" in printed


def test_several_seeds_are_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, share in (("random", 0.4), ("similar", 0.5)):
        for seed in range(3):
            write(tmp_path / name / f"seed-{seed}", ranks(share, 300, seed)[0])
    figures = compare(CompareConfig(tmp_path / "random", tmp_path / "similar", draws=1000))
    of_seeds = figures["R@1"]["first"]["seeds"]
    assert figures["seeds"] == [3, 3] and len(of_seeds) == 3
    assert figures["R@1"]["first"]["value"] == pytest.approx(np.mean(of_seeds))
    printed = capsys.readouterr().out
    assert f"{np.mean(of_seeds):.1f} ± {np.std(of_seeds, ddof=1):.1f} [" in printed and printed.count(", run ") == 6


def test_results_that_cannot_be_compared_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, other = write(tmp_path / "a", np.ones(9)), write(tmp_path / "b", np.ones(6))
    lonely = write(tmp_path / "one", np.ones(1))
    (tmp_path / "c").mkdir()
    moments = tmp_path / "moments"
    moments.mkdir()
    (moments / "predictions.jsonl").write_text('{"qid": 1, "pred_relevant_windows": []}\n')
    for second, reason in (
        (other, "3 queries differ from those of"),
        (tmp_path / "c", "run a retrieval evaluation first"),
        (moments, "row 1 has no rank"),
    ):
        assert main(["compare", str(good), str(second)]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
    assert main(["compare", str(lonely), str(lonely)]) == 2
    assert "at least two queries" in capsys.readouterr().err


def test_a_gallery_of_one_topic_holds_only_its_clips() -> None:
    generator = np.random.default_rng(0)
    videos = generator.standard_normal((30, 8)).astype(np.float32)
    positives = np.repeat(np.arange(30), 2)
    texts = videos[positives] + generator.standard_normal((60, 8)).astype(np.float32)
    topics = [("soup", "bread", "cake")[n % 3] for n in range(24)] + ["soup"] * 6
    result = retrieve(texts, videos, positives, topics)
    soup = np.array([n for n in range(30) if topics[n] == "soup"])
    asked = np.flatnonzero(np.isin(positives, soup))
    own = np.searchsorted(soup, positives[asked])
    assert np.array_equal(result.ranks[asked], ranks_of_positives(texts[asked], videos[soup], own))
    assert all(topics[clip] == topics[positives[q]] for q in range(60) for clip in result.found[q])
    assert (result.ranks <= retrieve(texts, videos, positives).ranks).all(), "fewer clips, no worse places"
    chance = retrieval_metrics(result.ranks, result.size)["chance_R@1"]
    assert chance == pytest.approx(100 * (28 / 14 + 16 / 8 + 16 / 8) / 60, abs=0.01)


def test_a_video_without_a_topic_is_named() -> None:
    clips = [AnnotatedClip(name, 0, 5, ("stir",)) for name in "abb"]
    with pytest.raises(InputError, match="no topic for 1 of the evaluated videos, for instance 'b'"):
        _galleries(clips, {"a": "soup"})
    assert _galleries(clips[:1], {"a": "soup"}) == ["soup"]
