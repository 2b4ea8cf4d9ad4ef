"""The plan of the cooking channel: which step happens when in which video."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from videoclip.synthetic.kitchen.vocabulary import ACTIONS, INGREDIENTS, PLACES, VESSELS


@dataclass(frozen=True)
class KitchenConfig:
    """Size of the corpus. `seconds` is the mean length of a video, which varies by ten to either side."""

    seed: int = 0
    train_videos: int = 160
    test_videos: int = 72
    recipes: int = 24
    seconds: int = 60
    unrelated: float = 0.25
    offset_seconds: float = 2.0  # standard deviation of the narrator's leads and lags

    def __post_init__(self) -> None:
        if self.seconds < 28:
            raise ValueError("a step may take 12 seconds: videos must last 28 seconds on average")


@dataclass(frozen=True)
class Step:
    """What is shown during [start, end) seconds: indices into ACTIONS, INGREDIENTS, VESSELS and PLACES."""

    start: float
    end: float
    action: int
    ingredient: int
    vessel: int
    place: int


@dataclass(frozen=True)
class Recipe:
    """Videos of one recipe draw from the same few ingredients, vessels and actions."""

    ingredients: tuple[int, ...]
    vessels: tuple[int, ...]
    actions: tuple[int, ...]


@dataclass(frozen=True)
class KitchenVideo:
    """One planned video: everything that rendering and annotating it needs. `duration` in whole seconds."""

    video_id: str
    split: str  # "train" or "test"
    recipe: int
    duration: int
    steps: tuple[Step, ...]
    seed: int


def plan_kitchen(config: KitchenConfig) -> list[KitchenVideo]:
    """Draw every video of the corpus. Steps of the test split differ from each other in at least one of
    action, ingredient, vessel and place, so that their captions are all distinct."""
    generator = np.random.default_rng([config.seed, 0])
    recipes = [_draw_recipe(generator) for _ in range(config.recipes)]
    taken: set[tuple[int, ...]] = set()
    videos = []
    for split, count in (("train", config.train_videos), ("test", config.test_videos)):
        for index in range(count):
            recipe = index % config.recipes
            duration = int(generator.integers(config.seconds - 10, config.seconds + 11))
            steps = _draw_steps(recipes[recipe], duration, generator, taken if split == "test" else None)
            seed = int(generator.integers(2**31))
            videos.append(KitchenVideo(f"{split}_{index:04d}", split, recipe, duration, steps, seed))
    return videos


def _draw_recipe(generator: np.random.Generator) -> Recipe:
    return Recipe(
        tuple(int(i) for i in generator.choice(len(INGREDIENTS), 4, replace=False)),
        tuple(int(i) for i in generator.choice(len(VESSELS), 2, replace=False)),
        tuple(int(i) for i in generator.choice(len(ACTIONS), 6, replace=False)),
    )


def _draw_steps(
    recipe: Recipe, duration: int, generator: np.random.Generator, taken: set[tuple[int, ...]] | None
) -> tuple[Step, ...]:
    steps: list[Step] = []
    place = int(generator.integers(len(PLACES)))
    time = float(generator.uniform(1, 4))
    while True:
        length = float(generator.uniform(6, 12))
        if time + length > duration - 0.5:
            return tuple(steps)
        if generator.random() < 0.4:
            place = int(generator.integers(len(PLACES)))
        for _ in range(1000):
            what = (
                int(generator.choice(recipe.actions)),
                int(generator.choice(recipe.ingredients)),
                int(generator.choice(recipe.vessels)),
                place,
            )
            repeats = bool(steps) and what[:2] == (steps[-1].action, steps[-1].ingredient)
            if not repeats and (taken is None or what not in taken):
                break
            if taken is not None:
                place = int(generator.integers(len(PLACES)))
        else:
            raise ValueError("this recipe has no unused step left; plan fewer test videos or more recipes")
        if taken is not None:
            taken.add(what)
        steps.append(Step(time, time + length, *what))
        time += length + float(generator.uniform(1, 4))
