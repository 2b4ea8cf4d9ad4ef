"""The embedded corpus: a made-up cooking channel, generated from a seed, with annotations in the public formats.

Long videos show recipes of several steps. A step is an action (a motion) on an ingredient (shape and colour) in a
vessel at a place (the background). Two actions always share every single frame and differ in the order of the
frames alone, so no still picture tells them apart. A narrator talks about the steps as speech recognition would
write it down: rolling lines that repeat their predecessor, filler, synonyms, lines about something else, and
leads and lags of seconds. Held-out captions are phrased differently from anything the narrator says.

Files written, below one folder:

    train/videos/*.mp4  test/videos/*.mp4       H.264, 64 x 64 pixels, 8 frames a second
    train/raw_caption.json                      HowTo100M: {video_id: {start, end, text}}
    train/HowTo100M_v1.csv                      HowTo100M: video_id, category_1, category_2, rank, task_id
    youcookii_annotations_trainval.json         YouCook2: steps of both splits, with sentences
    qvhighlights_train.jsonl  …_val.jsonl       QVHighlights: queries, windows, saliency by three raters
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.files import atomic_path, write_json, write_json_lines

SIZE, FPS = 64, 8  # pixels, frames per second
SLOW_PERIOD, FAST_PERIOD = 1.6, 0.5  # seconds that a forward and a backward action take to run their path once
CLIP_SECONDS = 2  # QVHighlights rates saliency for clips of two seconds


@dataclass(frozen=True)
class Word:
    """One thing the corpus can show: what the narrator calls it, and how held-out captions name it."""

    spoken: tuple[str, ...]
    written: str


@dataclass(frozen=True)
class Action:
    """A motion: its path, the direction it is followed in, and its verbs (base form, -ing form)."""

    path: str
    forward: bool
    spoken: tuple[tuple[str, str], ...]
    written: str


ACTIONS = (
    Action("across", True, (("slice", "slicing"), ("cut", "cutting")), "is sliced"),
    Action("across", False, (("scrape", "scraping"), ("push", "pushing")), "is scraped"),
    Action("vertical", True, (("pour", "pouring"), ("drop", "dropping")), "is poured"),
    Action("vertical", False, (("toss", "tossing"), ("flip", "flipping")), "is tossed"),
    Action("circle", True, (("stir", "stirring"), ("mix", "mixing")), "is stirred"),
    Action("circle", False, (("fold", "folding"), ("turn", "turning")), "is folded"),
    Action("size", True, (("roll", "rolling"), ("spread", "spreading")), "is rolled"),
    Action("size", False, (("press", "pressing"), ("squeeze", "squeezing")), "is pressed"),
)

INGREDIENTS = (
    (Word(("tomato", "tomatoes"), "the tomato"), (220, 40, 40), "disc"),
    (Word(("pepper", "chili"), "the pepper"), (220, 40, 40), "triangle"),
    (Word(("carrot", "carrots"), "the carrot"), (240, 140, 30), "triangle"),
    (Word(("pumpkin", "squash"), "the pumpkin"), (240, 140, 30), "disc"),
    (Word(("cheese", "cheddar"), "the cheese"), (245, 225, 60), "square"),
    (Word(("egg", "eggs"), "the egg"), (245, 225, 60), "ring"),
    (Word(("cucumber", "cucumbers"), "the cucumber"), (50, 180, 60), "disc"),
    (Word(("onion", "scallion"), "the onion"), (50, 180, 60), "ring"),
    (Word(("eggplant", "aubergine"), "the eggplant"), (150, 60, 190), "square"),
    (Word(("cabbage", "kale"), "the cabbage"), (150, 60, 190), "ring"),
    (Word(("fish", "salmon"), "the fish"), (60, 110, 230), "triangle"),
    (Word(("tofu", "paneer"), "the tofu"), (240, 240, 240), "square"),
)

VESSELS = (
    (Word(("pan", "skillet"), "in the pan"), "pan"),
    (Word(("bowl", "dish"), "in the bowl"), "bowl"),
    (Word(("board", "chopping board"), "on the board"), "board"),
    (Word(("pot", "saucepan"), "in the pot"), "pot"),
    (Word(("tray", "sheet"), "on the tray"), "tray"),
)

PLACES = (
    (Word(("window", "daylight"), "by the window"), "bright"),
    (Word(("stove", "cooker"), "at the stove"), "dark"),
    (Word(("sink", "tap"), "at the sink"), "tiles"),
    (Word(("counter", "worktop"), "on the counter"), "planks"),
    (Word(("garden", "patio"), "in the garden"), "grass"),
)

FILLER = (
    "so yeah you guys",
    "okay so what we are doing now",
    "as you can see here",
    "and just take your time",
    "it smells amazing already",
    "alright",
    "you know what i mean",
)

UNRELATED = (
    "do not forget to subscribe and hit the bell",
    "my grandma taught me this when i was little",
    "i got this apron from a friend last year",
    "let me know in the comments what you think",
    "we went on holiday and it was raining all week",
    "this video is sponsored by nobody at all",
    "sorry about the noise the neighbours are building",
    "i always loved {ingredient} even as a kid",
    "next week we will do something with {ingredient}",
)

SPOKEN = (
    "we are going to {verb} the {ingredient} {vessel}",
    "just keep {verbing} that {ingredient} {vessel}",
    "i like to {verb} my {ingredient} {vessel}",
    "now {verb} your {ingredient} real quick {vessel}",
    "start {verbing} this {ingredient} {vessel}",
)

WRITTEN = ("{ingredient} {verb} {vessel} {place}", "{place} {ingredient} {verb} {vessel}")
QUERY = "{ingredient} {verb} {vessel}"


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


def render_video(video: KitchenVideo, folder: Path) -> Path:
    """Write one planned video as H.264 to `folder/<video_id>.mp4`, unless it is there; return its path."""
    import av

    path = Path(folder) / f"{video.video_id}.mp4"
    if path.exists():
        return path
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "18"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.thread_count = 1
        for second in _draw_seconds(video):
            for picture in second:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_annotations(videos: list[KitchenVideo], config: KitchenConfig, folder: Path) -> None:
    """Write the caption and annotation files of the whole corpus below `folder`."""
    folder = Path(folder)
    train = [video for video in videos if video.split == "train"]
    test = [video for video in videos if video.split == "test"]
    write_json(folder / "train" / "raw_caption.json", {v.video_id: narrate(v, config) for v in train})
    with atomic_path(folder / "train" / "HowTo100M_v1.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video_id", "category_1", "category_2", "rank", "task_id"])
        writer.writerows([v.video_id, "Food and Entertaining", f"Recipe {v.recipe}", 1, v.recipe] for v in train)
    write_json(folder / "youcookii_annotations_trainval.json", {"database": {v.video_id: _youcook2(v) for v in videos}})
    for name, split in (("train", train), ("val", test)):
        rows = [row for video in split for row in _qvhighlights(video)]
        for number, row in enumerate(rows):
            row["qid"] = number
        write_json_lines(folder / f"qvhighlights_{name}.jsonl", rows)


def caption(step: Step, template: str = WRITTEN[0]) -> str:
    """The held-out caption of a step."""
    return template.format(
        ingredient=INGREDIENTS[step.ingredient][0].written,
        verb=ACTIONS[step.action].written,
        vessel=VESSELS[step.vessel][0].written,
        place=PLACES[step.place][0].written,
    )


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


# --- What the narrator says ---------------------------------------------------------------------------------------


def narrate(video: KitchenVideo, config: KitchenConfig) -> dict[str, list[Any]]:
    """Rolling speech-recognition lines of one video: {"start": […], "end": […], "text": […]}, in seconds."""
    generator = np.random.default_rng([video.seed, 1])
    phrases = sorted(_phrases(video, config, generator))
    starts, ends, texts = [], [], []
    previous = ""
    for index, (time, phrase) in enumerate(phrases):
        until = phrases[index + 1][0] if index + 1 < len(phrases) else time + 4.0
        # A rolling caption still shows the line before while the new one is spoken.
        text = f"{previous} {phrase}".strip() if previous and generator.random() < 0.5 else phrase
        starts.append(round(time, 2))
        ends.append(round(min(max(until, time + 0.8), time + 5.0), 2))
        texts.append(text)
        previous = phrase
    return {"start": starts, "end": ends, "text": texts}


def _phrases(video: KitchenVideo, config: KitchenConfig, generator: np.random.Generator) -> list[tuple[float, str]]:
    phrases = []
    for step in video.steps:
        offset = float(generator.normal(0, config.offset_seconds))
        time = step.start + float(generator.uniform(0, 2)) + offset
        while time < step.end + offset:
            if generator.random() < config.unrelated:
                ingredient = INGREDIENTS[generator.integers(len(INGREDIENTS))][0].spoken[0]
                text = UNRELATED[generator.integers(len(UNRELATED))].format(ingredient=ingredient)
            else:
                text = _speak(step, generator)
            phrases.append((float(np.clip(time, 0, video.duration - 1)), text))
            time += float(generator.uniform(2.5, 4.5))
    return phrases


def _speak(step: Step, generator: np.random.Generator) -> str:
    verb, verbing = _one_of(ACTIONS[step.action].spoken, generator)
    ingredient = _one_of(INGREDIENTS[step.ingredient][0].spoken, generator)
    vessel = _one_of(VESSELS[step.vessel][0].spoken, generator)
    place = _one_of(PLACES[step.place][0].spoken, generator)
    where = f"with the {vessel}" if generator.random() < 0.6 else ""
    text = _one_of(SPOKEN, generator).format(verb=verb, verbing=verbing, ingredient=ingredient, vessel=where)
    if generator.random() < 0.4:
        text = f"{text} over here near the {place}"
    if generator.random() < 0.4:
        text = f"{_one_of(FILLER, generator)} {text}"
    return " ".join(text.split())


def _one_of(choices: tuple[Any, ...], generator: np.random.Generator) -> Any:
    return choices[generator.integers(len(choices))]


# --- What annotators write ----------------------------------------------------------------------------------------


def _youcook2(video: KitchenVideo) -> dict[str, Any]:
    generator = np.random.default_rng([video.seed, 2])
    annotations = [
        {
            "id": index,
            "segment": [round(step.start), round(step.end)],
            "sentence": caption(step, _one_of(WRITTEN, generator)),
        }
        for index, step in enumerate(video.steps)
    ]
    return {
        "subset": "training" if video.split == "train" else "validation",
        "recipe_type": str(video.recipe),
        "duration": float(video.duration),
        "annotations": annotations,
    }


def _qvhighlights(video: KitchenVideo) -> list[dict[str, Any]]:
    """One query for every (action, ingredient, vessel) of the video; a thing done twice has two windows."""
    generator = np.random.default_rng([video.seed, 3])
    duration = video.duration // CLIP_SECONDS * CLIP_SECONDS
    groups: dict[tuple[int, int, int], list[Step]] = {}
    for step in video.steps:
        groups.setdefault((step.action, step.ingredient, step.vessel), []).append(step)
    rows = []
    for steps in groups.values():
        clips = np.arange(duration // CLIP_SECONDS)
        shown = sum(
            np.clip(np.minimum(step.end, (clips + 1) * 2) - np.maximum(step.start, clips * 2), 0, 2) for step in steps
        )
        relevant = np.flatnonzero(shown >= 1)  # at least half of the clip
        if not len(relevant):
            continue
        ratings = np.clip(np.round(shown[relevant, None] * 2 - generator.exponential(0.6, (len(relevant), 3))), 0, 4)
        rows.append(
            {
                "qid": -1,  # numbered when the whole split is known
                "query": caption(steps[0], QUERY),
                "duration": duration,
                "vid": video.video_id,
                "relevant_clip_ids": relevant.tolist(),
                "saliency_scores": ratings.astype(int).tolist(),
                "relevant_windows": _windows(relevant),
            }
        )
    return rows


def _windows(clips: np.ndarray) -> list[list[int]]:
    runs = np.split(clips, np.flatnonzero(np.diff(clips) > 1) + 1)
    return [[int(run[0]) * CLIP_SECONDS, (int(run[-1]) + 1) * CLIP_SECONDS] for run in runs]


# --- What the camera sees -----------------------------------------------------------------------------------------

_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
TABLE_TOP = 44  # pixels from the top: where vessels stand


def _draw_seconds(video: KitchenVideo) -> Any:
    """Yield uint8 [FPS, SIZE, SIZE, 3] for every second of a planned video."""
    generator = np.random.default_rng([video.seed, 4])
    brightness = generator.uniform(0.85, 1.1)
    shift = generator.uniform(-3, 3, 2)
    phases = generator.uniform(0, 1, len(video.steps))
    size = generator.uniform(6.5, 8.5)
    for second in range(video.duration):
        frames = np.empty((FPS, SIZE, SIZE, 3), np.float32)
        for index in range(FPS):
            time = second + index / FPS
            frames[index] = _draw_frame(video.steps, phases, time, shift, size)
        noisy = frames * brightness + generator.normal(0, 3, frames.shape)
        yield np.clip(noisy, 0, 255).astype(np.uint8)


def _draw_frame(steps: tuple[Step, ...], phases: np.ndarray, time: float, shift: np.ndarray, size: float) -> np.ndarray:
    current = [index for index, step in enumerate(steps) if step.start <= time < step.end]
    nearest = current[0] if current else int(np.argmin([abs((s.start + s.end) / 2 - time) for s in steps]))
    step = steps[nearest]
    picture = _background(PLACES[step.place][1]).copy()
    mask, colour = _VESSELS_DRAWN[VESSELS[step.vessel][1]]
    picture[mask] = colour
    if current:
        _, colour, shape = INGREDIENTS[step.ingredient]
        x, y, scale = motion(ACTIONS[step.action], (time - step.start) + phases[nearest])
        picture[_shape_mask(shape, x + shift[0], y + shift[1], size * scale)] = colour
    return picture


def motion(action: Action, time: float) -> tuple[float, float, float]:
    """Where the ingredient is `time` seconds into its action: x and y in pixels, and its relative size.

    A path starts over when it ends. Backward actions run the same path the other way and faster, so the two show
    the same set of pictures; only their order and pace differ.
    """
    phase = time / SLOW_PERIOD % 1.0 if action.forward else 1.0 - time / FAST_PERIOD % 1.0
    x, y, scale = 32.0, 28.0, 1.0
    if action.path == "across":
        x = 12 + 40 * phase
    elif action.path == "vertical":
        y = 10 + 34 * phase
    elif action.path == "circle":
        x, y = 32 + 14 * np.cos(2 * np.pi * phase), 28 + 14 * np.sin(2 * np.pi * phase)
    else:
        scale = 0.6 + 1.4 * phase
    return float(x), float(y), float(scale)


def _background(name: str) -> np.ndarray:
    return _BACKGROUNDS[name]


def _make_background(name: str) -> np.ndarray:
    picture = np.empty((SIZE, SIZE, 3), np.float32)
    if name == "bright":
        picture[:] = (200, 215, 235)
    elif name == "dark":
        picture[:] = (70, 62, 60)
    elif name == "tiles":
        picture[:] = (130, 150, 160)
        picture[(_ROWS % 16 < 2) | (_COLUMNS % 16 < 2)] = (220, 225, 230)
    elif name == "planks":
        picture[:] = (150, 110, 75)
        picture[_ROWS % 10 < 2] = (105, 75, 50)
    elif name == "grass":
        picture[:] = (115, 140, 95)
        picture[(_COLUMNS + _ROWS) % 12 < 3] = (85, 115, 70)
    else:
        raise ValueError(name)
    return picture


_BACKGROUNDS = {name: _make_background(name) for _, name in PLACES}


def _vessel_mask(name: str) -> np.ndarray:
    x, y = _COLUMNS - 32, _ROWS - TABLE_TOP
    if name == "pan":
        return ((abs(x + 8) < 18) & (abs(y - 10) < 5)) | ((x >= 10) & (x < 32) & (abs(y - 8) < 2))
    if name == "bowl":
        return (y >= 0) & (x**2 + y**2 < 19**2)
    if name == "board":
        return (abs(x) < 32) & (abs(y - 13) < 4)
    if name == "pot":
        return (abs(x) < 14) & (y >= 0) & (y < 20)
    return (abs(x) < 30) & (y >= 4) & (y < 19) & ((_COLUMNS + _ROWS) % 6 < 3)


_VESSELS_DRAWN = {
    "pan": (_vessel_mask("pan"), (25, 25, 30)),
    "bowl": (_vessel_mask("bowl"), (245, 250, 255)),
    "board": (_vessel_mask("board"), (200, 150, 60)),
    "pot": (_vessel_mask("pot"), (90, 150, 240)),
    "tray": (_vessel_mask("tray"), (40, 45, 60)),
}


def _shape_mask(name: str, x: float, y: float, size: float) -> np.ndarray:
    dx, dy = _COLUMNS - x, _ROWS - y
    if name == "disc":
        return dx**2 + dy**2 < size**2
    if name == "ring":
        distance = dx**2 + dy**2
        return (distance < size**2) & (distance > (size * 0.55) ** 2)
    if name == "square":
        return (abs(dx) < size * 0.9) & (abs(dy) < size * 0.9)
    return (dy < size * 0.8) & (abs(dx) * 1.4 < dy + size)
