"""S3D and X3D-S at their own sizes on one thread: the plain arrangement against the one that runs.

Plain: NCDHW memory order, BatchNorm in evaluation mode, no folding. Both under inference_mode, random weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from videoclip.encoders.s3d import S3D
from videoclip.encoders.x3d import VARIANTS, X3D


def best_time(run: Callable[[Tensor], Tensor], frames: Tensor, repeats: int) -> tuple[float, Tensor]:
    """Shortest time of some calls, in seconds, and what the last one gave."""
    output = run(frames)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        output = run(frames)
        times.append(time.perf_counter() - start)
    return min(times), output


def _make_plain(encoder: nn.Module) -> None:
    """NCDHW throughout: weights in plain order, and every block's input brought back to it."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


def main() -> None:
    """Print both times, their ratio and the largest relative difference of the outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x3d_size = VARIANTS["s"]
    cases: list[tuple[str, nn.Module, str, tuple[int, ...]]] = [
        ("S3D, 30 x 224 x 224", S3D(), "blocks", (1, 3, 30, 224, 224)),
        ("X3D-S, 13 x 182 x 182", X3D("s"), "pooled", (1, 3, x3d_size.frames, x3d_size.size, x3d_size.size)),
    ]
    for name, encoder, plain_name, shape in cases:
        plain_encoder = copy.deepcopy(encoder)
        _make_plain(plain_encoder)
        frames = torch.rand(shape)
        plain, fast = (
            getattr(plain_encoder, plain_name),
            encoder.mixed_5c_features if isinstance(encoder, S3D) else encoder,
        )
        with torch.inference_mode():
            plain_time, expected = best_time(plain, frames, options.repeats)
            fast_time, found = best_time(fast, frames.contiguous(memory_format=torch.channels_last_3d), options.repeats)
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        print(
            f"{name:24s} plain {plain_time:6.3f} s   folded, channels last {fast_time:6.3f} s   "
            f"ratio {plain_time / fast_time:5.2f}   difference {difference:.1e}"
        )


if __name__ == "__main__":
    main()
