"""The embedded corpus: learnable only by looking at motion, and honest about what is held out."""

import json
from pathlib import Path

import numpy as np
import pytest

from videoclip.data.captions import read_captions
from videoclip.data.qvhighlights import read_qvhighlights
from videoclip.data.video import FrameFormat, decode_seconds
from videoclip.data.youcook2 import read_youcook2
from videoclip.synthetic.kitchen import (
    KitchenConfig,
    Step,
    caption,
    narrate,
    plan_kitchen,
    render_video,
    write_annotations,
)
from videoclip.synthetic.kitchen.pictures import FPS, motion
from videoclip.synthetic.kitchen.vocabulary import ACTIONS


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_at_least_300_held_out_captions_are_all_distinct(seed: int) -> None:
    steps = [step for video in plan_kitchen(KitchenConfig(seed=seed)) if video.split == "test" for step in video.steps]
    assert len({caption(step) for step in steps}) == len(steps) >= 300


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another() -> None:
    first, again, other = (plan_kitchen(KitchenConfig(seed=seed)) for seed in (4, 4, 5))
    assert first == again
    assert [video.steps for video in first] != [video.steps for video in other]


@pytest.mark.parametrize("pair", range(4))
def test_one_frame_does_not_suffice_to_tell_an_action(pair: int) -> None:
    forward, backward = ACTIONS[2 * pair], ACTIONS[2 * pair + 1]
    assert forward.path == backward.path
    times = np.linspace(0, 20, 4001)[:-1]
    shown = [np.array([motion(action, time) for time in times]) for action in (forward, backward)]
    for column in range(3):  # x, y and size take the same values equally often
        np.testing.assert_allclose(
            np.quantile(shown[0][:, column], np.linspace(0, 1, 11)),
            np.quantile(shown[1][:, column], np.linspace(0, 1, 11)),
            atol=1.0,
        )
    pace = [np.median(np.abs(np.diff(rows, axis=0)).sum(1)) for rows in shown]
    assert pace[1] > 2 * pace[0], "only the order and pace of the frames differ"


def test_held_out_captions_are_phrased_as_the_narrator_never_speaks() -> None:
    config = KitchenConfig(train_videos=30, test_videos=30)
    videos = plan_kitchen(config)
    spoken = {text for v in videos if v.split == "train" for text in narrate(v, config)["text"]}
    written = {caption(step) for v in videos if v.split == "test" for step in v.steps}
    assert not any(sentence in line for sentence in written for line in spoken)


def test_narration_rolls_drifts_and_wanders() -> None:
    config = KitchenConfig(train_videos=60, test_videos=1)
    narrations = [narrate(v, config) for v in plan_kitchen(config) if v.split == "train"]
    pairs = [(a, b) for n in narrations for a, b in zip(n["text"], n["text"][1:])]
    rolling = [any(a.split()[-n:] == b.split()[:n] for n in range(2, 20)) for a, b in pairs]
    assert 0.4 < np.mean(rolling) < 0.6, "half of the lines repeat their predecessor"
    unrelated = [
        any(
            w in t
            for w in (
                "subscribe",
                "grandma",
                "apron",
                "comments",
                "holiday",
                "sponsored",
                "neighbours",
                "kid",
                "next week",
            )
        )
        for n in narrations
        for t in n["text"]
    ]
    assert 0.15 < np.mean(unrelated) < 0.55  # a rolling line may show the unrelated one before it
    kept, rejected = read_captions(narrations[0], 100)
    assert len(kept) > 5 and not rejected


def test_videos_of_one_recipe_share_ingredients() -> None:
    videos = plan_kitchen(KitchenConfig(train_videos=96, test_videos=1, recipes=24))

    def shared(a: int, b: int) -> float:
        one, two = ({step.ingredient for step in videos[i].steps} for i in (a, b))
        return len(one & two) / len(one | two)

    same = np.mean([shared(i, i + 24) for i in range(48)])
    different = np.mean([shared(i, i + 25) for i in range(48)])
    assert same > different + 0.2


def test_rendering_is_deterministic_h264_of_the_planned_length(tmp_path: Path) -> None:
    video = plan_kitchen(KitchenConfig(train_videos=1, test_videos=1, recipes=1, seconds=28))[0]
    path = render_video(video, tmp_path / "a")
    again = render_video(video, tmp_path / "b")
    assert path.read_bytes() == again.read_bytes()
    seconds = list(decode_seconds(path, FrameFormat(FPS, 64)))
    assert len(seconds) == video.duration
    step = video.steps[0]
    inside, outside = seconds[int(step.start) + 2], seconds[0]
    moving, still = (np.quantile(frames.astype(float).std(0), 0.99) for frames in (inside, outside))
    assert moving > 5 * still, "steps move, pauses do not"


def test_annotations_are_in_the_public_formats_and_describe_the_videos(tmp_path: Path) -> None:
    config = KitchenConfig(train_videos=3, test_videos=3, recipes=3)
    videos = plan_kitchen(config)
    write_annotations(videos, config, tmp_path)
    raw = json.loads((tmp_path / "train" / "raw_caption.json").read_text())
    assert set(raw) == {v.video_id for v in videos if v.split == "train"}
    clips = read_youcook2(tmp_path / "youcookii_annotations_trainval.json")
    assert len(clips) == sum(len(v.steps) for v in videos if v.split == "test")
    by_id = {video.video_id: video for video in videos}
    for query in read_qvhighlights(tmp_path / "qvhighlights_val.jsonl"):
        assert query.ratings.shape == (len(query.relevant_clips), 3)
        steps: tuple[Step, ...] = by_id[query.video_id].steps
        for start, end in query.windows:
            assert any(step.start < end and step.end > start for step in steps)
            assert start % 2 == end % 2 == 0
