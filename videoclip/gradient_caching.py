"""Large batches in little memory: a few pairs are embedded at a time, and all of them are contrasted.

Gradient accumulation would cut the negatives down to those of a part. Here every part is embedded twice: first to know
its embeddings alone, which is all that the loss needs, and again, with the same dropout, when their gradient is there.
(Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from videoclip.errors import InputError
from videoclip.packed import Packed

TOWERS = ("embed_video", "embed_text")  # the seam of a recipe


@contextmanager
def embedding_in_parts(recipe: nn.Module, pairs_at_once: int) -> Iterator[None]:
    """While the block runs, a recipe's towers embed at most so many sequences at a time; 0: all at once.

    For a recipe whose `forward` embeds by `embed_video` and `embed_text`, also inside DistributedDataParallel.
    Raises InputError at the end of the block if it has used neither: its memory would not have become less.
    """
    if not pairs_at_once:
        yield
        return
    module = recipe.module if isinstance(recipe, DistributedDataParallel) else recipe
    used: list[str] = []

    def shadow(name: str, tower: Callable[[Packed], Tensor]) -> Callable[[Packed], Tensor]:
        def embed(x: Packed) -> Tensor:
            used.append(name)
            return in_parts(tower, x, pairs_at_once, next(module.parameters()).device)

        return embed

    towers = {name: getattr(module, name) for name in TOWERS if hasattr(module, name)}
    for name, tower in towers.items():
        setattr(module, name, shadow(name, tower))  # on the instance, before the method of its class
    try:
        yield
    finally:
        for name in towers:
            delattr(module, name)
    if not used:
        raise InputError(
            f"--pairs-at-once: {type(module).__module__} does not embed its pairs by embed_video and embed_text; "
            "leave the option out, and use smaller batches or more workers"
        )


def in_parts(tower: Callable[[Packed], Tensor], x: Packed, size: int, device: torch.device) -> Tensor:
    """`tower(x)`, [B, H], from parts of at most `size` sequences, whose inner values are computed again for a gradient.

    Both times draw the same dropout. `x` is brought to `device` first: draws are only kept of devices that are seen.
    """
    if len(x) <= size:
        return tower(x)
    embedded = []
    for part in x.to(device).parts(size):

        def of_rows(rows: Tensor, part: Packed = part) -> Tensor:
            return tower(part.with_rows(rows))

        embedded.append(checkpoint(of_rows, part.rows, use_reentrant=False))
    return torch.cat(embedded)
