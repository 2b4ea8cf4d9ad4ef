"""Training pairs from shards of frames: captioned clips of videos, captioned pictures, and steps that mix the two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from videoclip.data.augmentation import augment_picture, augment_video
from videoclip.data.frame_shards import FrameShards
from videoclip.data.frames import FrameBatch, random_crop_of_patches
from videoclip.data.words import WordTokenizer
from videoclip.errors import InputError
from videoclip.retrieval.false_negatives import text_labels


class FramePairs:
    """Every caption of a folder of shards and the clip that it describes. `kind` is "image" if all videos are still."""

    def __init__(self, shards: FrameShards, tokenizer: WordTokenizer, max_words: int) -> None:
        """Raises InputError if there is no caption."""
        captions = [shards.captions(row) for row in range(len(shards))]
        self.shards = shards
        self.rows = np.repeat(np.arange(len(captions)), [len(of_video) for of_video in captions])
        self.spans = [span for of_video in captions for span in zip(of_video.start.tolist(), of_video.end.tolist())]
        texts = [text for of_video in captions for text in of_video.text]
        if not texts:
            raise InputError(f"{shards.folder}: holds no captions to train on; extract frames with --captions")
        self.words = tokenizer.clip_ids(texts, max_words)
        self.kind = "image" if all(shards.count(row) == 1 for row in range(len(shards))) else "video"

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.rows)

    def batch(
        self,
        chosen: np.ndarray,
        frames: int,
        sampler: str,
        generator: np.random.Generator,
        grid: int,
        augmented: bool = False,
    ) -> FrameBatch:
        """Pairs number `chosen`, int64 [B]: clips of `frames` frames as `sampler` chooses them, and a crop of each."""
        augment = augment_picture if self.kind == "image" else augment_video
        clips = []
        for number in chosen.tolist():
            start, end = self.spans[number]
            row = int(self.rows[number])
            whole = self.kind == "image" or end <= start
            span = {} if whole else {"start": start, "end": end}
            clip = self.shards.clip(row, frames, sampler, generator, **span)
            clips.append(augment(clip, generator) if augmented else clip)
        words = self.words.take(torch.from_numpy(chosen))
        patch = self.shards.size // grid
        return FrameBatch(
            torch.from_numpy(np.stack(clips)),
            words.to(words.rows.device, torch.int64),
            torch.Generator().manual_seed(int(generator.integers(2**62))),
            torch.from_numpy(np.stack([random_crop_of_patches(grid, generator, patch=patch) for _ in chosen])),
            self.kind,
            text_labels(torch.from_numpy(self.rows[chosen]), words),
        )


def mixed_steps(sizes: Sequence[int], batch: int, steps: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """For every step one of the collections, of `sizes` pairs, each as likely, and which of its pairs, int64 [B].

    Each collection is gone through in random order and begun anew when it ends, so that a small one is seen oftener.
    A batch is never larger than its collection.
    """
    generator = np.random.default_rng([seed, 5])
    left = [np.zeros(0, np.int64) for _ in sizes]
    for _ in range(steps):
        source = int(generator.integers(len(sizes)))
        wanted = min(batch, sizes[source])
        if len(left[source]) < wanted:
            left[source] = generator.permutation(sizes[source])
        yield source, left[source][:wanted]
        left[source] = left[source][wanted:]
