"""A training step on packed pairs against padded ones, and views of runs by one split against slices.

Forward and backward, no optimiser. Pairs have the published length distributions (3 to 32 seconds, 10 to 66 words).
Padding is what the reference does: every clip to 32 tokens and every text to 64 words, with the padding taking part in
every layer. Slices are what `Packed.by_run` would be without `split`: each costs a zero gradient of full size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from videoclip.losses import contrastive_loss
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.packed import Packed


def step(model: VideoCLIP, video: Packed, text: Packed) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    model.zero_grad(set_to_none=True)
    contrastive_loss(model.embed_video(video), model.embed_text(text)).backward()
    return time.perf_counter() - start


@contextmanager
def slices() -> Iterator[None]:
    """Runs of equal length as slices while the block runs."""

    def by_run(packed: Packed) -> list[torch.Tensor]:
        views, row = [], 0
        for count, length in packed.runs:
            views.append(packed.rows[row : row + count * length].unflatten(0, (count, length)))
            row += count * length
        return views

    original = Packed.by_run
    Packed.by_run = by_run  # type: ignore[method-assign]
    try:
        yield
    finally:
        Packed.by_run = original  # type: ignore[method-assign]


def clips(lengths: torch.Tensor, width: int) -> Packed:
    """Random tokens."""
    return Packed(torch.randn(int(lengths.sum()), width), lengths)


def texts(lengths: torch.Tensor) -> Packed:
    """Random words."""
    return Packed(torch.randint(1000, 30000, (int(lengths.sum()),)), lengths)


def measure(model: VideoCLIP, pairs: int, repeats: int) -> None:
    """Print times and ratios for so many pairs, the best of several interleaved runs."""
    seconds, words = torch.randint(3, 33, (pairs,)), torch.randint(10, 67, (pairs,))
    full_seconds, full_words = torch.full_like(seconds, 32), torch.full_like(words, 66)
    width = model.config.video_dimension
    packed = padded = sliced = float("inf")
    for _ in range(repeats):
        packed = min(packed, step(model, clips(seconds, width), texts(words)))
        padded = min(padded, step(model, clips(full_seconds, width), texts(full_words)))
        with slices():
            sliced = min(sliced, step(model, clips(seconds, width), texts(words)))
    print(f"{pairs} pairs: packed {packed:.2f} s, padded {padded:.2f} s ({padded / packed:.2f} times), ", end="")
    print(f"packed with slices {sliced:.2f} s ({sliced / packed:.2f} times)")


def main() -> None:
    """Measure each number of pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[32])
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
        heads=max(1, options.width // 64),
        intermediate=4 * options.width,
        dropout=0.0,
    )
    model = VideoCLIP(config)
    for pairs in options.pairs:
        measure(model, pairs, options.repeats)


if __name__ == "__main__":
    main()
