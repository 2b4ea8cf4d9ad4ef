"""What the camera of the cooking channel sees: drawing the frames, and encoding them as H.264."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from videoclip.files import atomic_path
from videoclip.synthetic.kitchen.plan import KitchenVideo, Step
from videoclip.synthetic.kitchen.vocabulary import ACTIONS, INGREDIENTS, PLACES, VESSELS, Action

SIZE, FPS = 64, 8  # pixels, frames per second
SLOW_PERIOD, FAST_PERIOD = 1.6, 0.5  # seconds that a forward and a backward action take to run their path once
_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
TABLE_TOP = 44  # pixels from the top: where vessels stand


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
        for second in draw_seconds(video):
            for picture in second:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def draw_seconds(video: KitchenVideo) -> Iterator[np.ndarray]:
    """Yield uint8 [FPS, SIZE, SIZE, 3] for every second of a planned video."""
    generator = np.random.default_rng([video.seed, 4])
    brightness, shift, phases, size = _camera(generator, len(video.steps))
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


def draw_frames(video: KitchenVideo, times: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    """uint8 [len(times), SIZE, SIZE, 3]: what the camera sees at these seconds, before any video file is made of it."""
    brightness, shift, phases, size = _camera(np.random.default_rng([video.seed, 4]), len(video.steps))
    frames = np.stack([_draw_frame(video.steps, phases, time, shift, size) for time in times.tolist()])
    return np.clip(frames * brightness + noise.normal(0, 3, frames.shape), 0, 255).astype(np.uint8)


def ingredient_masks(video: KitchenVideo, times: np.ndarray) -> np.ndarray:
    """bool [len(times), SIZE, SIZE]: where the ingredient is drawn at these seconds; nowhere between steps."""
    _, shift, phases, size = _camera(np.random.default_rng([video.seed, 4]), len(video.steps))
    masks = np.zeros((len(times), SIZE, SIZE), bool)
    for mask, time in zip(masks, times.tolist()):
        for step, phase in zip(video.steps, phases):
            if step.start <= time < step.end:
                x, y, scale = motion(ACTIONS[step.action], time - step.start + phase)
                mask |= _shape_mask(INGREDIENTS[step.ingredient][2], x + shift[0], y + shift[1], size * scale)
    return masks


def _camera(generator: np.random.Generator, steps: int) -> tuple[float, np.ndarray, np.ndarray, float]:
    """What stays the same through a video: brightness, shift and size of things, and the phase of every step."""
    brightness = generator.uniform(0.85, 1.1)
    shift = generator.uniform(-3, 3, 2)
    phases = generator.uniform(0, 1, steps)
    return brightness, shift, phases, generator.uniform(6.5, 8.5)
