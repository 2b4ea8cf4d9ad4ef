"""Moments that stand out of a similarity curve, and queries that nothing answers."""

import numpy as np
import pytest

from videoclip.errors import InputError
from videoclip.evaluation.absence import Presence, Usual, absence_metrics, peaks
from videoclip.evaluation.curves import (
    change_points,
    largest_sums,
    otsu_threshold,
    otsu_windows,
    proposals,
    runs,
    smooth,
)


def two_moments(noise: float = 0.0) -> np.ndarray:
    """A curve that is high from 20 to 35 and from 60 to 80 seconds."""
    curve = np.zeros(120)
    curve[20:35] = curve[60:80] = 1
    return curve + noise * np.random.default_rng(0).standard_normal(120)


def test_smoothing_keeps_a_constant_and_the_mean_and_spreads_a_peak_by_its_deviation() -> None:
    assert smooth(np.full(9, 2.5)) == pytest.approx(np.full(9, 2.5))
    peak = np.zeros(101)
    peak[50] = 1
    spread = smooth(peak, 3.0)
    assert spread.sum() == pytest.approx(1) and spread.argmax() == 50
    assert np.sqrt((spread * (np.arange(101) - 50) ** 2).sum()) == pytest.approx(3, rel=0.02)
    assert smooth(np.stack([peak, peak]), 3.0) == pytest.approx(np.stack([spread, spread]))
    assert len(smooth(np.arange(2.0))) == 2


def test_otsus_threshold_lies_between_two_classes() -> None:
    generator = np.random.default_rng(1)
    values = np.concatenate([generator.normal(0, 0.1, 300), generator.normal(1, 0.1, 60)])
    assert 0.35 < otsu_threshold(values) < 0.75
    assert otsu_threshold(np.array([0.0, 0, 0, 1, 1])) == pytest.approx(0.5, abs=0.02)
    assert otsu_threshold(np.full(5, 0.3)) == pytest.approx(0.3)


def test_several_moments_stand_above_otsus_threshold_and_the_longer_one_comes_first() -> None:
    windows, excess = otsu_windows(two_moments(0.3))
    assert np.abs(windows - [[20, 35], [60, 80]]).max() <= 3 and excess[1] > excess[0]
    whole, _ = otsu_windows(np.full(50, 0.2))
    assert whole.tolist() == [[0, 50]]


def test_the_interval_of_the_largest_sum_is_the_longer_moment_and_the_next_the_other() -> None:
    curve = 0.2 * np.random.default_rng(0).standard_normal(160)
    curve[20:35] += 1
    curve[110:130] += 1
    windows, sums = largest_sums(curve, 5)
    assert np.abs(windows[:2] - [[110, 130], [20, 35]]).max() <= 2
    assert (np.diff(sums) <= 0).all()
    covered = np.zeros(160, int)
    for start, end in windows:
        covered[start:end] += 1
    assert covered.max() == 1, "none overlaps another"
    about = curve - curve.mean()
    assert sums[0] == pytest.approx(max(about[i:j].sum() for i in range(160) for j in range(i + 1, 161)))


def test_changes_of_the_tokens_are_where_the_picture_changes() -> None:
    generator = np.random.default_rng(0)
    shots = generator.standard_normal((4, 16))
    tokens = (np.repeat(shots, 15, 0) + 0.3 * generator.standard_normal((60, 16))).astype(np.float16)
    points = change_points(tokens)
    assert {0, 60} <= set(points.tolist())
    assert all(np.abs(points - change).min() <= 1 for change in (15, 30, 45))
    windows = proposals(tokens, 3, 30)
    lengths = windows[:, 1] - windows[:, 0]
    assert lengths.min() >= 3 and lengths.max() <= 30
    assert proposals(tokens[:2]).tolist() == [[0, 2]]


def test_runs_by_hand() -> None:
    assert runs(np.array([True, True, False, True])).tolist() == [[0, 2], [3, 4]]
    assert runs(np.zeros(3, bool)).shape == (0, 2)


def test_prominence_takes_off_what_is_usual_for_a_query() -> None:
    generator = np.random.default_rng(0)
    texts = np.eye(6, dtype=np.float32)
    videos = [0.1 * generator.standard_normal((20, 6)).astype(np.float32) for _ in range(9)]
    for video in videos:
        video[:, 5] += 3  # everything is near to the last text
    videos[0][5:9, 2] += 1
    peak = peaks(texts, videos)
    usual = Usual(np.arange(9), videos)
    unusual = usual.prominence(texts, np.zeros(6, np.int64), peak[:, 0])
    assert unusual.argmax() == 2 and peak[:, 0].argmax() == 5
    mean, deviation = usual.of_texts(texts, np.zeros(6, np.int64))
    assert mean == pytest.approx(peak[:, 1:].mean(1)) and deviation == pytest.approx(peak[:, 1:].std(1)), "not its own"


def test_probabilities_are_calibrated_on_other_draws() -> None:
    generator = np.random.default_rng(0)
    present, absent = generator.normal(2, 1, (2, 4000)), generator.normal(0, 1, (2, 4000))
    presence = Presence.fit(present[0], absent[0])
    assert presence.slope == pytest.approx(2, abs=0.15) and presence.offset == pytest.approx(-2, abs=0.15)
    probability = presence.probability(np.concatenate([present[1], absent[1]]))
    truth = np.repeat([True, False], 4000)
    for low in (0.1, 0.3, 0.5, 0.7):
        chosen = (probability >= low) & (probability < low + 0.2)
        assert truth[chosen].mean() == pytest.approx(low + 0.1, abs=0.06)
    figures = absence_metrics(presence.probability(present[1]), presence.probability(absent[1]))
    assert figures["precision"] == pytest.approx(84, abs=2) and figures["recall"] == pytest.approx(84, abs=2)
    assert figures["AUC"] == pytest.approx(92, abs=1.5)
    separable = Presence.fit(np.array([5.0, 6]), np.array([0.0, 1]))
    assert np.isfinite([separable.slope, separable.offset]).all()
    with pytest.raises(InputError, match="calibration needs"):
        Presence.fit(np.zeros(0), np.ones(3))
