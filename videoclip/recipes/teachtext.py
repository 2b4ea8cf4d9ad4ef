"""TeachText (Croitoru et al., ICCV 2021): a student learns from teachers that read the same captions otherwise.

Each teacher has another pretrained text encoder. The student's similarities of a batch's texts and clips should equal
the mean of the teachers'; at test time the student is alone. Only similarities are compared, so students and teachers
may be of any make: collaborative experts, any model with two towers, or embeddings from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.checkpoints import TrainingState
from videoclip.data.described_clips import DescribedBatch, DescribedClips
from videoclip.embedding import TwoTowers
from videoclip.errors import InputError
from videoclip.losses import distillation_loss, margin_loss
from videoclip.packed import Packed
from videoclip.parts.experts import weighted_similarities
from videoclip.recipes.experts import Experts
from videoclip.training import step


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
        experts = {name: batch.experts[name] for name in self.names(batch)}
        return self.model.similarities(experts, batch.present, batch.texts[self.text])

    def names(self, clips: DescribedBatch | DescribedClips) -> tuple[str, ...]:
        """Of the experts that the model takes."""
        return self.model.config.names or tuple(clips.experts)


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
    """A teacher that has been asked before: `clips` float [V, D] and `texts` [texts, D] of all clips.

    Their products are similarities, as with the release's files; with `weights` [texts, M] and `present` [V, M] of the
    experts, those of clips that lack some are as the teacher itself has them.
    Rows are numbered as those of the `DescribedClips` that batches come from.
    """

    def __init__(
        self, clips: Tensor, texts: Tensor, weights: Tensor | None = None, present: Tensor | None = None
    ) -> None:
        super().__init__()
        weights = torch.ones(len(texts), 1) if weights is None else weights
        present = torch.ones(len(clips), 1) if present is None else present
        for name, tensor in (("clips", clips), ("texts", texts), ("weights", weights), ("present", present)):
            self.register_buffer(name, tensor, persistent=False)
        self.clips: Tensor
        self.texts: Tensor
        self.weights: Tensor
        self.present: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, side: ExpertsSide, clips: DescribedClips, at_once: int = 1024) -> StoredSide:
        """Ask a trained teacher once for all that it will be asked, in evaluation mode."""
        side.eval()
        rows, captions = torch.arange(len(clips)).split(at_once), torch.arange(len(clips.owners)).split(at_once)
        seen = [side.model.embed_experts(*clips.experts_of(some, side.names(clips))) for some in rows]
        read = [side.model.embed_words(clips.texts[side.text].take(some)) for some in captions]
        videos, present = (torch.cat(parts) for parts in zip(*seen))
        texts, weights = (torch.cat(parts) for parts in zip(*read))
        return cls(videos, texts, weights, present)

    def forward(self, batch: DescribedBatch) -> Tensor:
        """Similarities of the texts drawn with the clips of the batch."""
        return self.similarities(batch.captions, batch.rows)

    def similarities(self, captions: Tensor, rows: Tensor) -> Tensor:
        """float [Q, B] of some texts, int64 [Q], with some clips, int64 [B]."""
        captions, rows = captions.to(self.texts.device), rows.to(self.clips.device)
        return weighted_similarities(self.texts[captions], self.weights[captions], self.clips[rows], self.present[rows])


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


def train_on_clips(
    recipe: nn.Module,
    optimizer: torch.optim.Optimizer,
    clips: DescribedClips,
    epochs: Iterable[Sequence[tuple[np.ndarray, np.ndarray]]],
    rate: Callable[[int, int], float],
    clip_norm: float = float("inf"),
    state: TrainingState | None = None,
) -> Iterator[dict[str, float]]:
    """Step on every batch of every epoch, yielding the figures of the step, "epoch" among them.

    `epochs`: for each the clips and texts of its batches, as `draw_epoch` draws them; `rate`: learning rate by epoch
    and step. The release clips no gradients. It begins where `state` says, which says how to go on after each step.
    """
    recipe.train()
    state = TrainingState() if state is None else state
    for epoch, drawn in enumerate(epochs):
        if epoch < state.epoch:
            continue
        for rows, captions in drawn[state.place :]:
            batch = clips.batch(torch.from_numpy(rows), torch.from_numpy(captions))
            figures = step(recipe, optimizer, batch, rate(epoch, state.step), clip_norm)
            state.step, state.place = state.step + 1, state.place + 1
            yield {**figures, "epoch": epoch}
        state.epoch, state.place = epoch + 1, 0


def caption_ranks(teachers: Sequence[StoredSide], clips: DescribedClips, at_once: int = 1024) -> np.ndarray:
    """float64 [texts]: the place of every text's own clip among all clips, by the mean of the teachers' similarities.

    A text that describes something else has its clip far behind: those are not to be trained on ("denoising").
    """
    rows, ranks = torch.arange(len(clips)), []
    for captions in torch.arange(len(clips.owners)).split(at_once):
        mean = torch.stack([teacher.similarities(captions, rows) for teacher in teachers]).mean(0)
        own = mean[torch.arange(len(captions)), clips.owners[captions]][:, None]
        ranks.append((mean > own).sum(1) + ((mean == own).sum(1) + 1) / 2)
    return torch.cat(ranks).double().numpy()


def caption_mask(ranks: np.ndarray, limit: int) -> np.ndarray:
    """bool [texts]: those whose clip is among the first `limit`, as the release's `denoise-less100.pkl` says it."""
    return ranks <= limit
