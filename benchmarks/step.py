"""A training step against padding, against what its FLOPs cost at this machine's own matrix speed, and its memory.

One step: forward and backward of VideoCLIP over pairs with the published length distributions (3 to 32 seconds, 10 to
66 words); no optimiser. FLOPs are those of its matrix products: 2 a weight and row, 4 a pair of rows and width in
attention, and twice as many backward. The machine's speed is that of a layer's products alone, those of the backward
pass too, on as many rows as the texts have; the quickest of them, the feed-forward layer's first, is told beside it.
Everything is measured in turns, the best of several; on a CPU in seconds of its own time, so that other work there does
not count, except for the caches that it takes.

Padding is what the reference does: every clip to 32 tokens and every text to 66 words, with the padding taking part in
every layer. Slices are what `Packed.by_run` would be without `split`: each costs a zero gradient of full size.
`--memory` instead measures one worker's loss among 64: 512 own pairs, 768 wide, against 32,768.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from videoclip.gradient_caching import in_parts
from videoclip.losses import contrastive_loss
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.packed import Packed
from videoclip.parts.pairs import Pairs

FULL = 32, 66  # tokens of a padded clip, words of a padded text, special ones included


@dataclass(frozen=True)
class Setting:
    """Where and how steps are computed."""

    device: torch.device
    half: bool
    parts: int

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call: a CPU's own time, or a GPU's wall time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            return time.perf_counter() - start
        start = time.process_time()
        work()
        return time.process_time() - start


def step(model: VideoCLIP, video: Packed, text: Packed, setting: Setting) -> None:
    """One forward and backward pass."""
    model.zero_grad(set_to_none=True)
    half = torch.autocast(setting.device.type, torch.bfloat16) if setting.half else nullcontext()
    with half:
        if setting.parts:
            of_video = in_parts(model.embed_video, video, setting.parts, setting.device)
            of_text = in_parts(model.embed_text, text, setting.parts, setting.device)
        else:
            of_video, of_text = model.embed_video(video), model.embed_text(text)
    contrastive_loss(of_video.float(), of_text.float()).backward()


def flops(model: VideoCLIP, video: Packed, text: Packed) -> float:
    """Of the matrix products of one step; the loss's own are too few to count."""
    config = model.config
    of_layer = 4 * config.width**2 + 2 * config.width * config.intermediate  # weights that every row meets
    forward = 0.0
    for lengths, layers in ((video.lengths + 2, layers_of(config, "video")), (text.lengths, layers_of(config, "text"))):
        rows, squares = int(lengths.sum()), int((lengths**2).sum())
        forward += layers * (2 * rows * of_layer + 4 * squares * config.width)
    of_mlp = config.video_dimension * config.width + config.width**2
    return 3 * (forward + 2 * int(video.lengths.sum()) * of_mlp)


def layers_of(config: VideoCLIPConfig, side: str) -> int:
    """Of one side's transformer."""
    return config.video_layers if (config.transformer, side) == ("separate", "video") else config.layers


def matrix_speeds(rows: int, config: VideoCLIPConfig, setting: Setting) -> tuple[float, float]:
    """FLOP/s of this machine in a layer's matrix products, forward and backward, and in the quickest of them."""
    dtype = torch.bfloat16 if setting.half else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=setting.device, dtype=dtype)

    width, intermediate = config.width, config.intermediate
    total, seconds, quickest = 0.0, 0.0, 0.0
    for inputs, outputs, times in ((width, width, 4), (width, intermediate, 1), (intermediate, width, 1)):
        x, weight, gradient = random(rows, inputs), random(outputs, inputs), random(rows, outputs)
        products = (lambda: x @ weight.T), (lambda: gradient @ weight), (lambda: gradient.T @ x)  # noqa: B023
        for product in products:
            took = min(setting.seconds(product) for _ in range(3))
            needed = 2 * rows * inputs * outputs
            total, seconds, quickest = total + times * needed, seconds + times * took, max(quickest, needed / took)
    return total / seconds, quickest


@contextmanager
def slices() -> Iterator[None]:
    """Runs of equal length as slices while the block runs."""

    def by_run(packed: Packed) -> list[Tensor]:
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


