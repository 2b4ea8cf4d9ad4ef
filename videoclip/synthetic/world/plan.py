"""What happens in the world: its domains and topics, and videos of them drawn in blocks of arrays.

A video shows some of its topic's steps, each a verb and a thing; three attributes stay the same through it. A second
of it is a token: the sum of fixed random directions for what is there, and noise. The narrator, early or late by a
habit of his own, names the steps, says an attribute now and then, and talks about other things in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from videoclip.data.captions import Captions
from videoclip.data.shards import VideoRecord
from videoclip.errors import InputError
from videoclip.synthetic.world.words import ATTRIBUTES, FILLER, SPOKEN, TOPIC, UNRELATED, VERBS, names

BLOCK = 250  # videos that are drawn together; a video depends on the seed, its split and its block alone
SPLITS = ("train", "test")
OFF_TOPIC, INTRODUCTION = -1, -2  # what a line that is of no step is


@dataclass(frozen=True)
class WorldConfig:
    """Size of a world and how hard it is to see and to hear. Times in seconds."""

    seed: int = 0
    videos: int = 10_000
    """For training."""
    test_videos: int = 4_000
    domains: int = 20
    topics: int = 200
    attributes: int = 3
    values: int = 40
    """Of every attribute."""
    verbs_of_topic: int = 5
    things_of_domain: int = 160
    steps_of_topic: int = 8
    steps_of_video: int = 6
    lines_of_step: int = 3
    dimension: int = 64
    visible_attribute: float = 0.4
    """Length of an attribute's direction in a token; a verb's and a thing's are 1."""
    visible_topic: float = 1.0
    noise: float = 2.0
    """Length of the noise in a token."""
    said_attribute: float = 0.04
    """How often a line names an attribute, for each of them."""
    off_topic: float = 0.25
    """Share of lines about something else."""
    habit: float = 2.0
    """Standard deviation, over narrators, of how early or late they speak."""
    offset: float = 1.5
    """Standard deviation, over the steps of a video, around the narrator's habit."""

    def __post_init__(self) -> None:
        if min(self.videos, self.test_videos, self.domains, self.dimension, self.lines_of_step, self.values) < 1:
            raise InputError("a world needs at least one video of each split, domain, dimension, line and value")
        if self.topics < self.domains or self.topics % self.domains:
            raise InputError(f"{self.topics} topics cannot be shared out evenly among {self.domains} domains")
        if not 0 <= self.attributes <= len(ATTRIBUTES):
            raise InputError(f"there are words for 0 to {len(ATTRIBUTES)} attributes, not for {self.attributes}")
        if not 1 <= self.steps_of_video <= self.steps_of_topic:
            raise InputError("a video shows at least one step and at most those of its topic")
        if not 1 <= self.verbs_of_topic <= len(VERBS):
            raise InputError(f"there are {len(VERBS)} verbs, not {self.verbs_of_topic}")
        if self.steps_of_topic > self.verbs_of_topic * self.things_of_domain:
            raise InputError("a topic has more steps than pairs of its verbs and things")


@dataclass(frozen=True)
class WorldVideo:
    """One video and the truth about it.

    `steps`: float64 [S, 2], start and end of every step; `verb`, `thing`: int64 [S]; `attributes`: int64 [A];
    `line_step`: int64 [captions], the step that a caption is about, OFF_TOPIC, or INTRODUCTION.
    """

    record: VideoRecord
    domain: int
    topic: int
    attributes: np.ndarray
    steps: np.ndarray
    verb: np.ndarray
    thing: np.ndarray
    line_step: np.ndarray


@dataclass(frozen=True)
class _Drawn:
    """V videos: topic [V], attributes [V, A], verb and thing [V, S], start and end [V, S], seconds [V]."""

    topic: np.ndarray
    attributes: np.ndarray
    verb: np.ndarray
    thing: np.ndarray
    start: np.ndarray
    end: np.ndarray
    seconds: np.ndarray


