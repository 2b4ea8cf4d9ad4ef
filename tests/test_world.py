"""The world of tokens: domains, topics and attributes that can be seen and are seldom said."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from videoclip.convert import features_to_shards
from videoclip.data.captions import Captions, captions_of_video
from videoclip.data.howto100m import read_raw_captions, read_topics
from videoclip.data.shards import Shards
from videoclip.data.youcook2 import read_youcook2
from videoclip.errors import InputError
from videoclip.synthetic.world import (
    ALL_DOMAINS,
    INTRODUCTION,
    OFF_TOPIC,
    World,
    WorldConfig,
    WorldVideo,
    videos_of,
    write_features,
    write_world,
)

SMALL = WorldConfig(videos=60, test_videos=40, domains=4, topics=8, dimension=48)


@pytest.fixture(scope="module")
def videos() -> list[WorldVideo]:
    return World(WorldConfig(videos=250)).block("train", 0)


def test_a_world_is_the_same_for_the_same_seed_and_block_by_block(videos: list[WorldVideo]) -> None:
    world = World(WorldConfig(videos=600, test_videos=3))
    assert len(list(videos_of(world, "train"))) == 600 and len(list(videos_of(world, "test"))) == 3
    for one, other in zip(videos[:250:50], world.block("train", 0)[:250:50]):
        assert np.array_equal(one.record.tokens, other.record.tokens)
        assert one.record.captions.text == other.record.captions.text
    elsewhere = World(WorldConfig(seed=1, videos=250)).block("train", 0)[0]
    assert elsewhere.record.captions.text != videos[0].record.captions.text
    assert len({video.record.video_id for video in videos}) == 250


def test_steps_follow_one_another_inside_the_video_and_are_of_its_topic(videos: list[WorldVideo]) -> None:
    world = World(WorldConfig(videos=250))
    for video in videos[::25]:
        assert (video.steps[:, 0] < video.steps[:, 1]).all() and (video.steps[1:, 0] > video.steps[:-1, 1]).all()
        assert video.steps[0, 0] > 0 and video.steps[-1, 1] < len(video.record.tokens) == video.record.duration
        known = set(zip(world.step_verb[video.topic].tolist(), world.step_thing[video.topic].tolist()))
        assert set(zip(video.verb.tolist(), video.thing.tolist())) <= known
        assert video.domain == world.domain_of[video.topic]


def test_a_narrator_is_early_or_late_sometimes_off_topic_and_seldom_names_an_attribute(
    videos: list[WorldVideo],
) -> None:
    config, world = WorldConfig(), World(WorldConfig(videos=250))
    lines = [
        (text, step, start, video)
        for video in videos
        for text, step, start in zip(video.record.captions.text, video.line_step, video.record.captions.start)
    ]
    told = [line for line in lines if line[1] >= 0]
    off = sum(step == OFF_TOPIC for _, step, _, _ in lines) / sum(step != INTRODUCTION for _, step, _, _ in lines)
    assert off == pytest.approx(config.off_topic, abs=0.02)
    said = np.mean([[word in text for word in world.attribute_words(v.attributes)[1:]] for text, _, _, v in told])
    assert said == pytest.approx(config.said_attribute, abs=0.02)
    for text, step, _, video in told[::100]:
        assert world.thing_names[video.thing[step]] in text
    outside = [not a <= start < b for _, step, start, v in told for a, b in [v.steps[step]]]
    assert 0.1 < np.mean(outside) < 0.6, "some lines stand beside their step"
    for video in videos[::50]:
        assert (np.diff(video.record.captions.start) >= 0).all()
        assert (video.record.captions.end > video.record.captions.start).all()


def test_what_is_shown_can_be_seen_in_the_tokens(videos: list[WorldVideo]) -> None:
    means = np.stack([video.record.tokens.astype(np.float32).mean(0) for video in videos])
    means -= means.mean(0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    cosine = means @ means.T
    np.fill_diagonal(cosine, np.nan)
    topic = np.array([video.topic for video in videos])
    attribute = np.array([video.attributes[0] for video in videos])
    same_topic, same_attribute = topic[:, None] == topic, attribute[:, None] == attribute
    assert np.nanmean(cosine[same_topic]) > 0.2 + np.nanmean(cosine[~same_topic])
    assert np.nanmean(cosine[same_attribute & ~same_topic]) > 0.05 + np.nanmean(cosine[~same_attribute & ~same_topic])


def test_shards_galleries_and_topics_fit_each_other(tmp_path: Path) -> None:
    write_world(World(SMALL), tmp_path)
    train, test = Shards(tmp_path / "train", verify=True), Shards(tmp_path / "test", verify=True)
    topics = read_topics(tmp_path / "topics.json")
    assert set(topics) == {*train.video_ids(), *test.video_ids()}
    domains = [read_youcook2(tmp_path / f"youcookii_domain-{domain:02d}.json") for domain in range(4)]
    everything = read_youcook2(tmp_path / ALL_DOMAINS)
    for domain, clips in enumerate(domains):
        assert {topics[clip.video_id].split("/")[0] for clip in clips} == {str(domain)}
        assert {clip.video_id for clip in clips} <= set(test.video_ids())
    assert len({topics[clip.video_id].split("/")[0] for clip in everything}) == 4
    assert abs(len(everything) - len(domains[0])) <= 3 * SMALL.steps_of_video
    sentences = [clip.sentences[0] for clips in domains for clip in clips]
    assert len(set(sentences)) > 0.99 * len(sentences), "sentences tell the clips apart"


def test_a_folder_of_features_becomes_the_same_shards(tmp_path: Path) -> None:
    world = World(replace(SMALL, videos=5, test_videos=2))
    write_world(world, tmp_path / "shards")
    write_features(world, tmp_path / "features")
    captions = read_raw_captions(tmp_path / "features" / "raw_caption.json")
    folders = tmp_path / "features" / "train", tmp_path / "again"

    def captions_of(video_id: str, seconds: int) -> Captions:
        return captions_of_video(captions[video_id], seconds, video_id, keep_rolling_repeats=True)[0]

    assert not list(features_to_shards(*folders, captions_of, "world"))
    for one, other in zip(Shards(tmp_path / "shards" / "train"), Shards(tmp_path / "again")):
        assert one.video_id == other.video_id and np.array_equal(one.tokens, other.tokens)
        assert one.captions.text == other.captions.text
    assert (tmp_path / "features" / ALL_DOMAINS).read_text() == (tmp_path / "shards" / ALL_DOMAINS).read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topics": 30}, "shared out evenly"),
        ({"attributes": 9}, "words for 0 to 5"),
        ({"steps_of_video": 9}, "at most those of its topic"),
        ({"verbs_of_topic": 99}, "verbs"),
        ({"videos": 0}, "at least one"),
    ],
)
def test_worlds_that_cannot_be_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(WorldConfig(), **changes)
