"""What annotators would write about the cooking channel: captions, YouCook2's and QVHighlights' files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.files import atomic_path, write_json, write_json_lines
from videoclip.synthetic.kitchen.narration import narrate, one_of
from videoclip.synthetic.kitchen.plan import KitchenConfig, KitchenVideo, Step
from videoclip.synthetic.kitchen.vocabulary import ACTIONS, INGREDIENTS, PLACES, QUERY, VESSELS, WRITTEN

CLIP_SECONDS = 2  # QVHighlights rates saliency for clips of two seconds


def write_annotations(videos: list[KitchenVideo], config: KitchenConfig, folder: Path) -> None:
    """Write the caption and annotation files of the whole corpus below `folder`."""
    folder = Path(folder)
    train = [video for video in videos if video.split == "train"]
    test = [video for video in videos if video.split == "test"]
    for part in (train, test):
        said = {video.video_id: narrate(video, config) for video in part}
        write_json(folder / ("train" if part is train else "test") / "raw_caption.json", said)
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


def _youcook2(video: KitchenVideo) -> dict[str, Any]:
    generator = np.random.default_rng([video.seed, 2])
    annotations = [
        {
            "id": index,
            "segment": [round(step.start), round(step.end)],
            "sentence": caption(step, one_of(WRITTEN, generator)),
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
