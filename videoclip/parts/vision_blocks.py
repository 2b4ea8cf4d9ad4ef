"""Blocks of a space-time vision transformer: joint, divided (TimeSformer's) and Frozen in Time's.

Shapes in comments: B clips, T frames (after tubelets), N patches a frame, K of them visible, C special tokens,
W width, h heads, d = W / h, G groups that are attended one by one, n tokens in each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.errors import InputError

ATTENTIONS = ("divided", "joint", "space", "frozen")


@dataclass(frozen=True)
class VisionShape:
    """What decides the parameters of a vision transformer. The defaults are TimeSformer's base model."""

    size: int = 224
    """Height and width of a frame, pixels."""
    patch: int = 16
    tubelet: int = 1
    """Frames that one patch reaches over: 2 in VideoMAE."""
    frames: int = 4
    """Most frames of a clip."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    attention: str = "divided"
    """"divided": TimeSformer's, time then space, both added to what came before; "frozen": Frozen in Time's, the space
    residual added to the block's input and [CLS] looking at every frame; "joint": all with all; "space": frame by
    frame."""
    special: int = 1
    """Special tokens: 0 in VideoMAE, 1 ([CLS]), 2 in a distilled DeiT."""
    positions: str = "learned"
    """"learned": a place and a time embedding; "sinusoid": VideoMAE's table over all patches of all frames."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; grows linearly from 0."""
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise InputError(f"attention must be one of {', '.join(ATTENTIONS)}, not {self.attention!r}")
        if self.positions not in ("learned", "sinusoid"):
            raise InputError(f"positions must be learned or sinusoid, not {self.positions!r}")
        if self.size % self.patch or self.width % self.heads or self.frames % self.tubelet:
            raise InputError(
                f"frames of {self.size} pixels in patches of {self.patch}, width {self.width} in {self.heads} heads, "
                f"{self.frames} frames in tubelets of {self.tubelet}: each must divide evenly"
            )
        if self.attention in ("divided", "frozen") and self.special < 1:
            raise InputError(f"{self.attention} attention needs a [CLS] token")

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.size // self.patch

    @property
    def places(self) -> int:
        """Patches of a frame, N."""
        return self.grid**2


class SpaceAttention(nn.Module):
    """timm's attention: one matrix for queries, keys and values."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[G, n, W] -> query, key and value, [G, h, n, d] each, views of one tensor."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[G, n, W] -> [G, n, W]. `mask`, bool [G, n], is false where a key is padding."""
        query, key, value = self.split(x)
        return self.proj(merged(F.scaled_dot_product_attention(query, key, value, key_mask(mask))))

    def first_row(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[G, n]: how the first token of each group looks at all n, mean over heads."""
        query, key, _ = self.split(x)
        scores = (query[:, :, :1] @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).squeeze(2)  # [G, h, n]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -math.inf)
        return scores.softmax(-1).mean(1)


def merged(heads: Tensor) -> Tensor:
    """[G, h, n, d] -> [G, n, h d]."""
    return heads.transpose(1, 2).flatten(2)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """bool [G, n] -> [G, 1, n, n] for attention. Padding looks at itself, so that its softmax is never empty."""
    if mask is None:
        return None
    return mask[:, None, None, :] | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)


class FrozenAttention(SpaceAttention):
    """Frozen in Time's: special tokens look at everything, a patch at the special tokens and its own group."""

    def in_groups(self, x: Tensor, special: int, groups: tuple[int, int], time: bool, mask: Tensor | None) -> Tensor:
        """[B, C + T K, W] -> the same. `groups` = (T, K); `time`: a group is a place in all frames, else a frame."""
        query, key, value = self.split(x)
        seen = None if mask is None else F.pad(mask.flatten(1), (special, 0), value=True)  # [B, C + T K]
        keys = None if seen is None else seen[:, None, None, :]
        first = F.scaled_dot_product_attention(query[:, :, :special], key, value, keys)  # [B, h, C, d]

        def grouped(t: Tensor) -> Tensor:  # [B, h, T K, d] -> [B T, h, K, d], or [B K, h, T, d]
            t = t[:, :, special:].unflatten(2, groups)
            return t.permute(0, 3, 1, 2, 4).flatten(0, 1) if time else t.permute(0, 2, 1, 3, 4).flatten(0, 1)

        def with_special(t: Tensor) -> Tensor:
            count = groups[1] if time else groups[0]
            return torch.cat([t[:, :, :special].repeat_interleave(count, 0), grouped(t)], 2)

        inside = None
        if mask is not None:
            of_group = (mask.transpose(1, 2) if time else mask).flatten(0, 1)  # [groups, n]
            allowed = of_group[:, None, :] | torch.eye(of_group.shape[1], dtype=torch.bool, device=x.device)
            inside = F.pad(allowed, (special, 0), value=True)[:, None]
        rest = F.scaled_dot_product_attention(grouped(query), with_special(key), with_special(value), inside)
        rest = rest.unflatten(0, (len(x), -1))  # [B, K, h, T, d], or [B, T, h, K, d]
        rest = rest.permute(0, 3, 1, 2, 4) if time else rest.permute(0, 1, 3, 2, 4)  # [B, T, K, h, d]
        return self.proj(torch.cat([merged(first), rest.flatten(3).flatten(1, 2)], 1))


class Mlp(nn.Module):
    """The wide half of a block."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.intermediate)
        self.fc2 = nn.Linear(shape.intermediate, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm block on [B, C + T K, W], frame after frame; joint attention, and the one frame of space-only."""

    def __init__(self, shape: VisionShape, drop_path: float) -> None:
        super().__init__()
        self.special, self.drop_path = shape.special, drop_path
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.attn = SpaceAttention(shape)
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, groups: tuple[int, int], mask: Tensor | None) -> Tensor:
        """`groups` = (T, K); `mask` bool [B, T, K], false on padding."""
        seen = None if mask is None else F.pad(mask.flatten(1), (self.special, 0), value=True)
        x = x + self.dropped(self.attn(self.norm1(x), seen))
        return x + self.dropped(self.mlp(self.norm2(x)))

    def dropped(self, branch: Tensor) -> Tensor:
        """Stochastic depth: the whole branch of some rows [G, …] is left out in training."""
        if not self.training or not self.drop_path:
            return branch
        keep = torch.rand(len(branch), *[1] * (branch.ndim - 1), device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)

    def cls_attention(self, x: Tensor, groups: tuple[int, int], mask: Tensor | None) -> Tensor:
        """[B, 1, T K] of this block's input."""
        seen = None if mask is None else F.pad(mask.flatten(1), (self.special, 0), value=True)
        return self.attn.first_row(self.norm1(x), seen)[:, None, self.special :]


