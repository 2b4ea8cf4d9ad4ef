"""The cooking channel as clips of a few frames with a text each, for `alpro.py` and `twins.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from videoclip.data.frames import FrameBatch, choose_frames, random_crop_of_patches
from videoclip.data.words import WordTokenizer, train_wordpiece
from videoclip.packed import Packed
from videoclip.retrieval.false_negatives import text_labels
from videoclip.synthetic.kitchen import KitchenConfig, KitchenVideo, Step, caption, narrate, plan_kitchen
from videoclip.synthetic.kitchen.pictures import FPS, draw_frames, ingredient_masks
from videoclip.synthetic.kitchen.vocabulary import INGREDIENTS, PLACES, VESSELS

MAX_WORDS = 28
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Clip:
    """One step of one video and the narrator's lines that overlap it."""

    video: KitchenVideo
    step: Step
    lines: tuple[str, ...]

    def times(self, count: int, sampler: str, generator: np.random.Generator | None) -> np.ndarray:
        """Seconds of `count` frames; the camera takes FPS a second."""
        first = int(np.ceil(self.step.start * FPS))
        frames = int(np.floor(self.step.end * FPS)) - first
        return (first + choose_frames(frames, count, sampler, generator)) / FPS


class Corpus:
    """Clips of both splits, a tokenizer for all texts, and the entities: every noun that the narrator uses."""

    def __init__(self, seed: int) -> None:
        config = KitchenConfig(seed=seed)
        videos = plan_kitchen(config)
        self.train = [clip for video in videos if video.split == "train" for clip in clips_of(video, config)]
        self.test = [clip for video in videos if video.split == "test" for clip in clips_of(video, config)]
        self.entities = [word for kind in (INGREDIENTS, VESSELS) for thing in kind for word in thing[0].spoken]
        self.entities += [word for place in PLACES for word in place[0].spoken]
        texts = [line for clip in self.train for line in clip.lines] + [caption(clip.step) for clip in self.train]
        self.tokenizer: WordTokenizer = train_wordpiece(
            texts + ["a the one video footage portrait photo of what is in"], 600
        )

    def words(self, texts: list[str]) -> Packed:
        """Ids of texts with [CLS] … [SEP]."""
        ids = self.tokenizer.clip_ids(texts, MAX_WORDS)
        return Packed(ids.rows.long(), ids.lengths)

    def batch(
        self,
        clips: list[Clip],
        texts: list[str],
        frames: int,
        generator: np.random.Generator,
        sampler: str = "headtail",
        grid: int = 8,
    ) -> FrameBatch:
        """Frames of these clips and a crop of each, with these texts."""
        drawn = generator if sampler in ("headtail", "random", "dense") else None
        pictures = [draw_frames(clip.video, clip.times(frames, sampler, drawn), generator) for clip in clips]
        crops = [random_crop_of_patches(grid, generator, patch=64 // grid) for _ in clips]
        words = self.words(texts)
        return FrameBatch(
            torch.from_numpy(np.stack(pictures)),
            words,
            torch.Generator().manual_seed(int(generator.integers(2**31))),
            torch.from_numpy(np.stack(crops)),
            labels=text_labels(torch.arange(len(texts)), words),
        )


def clips_of(video: KitchenVideo, config: KitchenConfig) -> list[Clip]:
    """The steps of a video during which something is said."""
    spoken = narrate(video, config)
    lines = list(zip(spoken["start"], spoken["end"], spoken["text"]))
    clips = []
    for step in video.steps:
        over = tuple(text for start, end, text in lines if start < step.end and end > step.start)
        if over or video.split == "test":
            clips.append(Clip(video, step, over))
    return clips


def shown(clip: Clip, entities: list[str], crop: np.ndarray, times: np.ndarray) -> np.ndarray:
    """bool [entities]: which of them a crop (pixels: top, left, height, width) shows.

    The place always; the vessel if the crop reaches below the table top's middle third; the ingredient if half of its
    drawn pixels are inside.
    """
    masks = ingredient_masks(clip.video, times)
    top, left, height, width = crop
    inside = masks[:, top : top + height, left : left + width].sum() / max(1, masks.sum())
    names: set[str] = set(PLACES[clip.step.place][0].spoken)
    if top + height > 52 and left < 42 and left + width > 22:
        names |= set(VESSELS[clip.step.vessel][0].spoken)
    if inside >= 0.5:
        names |= set(INGREDIENTS[clip.step.ingredient][0].spoken)
    return np.array([entity in names for entity in entities])


def start_small(model: ModuleT) -> ModuleT:
    """Weights for a narrow model: the published 0.02 is meant for a width of 768 and leaves 64 columns asleep."""
    for name, parameter in model.named_parameters():
        if name.endswith(("pos_embed", "time_embed", "cls_token")):
            nn.init.normal_(parameter, std=0.2)
        elif "_embeddings.weight" in name:
            nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim == 2 and "temporal_fc" not in name and "timeattn" not in name:
            nn.init.xavier_uniform_(parameter)
    return model
