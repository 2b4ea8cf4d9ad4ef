"""Runs of frames of the kitchen's steps, and a frozen dual encoder of single frames, for `benchmarks/prompting.py`.

Only what a clip may be cut from is drawn: 3 seconds of every step. So there are steps enough that a model which sees
order and pace cannot know them all by their looks instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from videoclip.data.words import train_wordpiece
from videoclip.files import write_arrays
from videoclip.losses import contrastive_loss
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.packed import Packed
from videoclip.synthetic.kitchen import KitchenConfig, KitchenVideo, narrate, plan_kitchen
from videoclip.synthetic.kitchen.pictures import FPS, draw_frames

KEPT = 24  # frames of a step
WIDTH, PICTURE_WIDTH = 128, 256  # of embeddings and of described pictures
PAIRS_A_STEP, WORDS = 128, 48  # of the dual encoder's training


@dataclass(frozen=True)
class Steps:
    """Of one split: `frames` float16 [S, KEPT, D], neighbours in time; `action`, `ingredient` int64 [S]; `said`: the
    lines of the narrator that overlap each."""

    frames: np.ndarray
    action: np.ndarray
    ingredient: np.ndarray
    said: list[list[str]]


class PictureNetwork(nn.Module):
    """Random convolutions over one picture, and where in the picture they answered: uint8 [N, 64, 64, 3] -> [N, D]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(8)
        )
        self.projection = nn.Linear(32 * 64, PICTURE_WIDTH, bias=False)

    @torch.inference_mode()
    def forward(self, pictures: np.ndarray) -> np.ndarray:
        """Described one by one: nothing of time is inside."""
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        return self.projection(self.layers(x).flatten(1)).numpy()


def kitchen_steps(seed: int, videos: int, folder: Path) -> dict[str, Steps]:
    """Both splits of one corpus; features already in `folder` are used again."""
    config = KitchenConfig(seed=seed, train_videos=videos)
    planned = plan_kitchen(config)
    path = folder / f"frames-{seed}-{videos}.npz"
    if not path.exists():
        network = PictureNetwork(seed)
        drawn = {video.video_id: _draw(video, network) for video in planned}
        known = np.concatenate([drawn[video.video_id].reshape(-1, PICTURE_WIDTH) for video in planned[:videos]])
        mean, deviation = known.mean(0), known.std(0) + 1e-6
        write_arrays(path, **{name: ((rows - mean) / deviation).astype(np.float16) for name, rows in drawn.items()})
    stored = np.load(path)
    return {split: _steps([v for v in planned if v.split == split], stored, config) for split in ("train", "test")}


def _draw(video: KitchenVideo, network: PictureNetwork) -> np.ndarray:
    """float32 [steps, KEPT, D]."""
    generator = np.random.default_rng([video.seed, 6])
    times = []
    for step in video.steps:
        first, last = int(np.ceil(step.start * FPS)), int(np.ceil(step.end * FPS))  # frames first to last - 1
        times.append((generator.integers(first, last - KEPT + 1) + np.arange(KEPT)) / FPS)
    return network(draw_frames(video, np.concatenate(times), generator)).reshape(-1, KEPT, PICTURE_WIDTH)


def _steps(videos: list[KitchenVideo], stored: dict[str, np.ndarray], config: KitchenConfig) -> Steps:
    said = []
    for video in videos:
        lines = narrate(video, config)
        for step in video.steps:
            told = zip(lines["start"], lines["end"], lines["text"])
            said.append([text for start, end, text in told if start < step.end and end > step.start])
    steps = [step for video in videos for step in video.steps]
    return Steps(
        np.concatenate([stored[video.video_id] for video in videos]),
        np.array([step.action for step in steps]),
        np.array([step.ingredient for step in steps]),
        said,
    )


def dual_encoder(train: Steps, names: list[str], seed: int, steps: int) -> VideoCLIP:
    """A VideoCLIP of (one frame, one to four lines of the narrator), frozen afterwards; it also knows `names`."""
    texts = [text for lines in train.said for text in lines]
    tokenizer = train_wordpiece([*texts, *names], 600)
    torch.manual_seed(seed)
    config = VideoCLIPConfig(
        video_dimension=PICTURE_WIDTH, width=WIDTH, layers=2, video_layers=1, heads=4, intermediate=4 * WIDTH,
        transformer="separate", vocabulary=tokenizer.vocabulary, positions=64, max_seconds=1, max_words=WORDS,
        cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id, dropout=0.0,
    )  # fmt: skip
    model = VideoCLIP(config)
    model.frozen.tokenizer = tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    generator = np.random.default_rng([seed, 7])
    told = np.array([step for step, lines in enumerate(train.said) if lines])
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (number + 1) / 50) * (1 - number / steps)
        chosen = generator.choice(told, PAIRS_A_STEP)
        frames = torch.from_numpy(train.frames[chosen, generator.integers(KEPT, size=PAIRS_A_STEP)])
        lines = []
        for step in chosen:
            first = generator.integers(len(train.said[step]))
            lines.append(" ".join(train.said[step][first : first + generator.integers(1, 5)]))
        video = model.embed_video(Packed(frames, torch.ones(PAIRS_A_STEP, dtype=torch.int64)))
        text = model.embed_text(tokenizer.clip_ids(lines, WORDS))
        optimizer.zero_grad()
        contrastive_loss(video, text, model.temperature).backward()
        optimizer.step()
        model.after_step()
    return model.requires_grad_(False).eval()
