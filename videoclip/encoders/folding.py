"""The fast arrangement of a frozen convolutional network: folded BatchNorm, channels last, flat convolutions.

The network that is saved, fingerprinted and loaded keeps its published form. What runs is a copy, made when it is
first needed and again when a weight has changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class FoldedCopy:
    """Keeps the folded copy of one module up to date."""

    def __init__(self) -> None:
        self._state: tuple[Any, ...] = ()
        self._copy: nn.Module | None = None

    def of(self, module: nn.Module) -> Any:
        """The folded, channels-last copy of `module`, which must be in evaluation mode."""
        tensors = [*module.parameters(), *module.buffers()]
        state = tuple((tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device) for tensor in tensors)
        if self._copy is None or state != self._state:
            with torch.inference_mode(False), torch.no_grad():
                self._copy, self._state = _fold(module), state
        return self._copy

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedCopy:
        return FoldedCopy()  # a copy of the module has weights of its own


class FlatConv(nn.Module):
    """A 3D convolution over space alone, over time alone or over channels alone, as the matrix product or the 2D
    convolution that it is.

    In channels-last order these are views of the same memory, and PyTorch's 2D kernels are far better than its 3D
    ones, which on a CPU often fall back to copying patches out (`slow_conv3d`).
    """

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.kernel, self.groups = conv.kernel_size, conv.groups
        self.stride, self.padding = conv.stride, tuple(int(side) for side in conv.padding)
        self.bias = conv.bias
        weight = conv.weight
        if self.kernel == (1, 1, 1):
            weight = weight.flatten(1)
        elif self.kernel[0] == 1:
            weight = weight[:, :, 0].contiguous(memory_format=torch.channels_last)
        else:
            weight = weight[:, :, :, 0].contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)

    @staticmethod
    def serves(conv: nn.Conv3d) -> bool:
        """Whether the kernel is flat, and time is not strided where space is convolved (or the other way round)."""
        t, h, w = conv.kernel_size
        if conv.kernel_size == (1, 1, 1):
            return conv.groups == 1 and conv.padding == (0, 0, 0)
        if isinstance(conv.padding, str) or (t > 1 and any(conv.padding[1:])) or (t == 1 and conv.padding[0]):
            return False
        return (t == 1 and conv.stride[0] == 1) or (h == w == 1 and conv.stride[1] == conv.stride[2] == 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, T, H, W] -> [B, outputs, T', H', W'], as the convolution that this stands for."""
        rows = x.permute(0, 2, 3, 4, 1)  # [B, T, H, W, C], contiguous where x is channels-last
        if self.kernel == (1, 1, 1):
            rows = rows[:, :: self.stride[0], :: self.stride[1], :: self.stride[2]]
            return F.linear(rows, self.weight, self.bias).permute(0, 4, 1, 2, 3)
        batch, time, height, width, _ = rows.shape
        if self.kernel[0] == 1:
            flat = rows.flatten(0, 1).permute(0, 3, 1, 2)  # [B * T, C, H, W]
            y = F.conv2d(flat, self.weight, self.bias, self.stride[1:], self.padding[1:], groups=self.groups)
            return y.permute(0, 2, 3, 1).unflatten(0, (batch, time)).permute(0, 4, 1, 2, 3)
        flat = rows.flatten(2, 3).permute(0, 3, 1, 2)  # [B, C, T, H * W]
        strides, paddings = (self.stride[0], 1), (self.padding[0], 0)
        y = F.conv2d(flat, self.weight, self.bias, strides, paddings, groups=self.groups)
        return y.permute(0, 2, 3, 1).unflatten(2, (height, width)).permute(0, 4, 1, 2, 3)


def _fold(module: nn.Module) -> nn.Module:
    folded = copy.deepcopy(module)
    for parent, convolution, norm in _pairs(folded):
        holder, name = parent, norm
        if isinstance(getattr(parent, norm), nn.Sequential):  # X3D's norm_b: BatchNorm, then squeeze-and-excitation
            holder, name = getattr(parent, norm), "0"
        batch_norm = getattr(holder, name)
        setattr(parent, convolution, fuse_conv_bn_eval(getattr(parent, convolution), batch_norm))
        setattr(holder, name, nn.Identity())
    nn.Module.to(folded, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    for parent in list(folded.modules()):
        if isinstance(parent, nn.ReLU):
            parent.inplace = True
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv3d) and FlatConv.serves(child):
                setattr(parent, name, FlatConv(child))
    return folded.requires_grad_(False).eval()


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Every convolution that a BatchNorm follows, by the names that S3D and pytorchvideo's X3D give them."""
    names = (
        ("conv1", "bn1"), ("conv2", "bn2"),  # S3D
        ("conv_a", "norm_a"), ("conv_b", "norm_b"), ("conv_c", "norm_c"), ("branch1_conv", "branch1_norm"),  # X3D
        ("pre_conv", "pre_norm"),
    )  # fmt: skip
    for parent in list(module.modules()):
        for convolution, norm in names:
            if not isinstance(getattr(parent, convolution, None), nn.Conv3d):
                continue
            follower = getattr(parent, norm, None)
            first = follower[0] if isinstance(follower, nn.Sequential) else follower
            if isinstance(first, nn.BatchNorm3d):
                yield parent, convolution, norm
