"""The fast arrangement of a frozen convolutional network: BatchNorm folded into convolutions, channels last.

The network that is saved, fingerprinted and loaded keeps its published form. What runs is a copy, made when it is
first needed and again when a weight has changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
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
