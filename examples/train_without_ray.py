"""Train on a folder of shards and look for a sentence, with the library alone: no Ray, no run folder, no command.

python examples/train_without_ray.py runs/demo/tokens/train "the carrot is sliced in the pan"
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from videoclip.checkpoints import TrainingState
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.shards import Shards
from videoclip.data.words import train_wordpiece
from videoclip.embedding import embed_seconds, embed_texts, embed_videos
from videoclip.recipes import videoclip
from videoclip.retrieval import BatchOptions, make_clustering
from videoclip.training import EpochBatches, OptimizerConfig, make_optimizer, spread_batches, train_epoch


def main(folder: Path, query: str, epochs: int = 3) -> tuple[str, int]:
    """Train on the captions in `folder`; returns the id and the second of the best answer to `query`."""
    torch.manual_seed(0)
    shards = Shards(folder)
    tokenizer = train_wordpiece((text for video in shards for text in video.captions.text), vocabulary=1000)
    clips = ClipConfig(clips_per_video=8, min_words=4, max_words=32, max_seconds=20)
    sampler = ClipSampler(shards, tokenizer, clips, cache=folder)
    options = videoclip.Options(width=64, layers=2, heads=4, max_seconds=clips.max_seconds, max_words=clips.max_words)
    model = videoclip.build(options, shards.manifest, tokenizer)
    schedule = OptimizerConfig(learning_rate=1e-3, warmup_steps=20)
    optimizer, state, rows = make_optimizer(model, schedule), TrainingState(), sampler.usable_rows()
    while state.epoch < epochs:
        embeddings = embed_videos(model, sampler, rows, seed=0, epoch=state.epoch)
        batches = make_clustering(embeddings, BatchOptions(videos_per_batch=16), state.epoch, rows).batches
        drawn = EpochBatches(sampler, spread_batches(batches), seed=0, epoch=state.epoch)
        for step, figures in train_epoch(model, optimizer, drawn, state, epochs * len(batches), schedule):
            print(f"step {step}: loss {figures['loss']:.2f}, accuracy {figures['accuracy']:.2f}")
    text = embed_texts(model.eval(), [query])[0]
    curves = [embed_seconds(model, video.tokens) @ text for video in shards]
    best = int(np.argmax([curve.max() for curve in curves]))
    return shards.video_ids()[best], int(curves[best].argmax())


if __name__ == "__main__":
    found, second = main(Path(sys.argv[1]), sys.argv[2])
    print(f"{found} at second {second}")
