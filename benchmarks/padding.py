"""A training step on concatenated pairs against the same step on padded ones, forward and backward, no optimiser.

Pairs have the published length distributions (3 to 32 seconds, 10 to 66 words). Padding is what the reference does:
every clip to 32 tokens and every text to 64 words, with the padding taking part in every layer.
"""

from __future__ import annotations

import argparse
import time

import torch

from videoclip.losses import contrastive_loss
from videoclip.model import VideoCLIP, VideoCLIPConfig


def step(model: VideoCLIP, video: tuple[torch.Tensor, torch.Tensor], text: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    model.zero_grad(set_to_none=True)
    contrastive_loss(model.embed_video(*video), model.embed_text(*text)).backward()
    return time.perf_counter() - start


def main() -> None:
    """Print both times and their ratio, the best of several interleaved runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = VideoCLIPConfig(
        width=options.width,
        layers=options.layers,
        heads=options.width // 64,
        intermediate=4 * options.width,
        dropout=0.0,
    )
    model = VideoCLIP(config)
    seconds = torch.randint(3, 33, (options.pairs,))
    words = torch.randint(10, 67, (options.pairs,))
    full_seconds, full_words = torch.full_like(seconds, 32), torch.full_like(words, 66)

    def video(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(int(lengths.sum()), config.video_dimension), lengths

    def text(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(1000, 30000, (int(lengths.sum()),)), lengths

    packed = padded = float("inf")
    for _ in range(options.repeats):
        packed = min(packed, step(model, video(seconds), text(words)))
        padded = min(padded, step(model, video(full_seconds), text(full_words)))
    print(f"padded to 32 seconds and 66 words: {padded:6.2f} s")
    print(f"concatenated:                      {packed:6.2f} s")
    print(f"ratio:                             {padded / packed:6.2f}")


if __name__ == "__main__":
    main()
