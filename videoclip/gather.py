"""Rows of all workers that train together, with and without gradient; one process alone is a world of one.

Contrastive losses compare every pair with those of all workers. Workers may bring different numbers of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from videoclip.packed import Packed

SCATTERING = ("nccl", "gloo")  # backends that sum and scatter at once; with others whole gradients are summed


def world_size() -> int:
    """Number of workers that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def rows_per_rank(rows: int) -> list[int]:
    """How many rows each worker has, in rank order, given that this one has `rows`. A collective call."""
    if world_size() == 1:
        return [rows]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([rows], device=device))
    return [int(count) for count in counts]


def rank_offset(counts: Sequence[int]) -> int:
    """Where this worker's rows start among those of all workers, of which there are `counts` in rank order."""
    return sum(counts[: rank()])


def gather_with_gradient(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenate `rows` [P, …] of all workers, in rank order, so that gradients flow back to each of them.

    Who knows the `counts` (`rows_per_rank`) beforehand gives them, and spares a call to all workers.
    Without a process group the rows come back as they are.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, list(counts or rows_per_rank(len(rows))))  # type: ignore[no-untyped-call]
    return gathered


def gather(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenate `rows` [P, …] of all workers, in rank order, without gradients; `counts` as above."""
    return rows if world_size() == 1 else _all_gather(rows, counts or rows_per_rank(len(rows)))


def mean_over_workers(values: Tensor, rows: int, counts: Sequence[int]) -> Tensor:
    """float [K]: each worker's means over its own `rows` become the mean over the rows of all workers."""
    if world_size() == 1:
        return values
    total = values.double() * rows
    dist.all_reduce(total)
    return (total / sum(counts)).to(values.dtype)


def gather_packed(x: Packed, counts: Sequence[int]) -> Packed:
    """The sequences of all workers, which bring `counts` of them, in rank order; gradients flow back to each."""
    if world_size() == 1:
        return x
    lengths = gather(x.lengths.to(x.rows.device), counts).cpu()
    rows = [int(of_rank.sum()) for of_rank in lengths.split(list(counts))]
    return Packed(gather_with_gradient(x.rows, rows), lengths)


def mean_over_all(total: Tensor, elements: int, counts: Sequence[int]) -> Tensor:
    """A mean over elements that pairs have unequally many of, such as hidden words, for a loss of the engine's.

    `total`: this worker's sum over its `elements`; `counts`: the pairs of every worker. The engine takes the mean of
    losses over pairs; what is returned makes that the mean over the elements of all workers. A collective call.
    """
    everywhere = int(gather(torch.tensor([elements], device=total.device), [1] * world_size()).sum())
    return total * (sum(counts) / (counts[rank()] * max(1, everywhere)))


def shared_generator(device: torch.device) -> torch.Generator:
    """A generator on the CPU that draws the same on all workers, seeded from the first's global one. A collective call.

    What is drawn by it for all pairs and taken by a pair's number does not depend on which worker holds the pair.
    """
    seed = gather(torch.randint(2**62, (1,)).to(device), [1] * world_size())[0]
    return torch.Generator().manual_seed(int(seed))


def _all_gather(rows: Tensor, counts: Sequence[int]) -> Tensor:
    if len(set(counts)) == 1:  # straight to its place: the rows of all workers are held once, not twice
        gathered = rows.new_empty(sum(counts), *rows.shape[1:])
        dist.all_gather(list(gathered.split(list(counts))), rows.contiguous())
        return gathered
    padded = rows.new_zeros(max(counts), *rows.shape[1:])  # collectives want equal shapes
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


class _Counts(Protocol):
    counts: list[int]


class _Gather(torch.autograd.Function):
    """all_gather forward; backward every worker gets the sum of all gradients of its own rows."""

    @staticmethod
    def forward(context: _Counts, rows: Tensor, counts: list[int]) -> Tensor:
        context.counts = counts
        return _all_gather(rows, counts)

    @staticmethod
    def backward(context: _Counts, gradient: Tensor) -> tuple[Tensor, None]:
        parts = gradient.contiguous().split(context.counts)
        if dist.get_backend() in SCATTERING:
            own = torch.empty_like(parts[rank()])
            dist.reduce_scatter(own, list(parts))
            return own, None
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.split(context.counts)[rank()], None
