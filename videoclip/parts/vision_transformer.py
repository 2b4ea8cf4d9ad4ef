"""A space-time vision transformer with the public names: frames in, one token a patch and a few special ones out.

One module stands for ViT and DeiT (one frame), TimeSformer (joint, divided or space-only attention), VideoMAE (joint,
tubelets, no [CLS]) and Frozen in Time's towers. Parameters are called as timm and the TimeSformer release call them;
`vision_weights.py` holds the one table of renames for files that call them otherwise.

Shapes in comments: B clips, T frames (after tubelets), N patches a frame, K of them visible, C special tokens,
W width, h heads, d = W / h.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.errors import InputError
from videoclip.parts.vision_blocks import Block, DividedBlock, FrozenBlock, VisionShape

__all__ = ["Seen", "VisionShape", "VisionTransformer"]


@dataclass(frozen=True)
class Seen:
    """What a vision transformer made of a batch of clips.

    `special`: [B, C, W]; one set for every frame, [B, T, C, W], with space-only attention. `patches`: [B, T, K, W].
    `cls_attention`: [B, T', keys] where it was asked for: how much [CLS] looks at each patch in the last block, mean
    over heads, special tokens left out; T' = T with keys = K if frames are attended one by one, else T' = 1 with
    keys = T K.
    """

    special: Tensor
    patches: Tensor
    cls_attention: Tensor | None = None


class PatchEmbed(nn.Module):
    """Pixels of a patch (or tubelet) to one token; a convolution by name, one matrix product in truth."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.patch, self.tubelet = shape.patch, shape.tubelet
        kernel = (shape.patch, shape.patch)
        if shape.tubelet > 1:
            self.proj: nn.Module = nn.Conv3d(3, shape.width, (shape.tubelet, *kernel), (shape.tubelet, *kernel))
        else:
            self.proj = nn.Conv2d(3, shape.width, kernel, kernel)

    def forward(self, frames: Tensor, visible: Tensor | None) -> Tensor:
        """[B, F, 3, S, S] -> [B, T, K, W]; only the places `visible` [B, T, K] are looked at, where it is given."""
        p, t = self.patch, self.tubelet
        cut = frames.unflatten(1, (-1, t)).unflatten(4, (-1, p)).unflatten(6, (-1, p))  # [B, T, t, 3, y, p, x, p]
        cut = cut.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(2, 3)  # [B, T, N, 3 t p p]
        if visible is not None:
            cut = cut.gather(2, visible[..., None].expand(-1, -1, -1, cut.shape[-1]))
        weight, bias = self.proj.weight, self.proj.bias
        assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
        return F.linear(cut, weight.flatten(1), bias)


class VisionTransformer(nn.Module):
    """Clips of frames to tokens. `shape` says all."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.shape = shape
        steps = shape.frames // shape.tubelet
        if shape.special:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        if shape.special > 1:
            self.dist_token = nn.Parameter(torch.zeros(1, shape.special - 1, shape.width))
        if shape.positions == "sinusoid":
            self.register_buffer("pos_embed", sinusoids(steps * shape.places, shape.width), persistent=False)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, shape.special + shape.places, shape.width))
            if shape.attention != "space":
                self.time_embed = nn.Parameter(torch.zeros(1, steps, shape.width))
        self.patch_embed = PatchEmbed(shape)
        block = {"divided": DividedBlock, "frozen": FrozenBlock}.get(shape.attention, Block)
        depths = [shape.drop_path * i / max(1, shape.layers - 1) for i in range(shape.layers)]
        self.blocks = nn.ModuleList(block(shape, depth) for depth in depths)
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)
        self._initialise()

    def _initialise(self) -> None:
        """As the releases do: a new model does not look through time before training makes it."""
        for name, parameter in self.named_parameters():
            if name in ("cls_token", "dist_token", "pos_embed") or (parameter.ndim == 2 and name.startswith("blocks")):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.startswith("blocks") and name.endswith("bias"):
                nn.init.zeros_(parameter)
        for block in self.blocks:
            if isinstance(block, DividedBlock):
                nn.init.zeros_(block.temporal_fc.weight)
            if isinstance(block, FrozenBlock):
                nn.init.zeros_(block.timeattn.qkv.weight)
                nn.init.ones_(block.timeattn.proj.weight)  # zero times zero would not learn

    def forward(
        self, frames: Tensor, visible: Tensor | None = None, present: Tensor | None = None, cls_attention: bool = False
    ) -> Seen:
        """`frames` float [B, F, 3, S, S], normalised.

        `visible` int64 [B, T, K] or [B, K] (tubes: the same in every frame): the places, 0 to N - 1 row by row, that
        are looked at; only they are computed. `present` bool [B, T], false on frames that are padding.
        Raises InputError if frames have another size than the model's, are more than it has time for, or if divided
        attention is given other places in different frames.
        """
        steps = self._check(frames, present)
        places = self._places(visible, len(frames), steps)
        x = self.patch_embed(frames, places)  # [B, T, K, W]
        groups = (steps, x.shape[2])
        x = self._with_positions(x, places)  # [B, C + T K, W], or [B T, C + K, W] frame by frame
        mask = None if present is None else present[:, :, None].expand(-1, -1, groups[1])
        if self.shape.attention == "space":
            groups, mask = (1, groups[1]), None  # a padded frame is alone and is left out by whoever reads it
        attention = None
        for number, block in enumerate(cast("Iterable[Block]", self.blocks)):
            if cls_attention and number == len(self.blocks) - 1:
                attention = block.cls_attention(x, groups, mask)
            x = block(x, groups, mask)
        return self._seen(self.norm(x), len(frames), steps, attention)

    def _seen(self, x: Tensor, clips: int, steps: int, attention: Tensor | None) -> Seen:
        special = self.shape.special
        if self.shape.attention == "space":
            x = x.unflatten(0, (clips, steps))  # [B, T, C + K, W]
            attention = None if attention is None else attention.flatten(0, 1).unflatten(0, (clips, steps))
            return Seen(x[:, :, :special], x[:, :, special:], attention)
        return Seen(x[:, :special], x[:, special:].unflatten(1, (steps, -1)), attention)

    def _check(self, frames: Tensor, present: Tensor | None) -> int:
        shape = self.shape
        if frames.ndim != 5 or frames.shape[2] != 3 or not frames.is_floating_point():
            raise InputError(
                f"frames must be floats [clips, frames, 3, {shape.size}, {shape.size}], not {describe(frames)}"
            )
        if frames.shape[3:] != (shape.size, shape.size):
            height, width = frames.shape[3:]
            raise InputError(f"frames of {height} x {width} pixels; this model reads {shape.size} x {shape.size}")
        if not 1 <= frames.shape[1] <= shape.frames or frames.shape[1] % shape.tubelet:
            raise InputError(
                f"clips of {frames.shape[1]} frames; this model has time embeddings for {shape.frames}"
                + (f", in tubelets of {shape.tubelet}" if shape.tubelet > 1 else "")
            )
        steps = frames.shape[1] // shape.tubelet
        if present is not None and (present.shape != (len(frames), steps) or not present.any(1).all()):
            raise InputError(f"present must be bool [{len(frames)}, {steps}] and show at least one frame of every clip")
        return steps

    def _places(self, visible: Tensor | None, clips: int, steps: int) -> Tensor | None:
        """int64 [B, T, K]."""
        if visible is None:
            return None
        visible = visible[:, None].expand(-1, steps, -1) if visible.ndim == 2 else visible
        if visible.shape[:2] != (clips, steps) or not 0 <= int(visible.min()) <= int(visible.max()) < self.shape.places:
            raise InputError(f"visible must hold places 0 to {self.shape.places - 1} of {clips} x {steps} frames")
        if self.shape.attention in ("divided", "frozen") and bool((visible != visible[:, :1]).any()):
            raise InputError("divided attention follows a place through time: keep the same places in every frame")
        return visible

    def _with_positions(self, x: Tensor, places: Tensor | None) -> Tensor:
        """Tokens [B, T, K, W] with their places and times added, special tokens before them."""
        clips, steps = x.shape[:2]
        shape = self.shape
        if shape.positions == "sinusoid":
            where = self.pos_embed.unflatten(1, (-1, shape.places))[:, :steps]  # [1, T, N, W]
            return self._joined(x + self._chosen(where, places, clips, steps), clips)
        x = x + self._chosen(self.pos_embed[:, None, shape.special :].expand(-1, steps, -1, -1), places, clips, steps)
        if shape.attention == "space":
            x = x.flatten(0, 1)
            return torch.cat([self._special(len(x)), x], 1)
        return self._joined(x + self._times(steps)[:, :, None], clips)

    def _joined(self, x: Tensor, clips: int) -> Tensor:
        x = x.flatten(1, 2)
        return torch.cat([self._special(clips), x], 1) if self.shape.special else x

    def _special(self, rows: int) -> Tensor:
        tokens = torch.cat([self.cls_token, self.dist_token], 1) if self.shape.special > 1 else self.cls_token
        return (tokens + self.pos_embed[:, : self.shape.special]).expand(rows, -1, -1)

    @staticmethod
    def _chosen(where: Tensor, places: Tensor | None, clips: int, steps: int) -> Tensor:
        """Of embeddings [1, T, N, W] those of the visible places."""
        if places is None:
            return where
        return where.expand(clips, -1, -1, -1).gather(2, places[..., None].expand(-1, -1, -1, where.shape[-1]))

    def _times(self, steps: int) -> Tensor:
        """[1, T, W]. With fewer frames the first ones in Frozen in Time, else the nearest, as in TimeSformer."""
        if self.shape.attention == "frozen" or steps == self.time_embed.shape[1]:
            return self.time_embed[:, :steps]
        return F.interpolate(self.time_embed.transpose(1, 2), size=steps, mode="nearest").transpose(1, 2)


def sinusoids(rows: int, width: int) -> Tensor:
    """[1, rows, W]: VideoMAE's fixed positions, sines in even and cosines in odd columns."""
    rate = torch.pow(10000.0, -2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    angle = torch.arange(rows, dtype=torch.float64)[:, None] * rate
    return torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos()).float()[None]


def describe(tensor: Tensor) -> str:
    """Type and shape, for an error's line."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
