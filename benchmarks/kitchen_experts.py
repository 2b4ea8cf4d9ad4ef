"""The kitchen as a corpus of described clips with several experts, for `benchmarks/teachtext.py`.

A clip is one annotated step. Its experts are the mean of its X3D tokens, their standard deviation over the clip, and
a colour histogram of its frames. It is trained with what the narrator says while it is shown, of which about a third
is about something else, and the truth about that is known; it is looked for by its written caption, phrased as the
narrator never does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from videoclip.encoders.x3d import X3D
from videoclip.files import write_arrays
from videoclip.synthetic.kitchen import KitchenConfig, KitchenVideo, draw_seconds, plan_kitchen

CALIBRATION_CLIPS, BINS = 256, 4  # BINS of a histogram for each of red, green and blue


@dataclass(frozen=True)
class Split:
    """Clips of one split: `experts` name -> float32 [C, D]; `steps` (video, step) of each clip."""

    experts: dict[str, np.ndarray]
    videos: list[KitchenVideo]
    steps: list[tuple[int, int]]


def kitchen_clips(seed: int, folder: Path) -> dict[str, Split]:
    """Both splits of one corpus; features that are in `folder` already are used again."""
    videos = plan_kitchen(KitchenConfig(seed=seed))
    path = folder / f"kitchen-{seed}.npz"
    if not path.exists():
        write_arrays(path, **_features(videos, seed))
    stored = np.load(path)
    splits = {}
    for split in ("train", "test"):
        chosen = [video for video in videos if video.split == split]
        experts = {name.removeprefix(f"{split}_"): stored[name] for name in stored if name.startswith(split)}
        steps = [(v, s) for v, video in enumerate(chosen) for s in range(len(video.steps))]
        splits[split] = Split(experts, chosen, steps)
    return splits


def _features(videos: list[KitchenVideo], seed: int) -> dict[str, np.ndarray]:
    """`<split>_<expert>` -> float32 [C, D], every step of every video in order."""
    encoder = X3D("tiny", seed=seed)
    train = [video for video in videos if video.split == "train"]
    generator = np.random.default_rng([seed, 5])
    chosen = generator.choice(len(train), CALIBRATION_CLIPS // 8, replace=False)
    seconds = [np.stack(list(draw_seconds(train[i]))) for i in chosen]
    encoder.calibrate(np.concatenate([clips[generator.choice(len(clips), 8, replace=False)] for clips in seconds]))
    rows: dict[str, list[np.ndarray]] = {}
    for video in videos:
        clips = np.stack(list(draw_seconds(video)))  # uint8 (T, fps, H, W, 3)
        tokens = np.concatenate([encoder.encode_clips(clips[i : i + 8]) for i in range(0, len(clips), 8)])
        colours = np.stack([_histogram(clip) for clip in clips])
        for step in video.steps:
            inside = slice(int(step.start), max(int(step.start) + 2, round(step.end)))
            for name, expert in (
                ("mean", tokens[inside].mean(0)),
                ("deviation", tokens[inside].std(0)),
                ("colour", colours[inside].mean(0)),
            ):
                rows.setdefault(f"{video.split}_{name}", []).append(expert.astype(np.float32))
    return {name: np.stack(experts) for name, experts in rows.items()}


def _histogram(frames: np.ndarray) -> np.ndarray:
    """uint8 [fps, H, W, 3] -> the root of the share of pixels of each of BINS ** 3 colours."""
    bins = (frames // (256 // BINS)).astype(np.int64) @ np.array([BINS * BINS, BINS, 1])
    return np.sqrt(np.bincount(bins.ravel(), minlength=BINS**3) / bins.size)
