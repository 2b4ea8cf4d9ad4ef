"""Windows with classes: THUMOS' and ActivityNet's rules by hand; proposals, recognition, their files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_prompting import small_clip

from videoclip.data.action_clips import (
    ListedVideo,
    evenly_sampled,
    read_class_names,
    read_class_splits,
    read_few_shot,
    read_split,
    read_spoken_names,
    sample_frames,
)
from videoclip.errors import InputError
from videoclip.evaluation.detection import LabelledWindow, detection_metrics, read_proposals, read_true_windows
from videoclip.evaluation.recognition import (
    RecognitionConfig,
    class_probabilities,
    draw_batch,
    few_shot_metrics,
    label_proposals,
    listed_clips,
    propose,
    recognition_metrics,
)
from videoclip.parts.prompts import pack_words
from videoclip.recipes.prompting import Options, prompted


def window(start: float, end: float, score: float = 1.0, label: str = "jump", video: str = "v") -> LabelledWindow:
    return LabelledWindow(video, start, end, label, score)


def test_perfect_detections_have_all_the_precision_by_both_rules() -> None:
    truth = [window(0, 10), window(20, 30), window(5, 8, label="run", video="w")]
    for rule in ("thumos", "activitynet"):
        assert detection_metrics(truth, truth, rule)["mAP"] == 100  # type: ignore[arg-type]


def test_average_precision_by_hand() -> None:
    truth = [window(0, 10), window(20, 30)]
    found = [window(0, 10, 0.9), window(50, 60, 0.8), window(20, 29, 0.7), window(0, 9, 0.6)]
    # Hits at places 1 and 3 of 4: precision 1 up to recall 0.5, then 2/3.
    activitynet = detection_metrics(found, truth, "activitynet", [0.5])["mAP@0.5"]
    assert activitynet == round(100 * (0.5 * 1 + 0.5 * 2 / 3), 2)
    # Six of eleven recalls (0 to 0.5) have precision 1, five have 2/3.
    assert detection_metrics(found, truth, "thumos", [0.5])["mAP@0.5"] == round(100 * (6 + 5 * 2 / 3) / 11, 2)


def test_the_rules_differ_in_who_claims_at_the_threshold_and_about_ambiguous_windows() -> None:
    truth = [window(0, 10)]
    half = [window(0, 5, 0.9)]  # overlaps exactly one half
    assert detection_metrics(half, truth, "activitynet", [0.5])["mAP"] == 100
    assert detection_metrics(half, truth, "thumos", [0.5])["mAP"] == 0
    # Of two detections THUMOS gives the window to the one that fits best, ActivityNet to the surer one.
    two = [window(0, 7, 0.9), window(0, 10, 0.5)]
    assert detection_metrics(two, truth, "activitynet", [0.5])["mAP"] == 100
    assert detection_metrics(two, truth, "thumos", [0.5])["mAP"] == 50
    unclear = [window(0, 10), window(40, 50, label="Ambiguous")]
    twice = [window(45, 49, 0.9), window(0, 10, 0.5)]
    assert detection_metrics(twice, unclear, "thumos", [0.5])["mAP"] == 100
    assert detection_metrics(twice, truth, "thumos", [0.5])["mAP"] == 50
    with pytest.raises(InputError, match="no true windows"):
        detection_metrics(twice, [], "thumos")


def test_annotations_and_proposals_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    video = {"subset": "Validation", "annotations": [{"segment": [1, 4], "label": "jump"}]}
    path.write_text(json.dumps({"database": {"v": video, "w": {"subset": "training", "annotations": []}}}))
    assert read_true_windows(path) == [window(1, 4)]
    with pytest.raises(InputError, match="no annotated video of the subset 'testing'"):
        read_true_windows(path, "testing")
    proposals = {"v": [{"segment": [1, 2], "score": 0.2}, {"segment": [3, 4], "score": 0.8}]}
    path.write_text(json.dumps({"results": proposals}))
    assert read_proposals(path)["v"].tolist() == [[3, 4, 0.8], [1, 2, 0.2]]
    path.write_text(json.dumps({"results": {"v": [{"segment": [1], "score": 0.2}]}}))
    with pytest.raises(InputError, match=r"video 'v': .* has no segment"):
        read_proposals(path)


def test_the_release_s_lists_are_read(tmp_path: Path) -> None:
    (tmp_path / "classes.list").write_text("brush_hair\ncartwheel\n")
    assert read_class_names(tmp_path / "classes.list") == ["brush_hair", "cartwheel"]
    (tmp_path / "names.json").write_text('{"brush_hair": "brush hairs"}')
    assert read_spoken_names(tmp_path / "names.json", ["brush_hair"]) == {"brush_hair": "brush hairs"}
    with pytest.raises(InputError, match="no name for 1 classes, for instance 'cartwheel'"):
        read_spoken_names(tmp_path / "names.json", ["brush_hair", "cartwheel"])
    (tmp_path / "split.txt").write_text("brush_hair/a;b%20.avi\ncountry line dancing/yt id_000010_000020")  # no newline
    assert read_split(tmp_path / "split.txt") == [
        ListedVideo("brush_hair", "a;b%20"), ListedVideo("country line dancing", "yt id_000010_000020")
    ]  # fmt: skip
    (tmp_path / "split.txt").write_text("brush_hair\n")
    with pytest.raises(InputError, match="entry 1: 'brush_hair' is not class/video"):
        read_split(tmp_path / "split.txt")
    for side, lines in (("train", "a/x\nb/y\n"), ("test", "a/z\n")):
        for number in (0, 10, 2):
            path = tmp_path / "5-way" / side / f"split_{number}.list"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(lines)
    splits = read_few_shot(tmp_path / "5-way")
    assert len(splits) == 3 and splits[0][1] == [ListedVideo("a", "z")]
    (tmp_path / "5-way" / "test" / "split_2.list").unlink()
    with pytest.raises(InputError, match="split 2 has a list on one side only"):
        read_few_shot(tmp_path / "5-way")
    for side, lines in (("train", "a\nb\n"), ("test", "c\na\n")):
        path = tmp_path / "open" / side / "split_0.list"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines)
    with pytest.raises(InputError, match="the class 'a' is trained on and tested"):
        read_class_splits(tmp_path / "open")
    (tmp_path / "open" / "test" / "split_0.list").write_text("c\n")
    assert read_class_splits(tmp_path / "open") == [(["a", "b"], ["c"])]


def test_frames_are_drawn_as_the_release_draws_them() -> None:
    generator = np.random.default_rng(0)
    assert sample_frames(5, 8, generator).tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert all(sample_frames(17, 16, generator).tolist() == list(range(16)) for _ in range(50))
    drawn = [sample_frames(200, 16, generator) for _ in range(500)]
    assert {int(np.diff(places).min()) for places in drawn} == {1, 2, 3, 4}
    assert max(places.max() for places in drawn) < 199, "the last frame is never seen"
    assert evenly_sampled(32, 4).tolist() == [4, 12, 20, 28] and evenly_sampled(2, 3).tolist() == [0, 1, 1]


def test_videos_are_recognised_and_unknown_ones_refused() -> None:
    model = prompted(Options(prefix=0, postfix=0, layers=0), small_clip())
    names = [[1, 5, 2], [1, 6, 7, 2], [1, 8, 2]]
    classes = pack_words(names)
    with torch.no_grad():
        text = model.text_features(classes).numpy()
    generator = np.random.default_rng(0)
    features = {f"v{n}": text[n % 3] * 3 + 0.05 * generator.standard_normal((20 + n, text.shape[1])) for n in range(9)}
    listed = [ListedVideo("abc"[n % 3], f"v{n}") for n in range(9)]
    clips = listed_clips(listed, features, ["a", "b", "c"], "split 1")
    for passes in (0, 5):
        probabilities = class_probabilities(model, clips.features, classes, RecognitionConfig(passes=passes))
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
        metrics = recognition_metrics(probabilities, clips.labels)
        assert metrics["top1"] == 100 and metrics["chance"] == 33.33
    batch = draw_batch(clips, classes, 4, 16, generator)
    assert len(batch) == 4 and batch.frames.lengths.tolist() == [16] * 4
    with pytest.raises(InputError, match="split 1: 1 of 1 listed videos have no features, for instance 'w'"):
        listed_clips([ListedVideo("a", "w")], features, ["a"], "split 1")
    with pytest.raises(InputError, match="the class 'd' is not among the 3"):
        listed_clips([ListedVideo("d", "v0")], features, ["a", "b", "c"], "split 1")
    assert few_shot_metrics([50, 70]) == {"splits": 2, "top1": 60.0, "standard_error": 10.0}


def test_actions_are_localised_by_labelled_proposals() -> None:
    model = prompted(Options(prefix=0, postfix=0, layers=0), small_clip())
    classes = pack_words([[1, 5, 2], [1, 6, 7, 2]])
    with torch.no_grad():
        text = model.text_features(classes).numpy()
    generator = np.random.default_rng(0)
    unit = text / np.linalg.norm(text, axis=1, keepdims=True)
    background = -unit.sum(0)
    frames = np.tile(background, (60, 1)) + 0.05 * generator.standard_normal((60, text.shape[1]))
    frames[10:20] = unit[0] + 0.02 * generator.standard_normal((10, text.shape[1]))
    frames[35:47] = unit[1] + 0.02 * generator.standard_normal((12, text.shape[1]))
    proposals = propose(model, frames, classes)
    found = label_proposals(model, "v", frames, proposals, classes, ["jump", "run"], 1)
    truth = [window(10, 20), window(35, 47, label="run")]
    assert detection_metrics(found, truth, "activitynet", [0.5])["mAP"] > 80
    assert label_proposals(model, "v", frames, np.array([[70.0, 80.0, 1.0]]), classes, ["jump", "run"]) == []