class World:
    """Topics, words and directions of one seed; draws videos of them."""

    def __init__(self, config: WorldConfig = WorldConfig()) -> None:
        self.config = config
        generator = np.random.default_rng([config.seed, 0])
        things = config.domains * config.things_of_domain
        made = names(things + config.topics + config.attributes * config.values, generator)
        self.thing_names, self.topic_names = made[:things], made[things : things + config.topics]
        self.value_names = np.array(made[things + config.topics :]).reshape(config.attributes, config.values)
        self.domain_of = np.arange(config.topics) % config.domains
        self.step_verb = np.empty((config.topics, config.steps_of_topic), np.int64)
        self.step_thing = np.empty_like(self.step_verb)
        for topic in range(config.topics):
            verbs = generator.choice(len(VERBS), config.verbs_of_topic, replace=False)
            pairs = generator.choice(config.verbs_of_topic * config.things_of_domain, config.steps_of_topic, False)
            self.step_verb[topic] = verbs[pairs % config.verbs_of_topic]
            self.step_thing[topic] = self.domain_of[topic] * config.things_of_domain + pairs // config.verbs_of_topic
        self._verb_code = self._directions(len(VERBS), 1.0, generator)
        self._thing_code = self._directions(things, 1.0, generator)
        self._topic_code = self._directions(config.topics, config.visible_topic, generator)
        self._attribute_code = [
            self._directions(config.values, config.visible_attribute, generator) for _ in range(config.attributes)
        ]

    def video_count(self, split: str) -> int:
        return self.config.videos if split == "train" else self.config.test_videos

    def block(self, split: str, number: int) -> list[WorldVideo]:
        """Videos number * BLOCK … of one split, with tokens float16 [T, D] and captions."""
        first = number * BLOCK
        count = min(BLOCK, self.video_count(split) - first)
        generator = np.random.default_rng([self.config.seed, 1 + SPLITS.index(split), number])
        drawn = self._draw(first + np.arange(count), generator)
        bounds = np.cumsum(drawn.seconds)[:-1]
        tokens = np.split(self._tokens(drawn, generator), bounds)
        narrated = self._narrate(drawn, generator)
        videos = []
        for v in range(count):
            captions, line_step = narrated[v]
            record = VideoRecord(f"{split}_{first + v:06d}", float(drawn.seconds[v]), tokens[v], captions)
            topic = int(drawn.topic[v])
            steps = np.stack([drawn.start[v], drawn.end[v]], 1)
            shown = drawn.attributes[v], steps, drawn.verb[v], drawn.thing[v]
            videos.append(WorldVideo(record, int(self.domain_of[topic]), topic, *shown, line_step))
        return videos

    def attribute_words(self, attributes: np.ndarray) -> list[str]:
        """How each of a video's attributes is spoken of."""
        return [phrase.format(made[value]) for phrase, made, value in zip(ATTRIBUTES, self.value_names, attributes)]

    def _directions(self, count: int, length: float, generator: np.random.Generator) -> np.ndarray:
        rows = generator.standard_normal((count, self.config.dimension)).astype(np.float32)
        return length * rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def _draw(self, numbers: np.ndarray, generator: np.random.Generator) -> _Drawn:
        config, count = self.config, len(numbers)
        topic = numbers % config.topics  # topics of neighbouring numbers are of different domains
        attributes = generator.integers(config.values, size=(count, config.attributes))
        chosen = generator.random((count, config.steps_of_topic)).argsort(1)[:, : config.steps_of_video]
        length = generator.uniform(5, 10, (count, config.steps_of_video))
        pause = generator.uniform(0.5, 3, (count, config.steps_of_video + 1))
        end = np.cumsum(length + pause[:, :-1], 1)
        seconds = np.ceil(end[:, -1] + pause[:, -1]).astype(np.int64)
        rows = topic[:, None]
        return _Drawn(
            topic, attributes, self.step_verb[rows, chosen], self.step_thing[rows, chosen], end - length, end, seconds
        )

    def _tokens(self, drawn: _Drawn, generator: np.random.Generator) -> np.ndarray:
        """float16 [sum of seconds, D], the videos end to end."""
        owner = np.repeat(np.arange(len(drawn.topic)), drawn.seconds)
        second = np.arange(len(owner)) - np.repeat(np.cumsum(drawn.seconds) - drawn.seconds, drawn.seconds)
        still = self._topic_code[drawn.topic]
        for kind, code in enumerate(self._attribute_code):
            still = still + code[drawn.attributes[:, kind]]
        tokens = generator.standard_normal((len(owner), self.config.dimension), dtype=np.float32)
        tokens *= self.config.noise / np.sqrt(self.config.dimension)
        tokens += still[owner]
        middle = second[:, None] + 0.5
        inside = (drawn.start[owner] <= middle) & (middle < drawn.end[owner])  # [seconds, S]
        rows, step = np.nonzero(inside)
        tokens[rows] += (
            self._verb_code[drawn.verb[owner[rows], step]] + self._thing_code[drawn.thing[owner[rows], step]]
        )
        return tokens.astype(np.float16)

    def _narrate(self, drawn: _Drawn, generator: np.random.Generator) -> list[tuple[Captions, np.ndarray]]:
        """Captions of every video, and the step that each is about."""
        config = self.config
        count, steps, lines = len(drawn.topic), config.steps_of_video, config.lines_of_step
        habit = generator.normal(0, config.habit, (count, 1))
        offset = habit + generator.normal(0, config.offset, (count, steps))
        share = (np.arange(lines) + generator.random((count, steps, lines))) / lines
        time = (drawn.start + offset)[..., None] + (drawn.end - drawn.start)[..., None] * share
        time = np.clip(time, 0, drawn.seconds[:, None, None] - 1).reshape(count, -1)
        about = np.broadcast_to(np.repeat(np.arange(steps), lines), time.shape).copy()
        about[generator.random(time.shape) < config.off_topic] = OFF_TOPIC
        about = np.concatenate([np.full((count, 1), INTRODUCTION), about], 1)
        time = np.concatenate([generator.uniform(0, 2, (count, 1)), time], 1)
        order = np.argsort(time, 1, kind="stable")
        time, about = np.take_along_axis(time, order, 1), np.take_along_axis(about, order, 1)
        until = np.concatenate([time[:, 1:], time[:, -1:] + 4], 1)
        until = np.minimum(np.clip(until, time + 0.8, time + 5), drawn.seconds[:, None])
        dice = generator.random((*time.shape, 6 + config.attributes))
        return [
            (
                Captions(
                    time[v].astype(np.float32),
                    until[v].astype(np.float32),
                    [self._say(drawn, v, step, dice[v, i]) for i, step in enumerate(about[v].tolist())],
                ),
                about[v],
            )
            for v in range(count)
        ]

    def _say(self, drawn: _Drawn, v: int, step: int, dice: np.ndarray) -> str:
        """One line: `dice`, uniform in [0, 1), decide about its words."""
        if step == INTRODUCTION:
            return _one_of(TOPIC, dice[0]).format(topic=self.topic_names[drawn.topic[v]])
        if step == OFF_TOPIC:
            words = {"verb": _one_of(VERBS, dice[1]), "thing": _one_of(self.thing_names, dice[2])}
            return _one_of(UNRELATED, dice[0]).format(**words)
        thing, verb = self.thing_names[drawn.thing[v, step]], VERBS[drawn.verb[v, step]]
        line = _one_of(SPOKEN, dice[0]).format(verb=verb, thing=thing)
        if dice[1] < 0.5:
            line = f"{_one_of(FILLER, dice[2])} {line}"
        said = [
            word
            for word, draw in zip(self.attribute_words(drawn.attributes[v]), dice[6:])
            if draw < self.config.said_attribute
        ]
        return " ".join([line, *said])


def _one_of(choices: tuple[str, ...] | list[str], draw: float) -> str:
    return choices[int(draw * len(choices))]
