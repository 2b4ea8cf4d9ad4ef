"""TeachText (Croitoru et al., ICCV 2021): a student learns from teachers that read the same captions otherwise.

Each teacher has another pretrained text encoder. The student's similarities of a batch's texts and clips should equal
the mean of the teachers'; at test time the student is alone. Only similarities are compared, so students and teachers
may be of any make: collaborative experts, any model with two towers, or embeddings from a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.data.described_clips import DescribedBatch
from videoclip.embedding import TwoTowers
from videoclip.errors import InputError
from videoclip.losses import distillation_loss, margin_loss
from videoclip.packed import Packed
from videoclip.recipes.experts import Experts


@dataclass(frozen=True)
class Options:
    """The losses. Defaults are the release's for MSR-VTT; its other margins: MSVD 0.30764700456522676, DiDeMo
    0.16642835966287484, LSMDC 0.12132983763957966, ActivityNet 0.060496613740311816."""

    margin: float = 0.09381161988446174
    distillation: float = 1.0
    """Weight of the distillation loss beside the ranking loss."""
    normalisation: Literal["release", "paper"] = "release"
    """Of both losses. The release's weighs distillation about twice as much as the paper's."""


class Side(nn.Module):
    """A student or a teacher: a batch's similarities float [B, B], between -1 and 1, rows texts."""

    def forward(self, batch: DescribedBatch) -> Tensor:
        """Similarities of every text with every clip."""
        raise NotImplementedError


class ExpertsSide(Side):
    """Collaborative experts, or a mixture of them, that read the texts of one encoder, `text`."""

    def __init__(self, model: Experts, text: str) -> None:
        super().__init__()
        self.model, self.text = model, text

    def forward(self, batch: DescribedBatch) -> Tensor:
        """Similarities over the experts that a clip has."""
        names = self.model.config.names or tuple(batch.experts)
        experts = {name: batch.experts[name] for name in names}
        return self.model.similarities(experts, batch.present, batch.texts[self.text])


class TowersSide(Side):
    """Any model with `embed_video` and `embed_text`, on the token sequences `video` and word ids `text` of a batch."""

    def __init__(self, model: nn.Module, video: str, text: str) -> None:
        super().__init__()
        self.model, self.video, self.text = model, video, text

    def forward(self, batch: DescribedBatch) -> Tensor:
        """Cosines, whatever the model's own temperature: students and teachers are compared on one scale."""
        towers: TwoTowers = self.model  # type: ignore[assignment]
        tokens = batch.experts[self.video]
        if not isinstance(tokens, Packed):
            raise InputError(f"{self.video}: one row a clip, but a model with two towers takes sequences of tokens")
        video, text = towers.embed_video(tokens), towers.embed_text(batch.texts[self.text])
        return F.normalize(text, dim=1) @ F.normalize(video, dim=1).T


class StoredSide(Side):
    """A teacher from a file: `clips` float [V, D] and `texts` [texts, D] of all clips, whose products are similarities.

    Rows are numbered as those of the `DescribedClips` that batches come from.
    """

    def __init__(self, clips: Tensor, texts: Tensor) -> None:
        super().__init__()
        self.register_buffer("clips", clips, persistent=False)
        self.register_buffer("texts", texts, persistent=False)
        self.clips: Tensor
        self.texts: Tensor

    def forward(self, batch: DescribedBatch) -> Tensor:
        """Products of what is stored for the texts drawn and for the clips."""
        return self.texts[batch.captions.to(self.texts.device)] @ self.clips[batch.rows.to(self.clips.device)].T


class TeachText(nn.Module):
    """A student with its teachers; without any, only the ranking loss is left."""

    def __init__(self, student: Side, teachers: Sequence[Side], options: Options) -> None:
        super().__init__()
        self.student, self.options = student, options
        self.teachers = nn.ModuleList(teachers).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TeachText:
        """Teachers stay in evaluation mode: batch statistics and dropout would make other teachers of them."""
        super().train(mode)
        self.teachers.eval()
        return self

    def forward(self, batch: DescribedBatch) -> dict[str, Tensor]:
        """ "ranking", "distillation" and their weighted sum "loss"; "accuracy": texts nearest to their own clip."""
        similarities = self.student(batch)  # (B, B)
        ranking = margin_loss(similarities, self.options.margin, self.options.normalisation)
        own = torch.arange(len(batch), device=similarities.device)
        outputs = {
            "loss": ranking,
            "ranking": ranking.detach(),
            "accuracy": (similarities.argmax(1) == own).float().mean(),
        }
        if len(self.teachers):
            with torch.no_grad():
                taught = torch.stack([teacher(batch).to(similarities) for teacher in self.teachers])  # (T, B, B)
            distillation = distillation_loss(similarities, taught, self.options.normalisation)
            outputs["loss"] = ranking + self.options.distillation * distillation
            outputs["distillation"] = distillation.detach()
        return outputs


def make_optimizer(
    student: nn.Module, learning_rate: float = 1e-3, weight_decay: float = 1e-5
) -> torch.optim.Optimizer:
    """RAdam with decoupled decay, as the release trains (its file names, and the paper, say Adam)."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return torch.optim.RAdam(parameters, learning_rate, weight_decay=weight_decay, decoupled_weight_decay=True)


def learning_rate_at(epoch: int, learning_rate: float = 1e-3, decay: float = 0.95) -> float:
    """The release's schedule: times `decay` after every epoch, no warm-up."""
    return learning_rate * decay**epoch