def measure(model: VideoCLIP, pairs: int, repeats: int, setting: Setting) -> None:
    """Print times and ratios for so many pairs, the best of several interleaved runs."""
    width = model.config.video_dimension
    seconds, words = torch.randint(3, 33, (pairs,)), torch.randint(10, 67, (pairs,))
    video, padded_video = (
        Packed(torch.randn(int(lengths.sum()), width, device=setting.device), lengths)
        for lengths in (seconds, torch.full_like(seconds, FULL[0]))
    )
    text, padded_text = (
        Packed(torch.randint(1000, 30000, (int(lengths.sum()),), device=setting.device), lengths)
        for lengths in (words, torch.full_like(words, FULL[1]))
    )
    packed = padded = sliced = float("inf")
    speeds, needed, of_padded = (0.0, 0.0), flops(model, video, text), flops(model, padded_video, padded_text)
    for _ in range(repeats):
        packed = min(packed, setting.seconds(lambda: step(model, video, text, setting)))
        padded = min(padded, setting.seconds(lambda: step(model, padded_video, padded_text, setting)))
        speeds = max(speeds, matrix_speeds(int(words.sum()), model.config, setting))
        if setting.device.type == "cpu":  # a GPU has one kernel for all lengths, and no runs
            with slices():
                sliced = min(sliced, setting.seconds(lambda: step(model, video, text, setting)))
    print(
        f"{pairs} pairs: packed {packed:.2f} s, padded {padded:.2f} s: {padded / packed:.2f} times,"
        f" with {of_padded / needed:.2f} times the FLOPs",
        end="",
    )
    print(f", packed with slices {sliced:.2f} s ({sliced / packed:.2f} times)" if sliced < float("inf") else "")
    alone, quickest = speeds
    print(
        f"  {needed / 1e9:.0f} GFLOP: {needed / packed / 1e9:.1f} GFLOP/s, its matrix products alone {alone / 1e9:.1f}"
        f" ({100 * needed / packed / alone:.0f}%): {packed * alone / needed:.2f} times what the FLOPs cost;"
        f" {packed * quickest / needed:.2f} times at the quickest product's {quickest / 1e9:.1f}"
    )


# --- Memory of the loss -------------------------------------------------------------------------------------------


def loss_of_worker(workers: int, own: int, width: int) -> None:
    """Forward and backward of one worker's loss among so many, with stand-ins for what the others send."""
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1).requires_grad_()

    labels = torch.arange(workers * own)[:, None].expand(-1, 3).contiguous()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pairs = Pairs(unit(own), unit(own), unit(workers * own), unit(workers * own), 0, labels[:own], labels)

    def of_block(block: Pairs) -> Tensor:
        gathered = block.all_video, block.all_text
        return contrastive_loss(block.video, block.text, 0.05, gathered, block.rank_offset, block.excluded)

    pairs.mean(of_block).backward()
    pairs.figures()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    gathered = 4 * 2 * workers * own * width * 4  # both sides and their gradients; once more while they are summed
    print(f"{workers:7d}{own:7d}{workers * own:9d}{peak / 1024:11.0f} MB{gathered / 2**20 / 2:13.0f} MB", flush=True)


def memory(options: argparse.Namespace) -> None:
    """Print the peak memory of a worker's loss for several numbers of workers, each in a process of its own."""
    print(f"{'workers':>7s}{'own':>7s}{'all':>9s}{'peak':>14s}{'embeddings':>16s}", flush=True)
    for workers in (1, 4, 16, 64):
        words = [sys.executable, __file__, "--one-loss", str(workers), "--width", str(options.width)]
        subprocess.run(words, check=True)


def main() -> None:
    """Measure each number of pairs, or the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[32])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--pairs-at-once", type=int, default=0)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one-loss", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.one_loss:
        loss_of_worker(options.one_loss, 512, options.width)
        return
    if options.memory:
        memory(options)
        return
    config = VideoCLIPConfig(
        width=options.width,
        layers=options.layers,
        heads=max(1, options.width // 64),
        intermediate=4 * options.width,
        dropout=0.0,
    )
    setting = Setting(torch.device(options.device), options.bfloat16, options.pairs_at_once)
    model = VideoCLIP(config).to(setting.device).train()
    for pairs in options.pairs:
        measure(model, pairs, options.repeats, setting)


if __name__ == "__main__":
    main()
