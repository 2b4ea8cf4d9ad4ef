"""How many overlapping pairs a second come out of shards, against drawing them one by one as the paper's code does.

Shards of 390-second videos with 110 captions each, tokens 512 wide; 32 videos x 16 clips a batch; one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from videoclip.data.captions import Captions
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.shards import Manifest, Shards, ShardWriter, VideoRecord
from videoclip.data.words import train_wordpiece

SECONDS, CAPTIONS, WIDTH = 390, 110, 512
WORDS = [
    "so",
    "now",
    "we",
    "take",
    "the",
    "onion",
    "and",
    "cut",
    "it",
    "into",
    "small",
    "even",
    "pieces",
    "then",
    "heat",
]


def write_shards(folder: Path, videos: int) -> Shards:
    """Random tokens and narration of the published lengths."""
    generator = np.random.default_rng(0)
    writer = ShardWriter(folder, Manifest("random", "0" * 64, WIDTH), videos_per_part=64)
    for number in range(videos):
        start = np.sort(generator.uniform(0, SECONDS - 4, CAPTIONS)).astype(np.float32)
        text = [" ".join(generator.choice(WORDS, generator.integers(4, 13))) for _ in range(CAPTIONS)]
        captions = Captions(start, start + 3.5, text)
        tokens = generator.standard_normal((SECONDS, WIDTH), dtype=np.float32).astype(np.float16)
        writer.add(VideoRecord(f"video_{number}", SECONDS, tokens, captions))
    writer.close()
    return Shards(folder)


def one_by_one(shards: Shards, sampler: ClipSampler, rows: np.ndarray, generator: np.random.Generator) -> int:
    """The same pairs drawn by a Python loop, tokenised beforehand and padded to 32 seconds and 64 words."""
    config = sampler.config
    videos, texts = [], []
    for row in rows:
        part, inside = shards.locate(int(row))
        reader, (ids, offsets) = shards.parts[part], sampler._words.parts[part]
        first, last = reader.caption_offsets[inside : inside + 2]
        tokens = reader.tokens(inside)
        for _ in range(config.clips_per_video):
            i = j = int(generator.integers(first, last))
            budget = int(generator.integers(config.min_words, config.max_words + 1))
            while offsets[j + 1] - offsets[i] < budget and (i > first or j < last - 1):
                if generator.random() < 0.5 and j < last - 1:
                    j += 1
                elif i > first:
                    i -= 1
            centre = int(generator.uniform(reader.caption_start[i], reader.caption_end[j]))
            length = int(generator.integers(config.min_seconds, config.max_seconds + 1))
            a = max(0, min(centre - length // 2, len(tokens) - length))
            video = np.zeros((config.max_seconds, WIDTH), np.float32)
            clip = tokens[a : a + length]
            video[: len(clip)] = clip
            text = np.zeros(config.max_words + 2, np.int64)
            words = ids[offsets[i] : offsets[j + 1]][: config.max_words]
            text[: len(words) + 2] = [sampler.cls_id, *words, sampler.sep_id]
            videos.append(video)
            texts.append(text)
    np.stack(videos), np.stack(texts)
    return len(videos)


def rate(draw: object, batches: list[np.ndarray]) -> float:
    """Pairs a second."""
    generator = np.random.default_rng(1)
    start, pairs = time.perf_counter(), 0
    for rows in batches:
        pairs += draw(rows, generator)  # type: ignore[operator]
    return pairs / (time.perf_counter() - start)


def main() -> None:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=512)
    parser.add_argument("--batches", type=int, default=150)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder) / "shards", options.videos)
        tokenizer = train_wordpiece(WORDS)
        sampler = ClipSampler(shards, tokenizer, ClipConfig(), Path(folder))
        generator = np.random.default_rng(2)
        batches = [generator.choice(options.videos, 32, replace=False) for _ in range(options.batches)]
        rate(lambda rows, g: len(sampler.batch(rows, g).video), batches[:20])  # touch the pages once
        ours = rate(lambda rows, g: len(sampler.batch(rows, g).video), batches)
        loop = rate(lambda rows, g: one_by_one(shards, sampler, rows, g), batches[: max(1, options.batches // 5)])
    print(f"one by one, padded:      {loop:8.0f} pairs/s")
    print(f"together, concatenated:  {ours:8.0f} pairs/s")
    print(f"ratio:                   {ours / loop:8.1f}")


if __name__ == "__main__":
    main()
