"""The twin test: does a model see time? Two actions share every still picture and differ in order and pace alone.

On the cooking channel actions come in such pairs. A model is asked which of two captions belongs to a held-out clip:
its own, or the same with the twin's verb. A single frame cannot tell: chance, 50%, is all that it may reach. Frozen in
Time and ALPRO's towers (contrast alone) are trained with one frame and with several neighbouring ones, 8 a second.
Every clip stands beside its twin in the batches of training too: else ingredients, vessels and places tell a batch
apart, and there is nothing to look at time for.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from alpro_data import Clip, Corpus, start_small
from torch import nn

from videoclip.data.frames import FrameBatch
from videoclip.parts.pixels import normalised
from videoclip.parts.towers import TowersShape
from videoclip.parts.vision_transformer import VisionShape
from videoclip.recipes import alpro, frozen_in_time
from videoclip.synthetic.kitchen import caption
from videoclip.synthetic.kitchen.vocabulary import WRITTEN
from videoclip.training import OptimizerConfig, learning_rate_at, make_optimizer, step
from videoclip.transformer import TransformerShape

SYSTEMS = ("Frozen in Time", "ALPRO's towers")


def build(system: str, frames: int, vocabulary: int, width: int) -> nn.Module:
    """Three space-time and two text layers."""
    attention = "frozen" if system == SYSTEMS[0] else "divided"
    vision = VisionShape(64, 16, 1, frames, width, 3, width // 32, 4 * width, attention)
    text = TransformerShape(width, width // 32, 4 * width, 2, 0.0, 64)
    if system == SYSTEMS[0]:
        return frozen_in_time.Recipe(
            frozen_in_time.FrozenInTimeConfig(vision, text, vocabulary, 64, 0.05, ((0, frames),))
        )
    return alpro.Recipe(alpro.AlproConfig(TowersShape(vision, text, 2, vocabulary, 64), ("vtc",), 0))


def train(model: nn.Module, corpus: Corpus, frames: int, steps: int, pairs: int, seed: int) -> None:
    """On written captions, each clip with its own: narrators talk about something else too often for so few steps."""
    config = OptimizerConfig(1e-3, (0.9, 0.98), max(1, steps // 10), 20.0)
    optimizer = make_optimizer(model, config)
    generator = np.random.default_rng([seed, 8])
    model.train()
    for number in range(steps):
        clips = [corpus.train[i] for i in generator.choice(len(corpus.train), pairs // 2, replace=False)]
        chosen = [clip for one in clips for clip in (one, twin_of(one))]
        texts = [caption(clip.step, WRITTEN[generator.integers(2)]) for clip in chosen]
        batch = corpus.batch(chosen, texts, frames, generator, "dense", 4)
        step(model, optimizer, batch, learning_rate_at(number, steps, config), config.clip_norm)
    model.eval()


@torch.no_grad()
def judge(model: nn.Module, corpus: Corpus, frames: int, windows: int = 2) -> tuple[float, float]:
    """Percent of clips nearer to their own caption than to the twin's, over several windows; and R@1 of the originals.

    Every held-out clip is judged beside its twin: the same video but for the action of this step. What a model knows
    of recipes, or likes of verbs, helps with one of the two and harms with the other.
    """
    pairs = [corpus.test, [twin_of(clip) for clip in corpus.test]]
    texts = [model.embed_text(corpus.words([caption(clip.step) for clip in clips])) for clips in pairs]
    right, found = [], []
    for window in range(windows):
        for side, clips in enumerate(pairs):
            generator = np.random.default_rng([3, window])
            batch: FrameBatch = corpus.batch(clips, [""] * len(clips), frames, generator, "dense", 4)
            video = model.video_features(normalised(batch.frames))
            right.append(((video * texts[side]).sum(1) > (video * texts[1 - side]).sum(1)).float().mean())
            if side == 0:
                found.append(((texts[0] @ video.T).argmax(1) == torch.arange(len(clips))).float().mean())
    return 100 * float(torch.stack(right).mean()), 100 * float(torch.stack(found).mean())


def twin_of(clip: Clip) -> Clip:
    """The same clip with the action that shares its pictures (actions stand in pairs), in a video that shows it."""
    step = replace(clip.step, action=clip.step.action ^ 1)
    steps = tuple(step if other == clip.step else other for other in clip.video.steps)
    return Clip(replace(clip.video, steps=steps), step, ())


def main() -> None:
    """Print the table as it stands in docs/systems.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpora = [Corpus(seed) for seed in range(options.seeds)]
    for system in SYSTEMS:
        for frames in options.frames:
            scores = []
            for seed, corpus in enumerate(corpora):
                torch.manual_seed(seed)
                model = start_small(build(system, frames, corpus.tokenizer.vocabulary, options.width))
                train(model, corpus, frames, options.steps, options.pairs, seed)
                scores.append(judge(model, corpus, frames))
            twins, recall = np.array(scores).T
            spread = [values.std(ddof=1) if len(values) > 1 else 0.0 for values in (twins, recall)]
            cells = (f"{twins.mean():.1f} ± {spread[0]:.1f}", f"{recall.mean():.1f} ± {spread[1]:.1f}")
            print(f"| {system} | {frames} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
