"""X3D (Feichtenhofer, CVPR 2020) as a frozen encoder of seconds, built by pytorchvideo.

The network is pytorchvideo's own. With published weights a token is read where the network has finished its
convolutions: the 432 channels after `blocks.5.pool.pre_act`, before the head pools them. We take their mean and
their maximum over time and space side by side (864 values): the mean is what the published head goes on with; the
maximum keeps short motions that a mean dilutes.

The `tiny` variant has random weights, and random depth only loses information: a linear probe on the embedded
corpus reads 43% of the actions and 22% of the vessels from its head, but 67% and 98% from the mean and maximum of
its four residual stages side by side (720 values). Its tokens are therefore those.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from videoclip.data.video import FrameFormat
from videoclip.encoders.folding import FoldedCopy
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.encoders.weights import load_checked, read_tensors
from videoclip.errors import InputError


@dataclass(frozen=True)
class X3DVariant:
    """Input of one X3D: `frames` frames, `stride` apart at `fps`, `size` pixels square; its depth; its token layer."""

    frames: int
    stride: int
    fps: int
    size: int
    depth_factor: float
    token_layer: str = "head"  # or "stages"


# Frames, strides and crops are those of pytorchvideo's hub page, there at 30 frames a second: a stride of 6 at 30 is
# every frame at 5. It names no crop for L; 312 is what its builder (`models/hub/x3d.py`) is given. `tiny` is ours:
# random weights at 64 pixels, for trying things without a download.
VARIANTS = {
    "tiny": X3DVariant(frames=8, stride=1, fps=8, size=64, depth_factor=1.0, token_layer="stages"),
    "xs": X3DVariant(frames=4, stride=2, fps=5, size=182, depth_factor=2.2),
    "s": X3DVariant(frames=13, stride=1, fps=5, size=182, depth_factor=2.2),
    "m": X3DVariant(frames=16, stride=1, fps=6, size=256, depth_factor=2.2),
    "l": X3DVariant(frames=16, stride=1, fps=6, size=312, depth_factor=5.0),
}
MEAN, STANDARD_DEVIATION = 0.45, 0.225  # of the published models, the same for all three colours


class X3D(VideoEncoder):
    """Frozen X3D: frames [B, 3, T, H, W] in [0, 1] -> tokens [B, 864] (`tiny`: [B, 720]).

    `weights` is a public file, `{"model_state": …}`, read with `weights_only=True`. Without it the weights are
    random from `seed`; call `calibrate` before using those.

    Raises InputError if the variant is unknown or the weights are of another architecture.
    """

    def __init__(self, variant: str = "s", weights: Path | str | None = None, seed: int = 0) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise InputError(f"X3D has no variant {variant!r}; choose one of {', '.join(VARIANTS)}")
        shape = VARIANTS[variant]
        self.name = f"x3d-{variant}"
        self.options = {"variant": variant}
        self.frame_format = FrameFormat(shape.fps, shape.size)
        self.frame_offsets = _centred_offsets(shape)
        self.clips_at_once = 8 if shape.size <= 64 else 1
        self._folded = FoldedCopy()
        network: Any = _build(shape, seed)
        if weights is not None:
            load_checked(network, read_tensors(Path(weights), "model_state"), Path(weights))
        self.stages = nn.ModuleList(network.blocks[:5])
        self.token_mean: Tensor
        self.token_scale: Tensor
        self.expansion: nn.Module | None = None
        widths = [stage.res_blocks[-1].branch2.conv_c.out_channels for stage in network.blocks[1:5]]
        if shape.token_layer == "head":
            head = network.blocks[5].pool
            self.expansion = nn.Sequential(head.pre_conv, head.pre_norm, head.pre_act)
            widths = [head.pre_conv.out_channels]
        self.dimension = 2 * sum(widths)
        # Identity until `calibrate` measures them: token = (pooled - token_mean) / token_scale.
        self.register_buffer("token_mean", torch.zeros(self.dimension))
        self.register_buffer("token_scale", torch.ones(self.dimension))
        self.requires_grad_(False).eval()
        nn.Module.to(self, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [0, 1] -> [B, dimension]."""
        network = self if self.training else self._folded.of(self)
        return (network.pooled(frames) - self.token_mean) / self.token_scale

    def pooled(self, frames: Tensor) -> Tensor:
        """The network as it stands: [B, 3, T, H, W] in [0, 1] -> [B, dimension], before standardisation."""
        x = (frames - MEAN) / STANDARD_DEVIATION
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        maps = maps[1:] if self.expansion is None else [self.expansion(x)]
        return torch.cat([pool for x in maps for pool in (x.mean((2, 3, 4)), x.amax((2, 3, 4)))], 1)

    @torch.no_grad()
    def calibrate(self, clips: np.ndarray, batch: int = 32) -> None:
        """Fit the BatchNorm statistics, then mean and scale of the tokens, to uint8 clips [N, T, H, W, 3].

        Random weights need this: with the statistics that they are born with, activations die within a few
        layers. Published weights have their own statistics and must not be calibrated.
        """
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm3d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average over all batches, instead of a moving one
            norm.train()
        for start in range(0, len(clips), batch):
            self.pooled(_to_unit_range(clips[start : start + batch]))
        for norm in norms:
            norm.eval()
        pooled = torch.cat(
            [self.pooled(_to_unit_range(clips[start : start + batch])) for start in range(0, len(clips), batch)]
        )
        self.token_mean.copy_(pooled.mean(0))
        self.token_scale.copy_(pooled.std(0).clamp_min(1e-6))


def _to_unit_range(clips: np.ndarray) -> Tensor:
    frames = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float().div_(255)
    return frames.contiguous(memory_format=torch.channels_last_3d)


def _centred_offsets(shape: X3DVariant) -> np.ndarray:
    """Frames of a clip whose middle is the middle of its second, counted from that second's first frame."""
    first = (shape.fps - (shape.frames - 1) * shape.stride - 1) / 2
    return np.floor(first).astype(np.int64) + shape.stride * np.arange(shape.frames)


def _build(shape: X3DVariant, seed: int) -> Any:
    create_x3d = import_x3d_builder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_x3d(
            input_clip_length=shape.frames,
            input_crop_size=max(shape.size, 32),
            depth_factor=shape.depth_factor,
        )


def import_x3d_builder() -> Callable[..., nn.Module]:
    """pytorchvideo's `create_x3d`, also where torchvision is absent or broken.

    pytorchvideo's heads import `torchvision.ops.RoIAlign` for detection, which X3D never uses. Where torchvision
    does not import, a stand-in module that raises on use takes its place during this import only; a working
    torchvision is left alone.
    """
    try:
        importlib.import_module("torchvision.ops")
    except (ImportError, RuntimeError, AttributeError):  # absent; or present, with operators of another torch
        pass
    else:
        from pytorchvideo.models.x3d import create_x3d

        return create_x3d
    broken = {name: sys.modules.pop(name) for name in _torchvision_modules()}
    stand_in, operators = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
    operators.RoIAlign = _MissingRoIAlign  # type: ignore[attr-defined]
    stand_in.ops = operators  # type: ignore[attr-defined]
    sys.modules.update({"torchvision": stand_in, "torchvision.ops": operators})
    try:
        from pytorchvideo.models.x3d import create_x3d
    finally:
        for name in _torchvision_modules():
            del sys.modules[name]
        sys.modules.update(broken)
    return create_x3d


class _MissingRoIAlign:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise ImportError("detection heads need a working torchvision; X3D does not")


def _torchvision_modules() -> Iterable[str]:
    return [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]
