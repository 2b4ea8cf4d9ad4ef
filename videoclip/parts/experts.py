"""Collaborative experts and mixtures of embedding experts: a clip as several pretrained features, a text as one.

Every expert is one frozen feature of a clip (what objects, which motion, what sounds); any may be missing. A text
weighs the experts by itself and is compared with each in a space of its own (Liu et al., BMVC 2019; Miech et al.,
2018). Names of parameters are those of the public release, so that its checkpoints load without a map.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.packed import Packed

NO_PARTNER = 1e-11  # keeps a missing expert's mask at zero instead of 0 / 0


class NetVLAD(nn.Module):
    """Rows of a sequence, softly assigned to clusters, and what is left of them about each cluster's centre.

    Sequences [n, d] -> [B, d * clusters], of unit length. `ghosts` further clusters take rows that say nothing.
    A sequence's rows are exactly those given: who pads with zeros, as the release does, gives the zeros too, and they
    count like any other row. A sequence without rows becomes zero.
    """

    def __init__(self, width: int, clusters: int, ghosts: int = 0) -> None:
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(width, clusters + ghosts) / math.sqrt(width))
        self.clusters2 = nn.Parameter(torch.randn(1, width, clusters) / math.sqrt(width))
        self.batch_norm = nn.BatchNorm1d(clusters + ghosts)

    def forward(self, x: Packed) -> Tensor:
        """Sequences, rows [N, d] -> [B, d * clusters]."""
        assignment = self.batch_norm(x.rows @ self.clusters).softmax(1)  # (N, K + G)
        assignment = assignment[:, : self.clusters2.shape[2]]  # (N, K): ghosts are dropped, nothing is rescaled
        rows, _ = x.padded()  # (B, n, d)
        shares, _ = x.with_rows(assignment).padded()  # (B, n, K), zero where a sequence has ended: adds nothing
        residuals = rows.mT @ shares - shares.sum(1, keepdim=True) * self.clusters2  # (B, d, K)
        return F.normalize(F.normalize(residuals, dim=1).flatten(1))


class ContextGate(nn.Module):
    """Scales every column of [B, d] by a sigmoid of all of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.batch_norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, d] -> [B, d]."""
        return x * self.batch_norm(self.fc(x)).sigmoid()


class GatedUnit(nn.Module):
    """[B, width] -> [B, outputs], projected, gated by itself, of unit length."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, outputs)
        self.cg = ContextGate(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width] -> [B, outputs]."""
        return F.normalize(self.cg(self.fc(x)))


class Reduction(nn.Module):
    """[B, width] -> [B, outputs] of unit length."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width] -> [B, outputs]."""
        return F.normalize(self.fc(x))


class MaskedGate(ContextGate):
    """A gate that also listens to `mask` [B, d], what the other experts say of this one."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.batch_norm2 = nn.BatchNorm1d(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """Both [B, d] -> [B, d]."""
        return x * (self.batch_norm(mask) + self.batch_norm2(self.fc(x))).sigmoid()


class CollaborativeUnit(nn.Module):
    """One expert [B, d] gated by the others, of unit length."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cg = MaskedGate(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Both [B, d] -> [B, d]."""
        return F.normalize(self.cg(x, mask))


class ExpertTowers(nn.Module):
    """Both sides of the comparison: experts of clips and pooled texts to one unit vector an expert, and weights.

    `widths` of the experts as they come in and `outputs` of their spaces, in the sorted order of their names.
    With `collaborative` all outputs are one width, and the experts gate each other (CE); else each stands for itself
    (MoEE).
    """

    def __init__(
        self, widths: tuple[int, ...], outputs: tuple[int, ...], text_width: int, collaborative: bool = True
    ) -> None:
        super().__init__()
        self.collaborative = collaborative
        self.moe_fc = nn.Linear(text_width, len(widths))
        self.text_GU = nn.ModuleList(GatedUnit(text_width, output) for output in outputs)
        if not collaborative:
            self.video_GU = nn.ModuleList(GatedUnit(*sizes) for sizes in zip(widths, outputs))
            return
        width = outputs[0]
        self.video_dim_reduce = nn.ModuleList(Reduction(*sizes) for sizes in zip(widths, outputs))
        self.video_GU = nn.ModuleList(CollaborativeUnit(width) for _ in widths)
        self.g_reason_1 = nn.Linear(2 * width, width)
        self.g_reason_shared = nn.Sequential(
            *(nn.BatchNorm1d(width), nn.Mish(), nn.Linear(width, width)),
            *(nn.BatchNorm1d(width), nn.Mish(), nn.Linear(width, width)),
        )

    def clips(self, experts: list[Tensor], present: Tensor) -> list[Tensor]:
        """Experts [V, width_m], zero where they are missing, and which are there, float [V, M] -> units [V, d_m]."""
        if not self.collaborative:
            return [unit(expert) for unit, expert in zip(self.video_GU, experts)]
        units = [reduction(expert) for reduction, expert in zip(self.video_dim_reduce, experts)]
        for m, gate in enumerate(self.video_GU):
            # At once and in order: expert m + 1 is gated by the already gated experts before it, and by itself.
            units[m] = gate(units[m], self._mask(units, present, m))
        return units

    def _mask(self, units: list[Tensor], present: Tensor, m: int) -> Tensor:
        """[V, d]: what expert m's partners that are there, itself included, say of it on average."""
        together = present[:, m : m + 1] * present  # (V, M)
        said = [self.g_reason_shared(self.g_reason_1(torch.cat([units[m], partner], 1))) for partner in units]
        mask = (torch.stack(said, 1) * together[:, :, None]).sum(1)
        return mask / (together.sum(1, keepdim=True) + NO_PARTNER)

    def texts(self, pooled: Tensor) -> tuple[list[Tensor], Tensor]:
        """Pooled texts [Q, D] -> units [Q, d_m] and the weights of the experts, [Q, M], which add up to one."""
        return [unit(pooled) for unit in self.text_GU], self.moe_fc(pooled).softmax(1)


def weighted_similarities(texts: Tensor, weights: Tensor, clips: Tensor, present: Tensor) -> Tensor:
    """float [Q, V]: inner products over the experts that a clip has, weighed by each text.

    `texts` [Q, D]: units side by side, each times its weight in `weights` [Q, M]; `clips` [V, D]: units side by side,
    zero where `present`, float [V, M], is; every clip has something.
    """
    return texts @ clips.T / (weights @ present.T)
