"""What the narrator of the cooking channel says, as speech recognition would write it down."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from videoclip.data.captions import Captions
from videoclip.synthetic.kitchen.plan import KitchenConfig, KitchenVideo, Step
from videoclip.synthetic.kitchen.vocabulary import ACTIONS, FILLER, INGREDIENTS, PLACES, SPOKEN, UNRELATED, VESSELS

LINE_SECONDS = 5.0  # most between the starts of two phrases of one line


class Phrase(NamedTuple):
    """What the narrator says at `time`, in seconds, and which step of the video it is about, None if about none."""

    time: float
    text: str
    step: int | None


def narrate(video: KitchenVideo, config: KitchenConfig) -> dict[str, list[Any]]:
    """Rolling speech-recognition lines of one video: {"start": […], "end": […], "text": […]}, in seconds."""
    generator = np.random.default_rng([video.seed, 1])
    phrases = _phrases(video, config, generator)
    starts, ends, texts = [], [], []
    previous = ""
    for index, (time, phrase, _) in enumerate(phrases):
        until = phrases[index + 1].time if index + 1 < len(phrases) else time + 4.0
        # A rolling caption still shows the line before while the new one is spoken.
        text = f"{previous} {phrase}".strip() if previous and generator.random() < 0.5 else phrase
        starts.append(round(time, 2))
        ends.append(round(min(max(until, time + 0.8), time + 5.0), 2))
        texts.append(text)
        previous = phrase
    return {"start": starts, "end": ends, "text": texts}


def narrate_phrases(video: KitchenVideo, config: KitchenConfig) -> list[Phrase]:
    """What `narrate` writes down, phrase by phrase, in order, with the truth about each."""
    return _phrases(video, config, np.random.default_rng([video.seed, 1]))


def steps_of_captions(video: KitchenVideo, config: KitchenConfig, captions: Captions) -> list[set[int | None]]:
    """Which steps each of a video's captions is about, as they stand in shards: rolling repeats undone, lines merged.

    None stands for talk about nothing that is shown. A caption holds a phrase if it has its words in a row and is
    spoken about then; a merged line may hold phrases about several steps, and a cut one none.
    """
    phrases = narrate_phrases(video, config)
    about: list[set[int | None]] = []
    for start, end, text in zip(captions.start, captions.end, captions.text):
        near = [p for p in phrases if start - LINE_SECONDS <= p.time <= end + 0.1]
        about.append({phrase.step for phrase in near if f" {phrase.text} " in f" {text} "})
    return about


def _phrases(video: KitchenVideo, config: KitchenConfig, generator: np.random.Generator) -> list[Phrase]:
    phrases = []
    for number, step in enumerate(video.steps):
        offset = float(generator.normal(0, config.offset_seconds))
        time = step.start + float(generator.uniform(0, 2)) + offset
        while time < step.end + offset:
            unrelated = generator.random() < config.unrelated
            if unrelated:
                ingredient = INGREDIENTS[generator.integers(len(INGREDIENTS))][0].spoken[0]
                text = UNRELATED[generator.integers(len(UNRELATED))].format(ingredient=ingredient)
            else:
                text = _speak(step, generator)
            time_said = float(np.clip(time, 0, video.duration - 1))
            phrases.append(Phrase(time_said, text, None if unrelated else number))
            time += float(generator.uniform(2.5, 4.5))
    return sorted(phrases, key=lambda phrase: phrase[:2])


def _speak(step: Step, generator: np.random.Generator) -> str:
    verb, verbing = one_of(ACTIONS[step.action].spoken, generator)
    ingredient = one_of(INGREDIENTS[step.ingredient][0].spoken, generator)
    vessel = one_of(VESSELS[step.vessel][0].spoken, generator)
    place = one_of(PLACES[step.place][0].spoken, generator)
    where = f"with the {vessel}" if generator.random() < 0.6 else ""
    text = one_of(SPOKEN, generator).format(verb=verb, verbing=verbing, ingredient=ingredient, vessel=where)
    if generator.random() < 0.4:
        text = f"{text} over here near the {place}"
    if generator.random() < 0.4:
        text = f"{one_of(FILLER, generator)} {text}"
    return " ".join(text.split())


def one_of(choices: tuple[Any, ...], generator: np.random.Generator) -> Any:
    return choices[generator.integers(len(choices))]
