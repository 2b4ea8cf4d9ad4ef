"""The contrastive loss of VideoCLIP (section 3.1): symmetric InfoNCE over all pairs of a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    video: Tensor,
    text: Tensor,
    temperature: Tensor | float = 1.0,
    gathered: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
    excluded: Tensor | None = None,
) -> Tensor:
    """Cross-entropy(video -> text) + cross-entropy(text -> video), summed and not halved, as the release has it.

    `video`, `text`: float [P, H], row p of each being a positive pair; every other row is a negative. With several
    workers `gathered` holds the rows of all of them, [W * P, H] each, and this worker's start at row `first`.
    `excluded`, bool [P, W * P], marks pairs that are no negatives of each other and so are left out.
    Returns the mean over the P rows, a scalar.
    """
    all_video, all_text = gathered or (video, text)
    target = torch.arange(first, first + len(video), device=video.device)
    video_to_text = (video @ all_text.T / temperature).float()
    text_to_video = (text @ all_video.T / temperature).float()
    if excluded is not None:
        video_to_text = video_to_text.masked_fill(excluded, float("-inf"))
        text_to_video = text_to_video.masked_fill(excluded, float("-inf"))
    return F.cross_entropy(video_to_text, target) + F.cross_entropy(text_to_video, target)


def world_size() -> int:
    """Number of workers that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first_row(rows: int, counts: list[int] | None = None) -> int:
    """Where this worker's `rows` rows start among those of all workers."""
    return sum((counts or rows_of_workers(rows))[: dist.get_rank()]) if world_size() > 1 else 0


def gather_with_gradient(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """Concatenate `rows` [P, H] of all workers, in rank order, so that gradients flow back to each of them.

    Workers may bring different numbers of rows; who gathers more than once a step asks for the `counts` beforehand.
    Without a process group the rows come back as they are.
    """
    return rows if world_size() == 1 else _Gather.apply(rows, counts or rows_of_workers(len(rows)))


def gather(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """Concatenate `rows` [P, …] of all workers, in rank order, without gradients; `counts` as above."""
    return rows if world_size() == 1 else _all_gather(rows, counts or rows_of_workers(len(rows)))


def rows_of_workers(rows: int) -> list[int]:
    """How many rows each worker has, in rank order, given that this one has `rows`. A collective call."""
    if world_size() == 1:
        return [rows]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([rows], device=device))
    return [int(count) for count in counts]


def _all_gather(rows: Tensor, counts: list[int]) -> Tensor:
    padded = rows.new_zeros(max(counts), *rows.shape[1:])  # collectives want equal shapes
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts)])


class _Gather(torch.autograd.Function):
    """all_gather forward, sum of all workers' gradients backward (all_reduce: gloo has no reduce_scatter)."""

    @staticmethod
    def forward(context: Any, rows: Tensor, counts: list[int]) -> Tensor:
        context.counts = counts
        return _all_gather(rows, context.counts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.split(context.counts)[dist.get_rank()], None