class DividedBlock(Block):
    """TimeSformer's: every patch through its frames, then every frame, [CLS] averaged over the frames' results."""

    def __init__(self, shape: VisionShape, drop_path: float) -> None:
        super().__init__(shape, drop_path)
        self.temporal_norm1 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.temporal_attn = SpaceAttention(shape)
        self.temporal_fc = nn.Linear(shape.width, shape.width)

    def through_time(self, x: Tensor, groups: tuple[int, int], mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[CLS] [B, C, W], the patches after time attention [B, T, K, W], and both as frames [B T, C + K, W]."""
        # Split, not sliced: the gradient of a slice is a whole tensor of zeros.
        cls, patches = x.split([self.special, groups[0] * groups[1]], 1)
        patches = patches.unflatten(1, groups)  # [B, T, K, W]
        places = self.temporal_norm1(patches.transpose(1, 2)).flatten(0, 1)  # [B K, T, W]
        time = None if mask is None else mask.transpose(1, 2).flatten(0, 1)
        # Stochastic depth comes before temporal_fc, place by place, as in the release.
        moved = self.temporal_fc(self.dropped(self.temporal_attn(places, time)))
        patches = patches + moved.unflatten(0, (len(x), -1)).transpose(1, 2)
        frames = torch.cat([cls[:, None].expand(-1, groups[0], -1, -1), patches], 2).flatten(0, 1)
        return cls, patches, frames

    def forward(self, x: Tensor, groups: tuple[int, int], mask: Tensor | None) -> Tensor:
        cls, patches, frames = self.through_time(x, groups, mask)
        seen = None if mask is None else F.pad(mask.flatten(0, 1), (self.special, 0), value=True)
        branch = self.dropped(self.attn(self.norm1(frames), seen)).unflatten(0, (len(x), -1))  # [B, T, C + K, W]
        of_cls, of_patches = branch.split([self.special, groups[1]], 2)
        cls = cls + mean_of_frames(of_cls, mask)
        x = torch.cat([cls, (patches + of_patches).flatten(1, 2)], 1)
        return x + self.dropped(self.mlp(self.norm2(x)))

    def cls_attention(self, x: Tensor, groups: tuple[int, int], mask: Tensor | None) -> Tensor:
        """[B, T, K] of this block's input: [CLS] looks at every frame by itself."""
        _, _, frames = self.through_time(x, groups, mask)
        seen = None if mask is None else F.pad(mask.flatten(0, 1), (self.special, 0), value=True)
        return self.attn.first_row(self.norm1(frames), seen).unflatten(0, (len(x), -1))[:, :, self.special :]


class FrozenBlock(Block):
    """Frozen in Time's: what space attention finds is added to the block's input, not to the result of time."""

    def __init__(self, shape: VisionShape, drop_path: float) -> None:
        super().__init__(shape, drop_path)
        self.attn: FrozenAttention = FrozenAttention(shape)
        self.timeattn = FrozenAttention(shape)
        self.norm3 = nn.LayerNorm(shape.width, eps=shape.eps)

    def through_time(self, x: Tensor, groups: tuple[int, int], mask: Tensor | None) -> Tensor:
        return x + self.timeattn.in_groups(self.norm3(x), self.special, groups, True, mask)

    def forward(self, x: Tensor, groups: tuple[int, int], mask: Tensor | None) -> Tensor:
        timed = self.through_time(x, groups, mask)
        x = x + self.dropped(self.attn.in_groups(self.norm1(timed), self.special, groups, False, mask))
        return x + self.dropped(self.mlp(self.norm2(x)))

    def cls_attention(self, x: Tensor, groups: tuple[int, int], mask: Tensor | None) -> Tensor:
        return super().cls_attention(self.through_time(x, groups, mask), groups, mask)


def mean_of_frames(x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, …] -> [B, …], over the frames of which `mask`, bool [B, T, K], shows anything."""
    if mask is None:
        return x.mean(1)
    share = mask.any(2).to(x.dtype)
    share = share / share.sum(1, keepdim=True)
    return (x * share[(...,) + (None,) * (x.ndim - 2)]).sum(1)
