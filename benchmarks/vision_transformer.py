"""A step of our vision transformer against transformers' TimesformerModel and against the machine's matrix speed.

ViT-B/16 with divided attention on clips of 4 x 224 x 224, forward and backward, float32. Both models hold the same
weights and their outputs are compared first. "Its FLOPs" are those of its matrix products (linear layers and
attention), three times the forward's; the machine's speed is that of the products of the linear layers' own shapes.
Seconds are those of the processor, so that other programs count little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import TimesformerConfig, TimesformerModel

from videoclip.parts.vision_transformer import VisionShape, VisionTransformer
from videoclip.parts.vision_weights import renamed


def flops(shape: VisionShape, clips: int) -> float:
    """Floating-point operations of one forward pass: the matrix products alone."""
    places, frames, width = shape.places, shape.frames, shape.width
    tokens = clips * frames * places
    spatial = clips * frames * (places + 1)
    linear = tokens * 5 * width**2 + spatial * 4 * width**2 + (tokens + clips) * 2 * width * shape.intermediate
    attention = 2 * width * (tokens * frames + spatial * (places + 1))
    embedding = tokens * 3 * shape.patch**2 * width
    return 2.0 * (shape.layers * (linear + attention) + embedding)


def matrix_speed(shape: VisionShape, clips: int) -> float:
    """Seconds for one floating-point operation in the products of the MLP and of queries, keys and values."""
    rows = clips * shape.frames * shape.places
    best = float("inf")
    for _ in range(4):
        spent = done = 0.0
        for wide in (3 * shape.width, shape.intermediate):
            x, weight = torch.randn(rows, shape.width), torch.randn(wide, shape.width)
            out = torch.empty(rows, wide)
            start = time.process_time()
            for _ in range(3):
                torch.mm(x, weight.T, out=out)
            spent += time.process_time() - start
            done += 3 * 2.0 * rows * wide * shape.width
        best = min(best, spent / done)
    return best


def seconds(model: torch.nn.Module, run: Callable[[], Tensor]) -> float:
    """One forward and backward pass, seconds of the processor."""
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    run().square().mean().backward()
    return time.process_time() - start


def main() -> None:
    """Print times of interleaved runs, their best, and the two ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    theirs = TimesformerModel(TimesformerConfig(num_frames=4))
    shape = VisionShape()
    ours = VisionTransformer(shape)
    ours.load_state_dict(renamed(theirs.state_dict()))
    frames = torch.randn(options.clips, 4, 3, 224, 224)
    with torch.no_grad():
        expected, seen = theirs(frames).last_hidden_state, ours(frames)
        difference = (seen.special[:, 0] - expected[:, 0]).abs().max() / expected[:, 0].abs().max()

    best = {"ours": float("inf"), "transformers": float("inf")}
    runs = {
        "ours": (ours, lambda: whole(ours, frames)),
        "transformers": (theirs, lambda: theirs(frames).last_hidden_state),
    }
    for _ in range(options.repeats):
        for name, (model, run) in runs.items():
            best[name] = min(best[name], seconds(model, run))
    ideal = 3 * flops(shape, options.clips) * matrix_speed(shape, options.clips)
    print(f"largest difference of the outputs:  {difference:.1e} (relative)")
    print(f"transformers' TimesformerModel:     {best['transformers']:6.2f} s")
    print(f"ours:                               {best['ours']:6.2f} s")
    print(f"its FLOPs at the matrix speed:      {ideal:6.2f} s ({3 * flops(shape, options.clips) / 1e9:.0f} GFLOP)")
    print(f"transformers / ours:                {best['transformers'] / best['ours']:6.2f}")
    print(f"ours / its FLOPs:                   {best['ours'] / ideal:6.2f}")


def whole(model: VisionTransformer, frames: Tensor) -> Tensor:
    """All tokens, so that the backward pass begins at each of them, as in the other model."""
    seen = model(frames)
    return torch.cat([seen.special, seen.patches.flatten(1, 2)], 1)


if __name__ == "__main__":
    main()
