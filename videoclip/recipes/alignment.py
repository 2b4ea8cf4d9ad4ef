"""Which second does a sentence belong to, and is it shown at all? After the temporal alignment network (TAN: Han, Xie,
Zisserman, CVPR 2022), learned from narration whose times are off.

A stretch of video and its sentences are compared in two ways: by towers that meet in a similarity only (`dual`), and by
an encoder that reads all seconds and all sentences together (`joint`). Where both put a sentence at the same place,
that place is what it is trained towards, instead of the time at which it is said.

Unlike the paper: the towers are VideoCLIP's, so sentences are read by a transformer and the temperature is learned;
labels of co-training come from the model as it is, not from its running average.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.data.clips import ClipConfig
from videoclip.data.shards import Manifest, Shards
from videoclip.data.stretches import StretchBatch, StretchSampler
from videoclip.data.words import WordTokenizer
from videoclip.encoders.text import FrozenTextEncoder
from videoclip.gather import gather, gather_with_gradient, mean_over_all, rows_per_rank
from videoclip.losses import multiple_instance_losses
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.packed import Packed
from videoclip.parts.windows import agreed_windows, best_windows, inside, own_curves, windows_said
from videoclip.recipes import videoclip
from videoclip.transformer import Bert, initialise_as_bert


@dataclass(frozen=True)
class AlignmentConfig(VideoCLIPConfig):
    """Towers, and what reads seconds and sentences together."""

    joint_layers: int = 6
    agree_after: int = 1000
    agreement: float = 0.5

    def describe(self) -> dict[str, str]:
        """What a model's card says of it."""
        return {**super().describe(), "Joint encoder": f"{self.joint_layers} layers over {self.max_seconds} seconds"}


@dataclass(frozen=True)
class Options(videoclip.Options):
    """VideoCLIP's towers over long stretches, and a joint encoder with the paper's constants."""

    max_seconds: int = 64
    """Length of a stretch."""
    joint_layers: int = 6
    agree_after: int = 1000
    """Steps before co-training begins; until then sentences are trained towards the time at which they are said."""
    agreement: float = 0.5
    """Intersection over union of a sentence's two places from which on they are believed."""


class Recipe(VideoCLIP):
    """The towers, the joint encoder, and a head that says whether a sentence can be aligned."""

    recipe: ClassVar[str] = "alignment"
    config_class: ClassVar[type[VideoCLIPConfig]] = AlignmentConfig
    config: AlignmentConfig
    steps: Tensor

    def __init__(self, config: AlignmentConfig) -> None:
        super().__init__(config)
        self.video_projection = nn.Linear(config.video_dimension, config.width)
        self.joint = Bert(config.shape(config.joint_layers), 1)
        self.alignable = nn.Linear(config.width, 1)
        for new in (self.video_projection, self.joint, self.alignable):
            new.apply(initialise_as_bert)
        self.joint.embeddings.word_embeddings.requires_grad_(False)  # never looked at
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: StretchBatch) -> dict[str, Tensor]:
        """Losses of both ways and of the head, and what is stepped on. Shares of sentences: `agreed`, whose time was
        replaced, and `placed`, whose nearest second by the towers lies where they are said."""
        video, sentences = batch.video_tokens, torch.tensor(batch.sentences)
        owners = torch.repeat_interleave(torch.arange(len(sentences)), sentences)  # (S,)
        text = self.embed_text(batch.word_ids)  # (S, H)
        dual = self.seconds(video), text  # (N, H), (S, H)
        joint, alignable = self.read_together(video, text, sentences)  # likewise, (S,)
        said = windows_said(batch.said.to(text.device), video.lengths[owners].to(text.device))  # (S, 2)
        window, agreed = said, torch.zeros(len(said), dtype=torch.bool, device=said.device)
        with torch.no_grad():
            curves = [own_curves(v @ t.T / self.temperature, video, owners) for v, t in (dual, joint)]  # (S, T)
            if self.steps >= self.config.agree_after:
                one, other = (best_windows(curve, said[:, 1] - said[:, 0]) for curve in curves)
                window, agreed = agreed_windows(said, one, other, self.config.agreement)
        positive = inside(window, video, owners)  # (N, S)
        counts = batch.rows_per_rank or rows_per_rank(len(batch))
        losses = {name: self._contrast(v, t, positive, counts) for name, (v, t) in (("dual", dual), ("joint", joint))}
        losses["head"] = self._judge(alignable, [curve.amax(1) for curve in curves], counts)
        second = curves[0].argmax(1)
        placed = (said[:, 0] <= second) & (second < said[:, 1])
        return {
            "loss": (losses["dual"] + losses["joint"]) / 2 + losses["head"],
            **losses,
            "agreed": mean_over_all(agreed.float().sum(), len(text), counts),
            "placed": mean_over_all(placed.float().sum(), len(text), counts),
            "temperature": self.temperature.detach(),
        }

    def seconds(self, video: Packed) -> Tensor:
        """Video tokens -> what sentences are compared with by the towers, unit rows [N, H]."""
        return F.normalize(self.video_hidden(video).rows, dim=-1)

    def read_together(self, video: Packed, text: Tensor, sentences: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """P stretches and their sentences' embeddings [S, H], in no order -> ((seconds [N, H], sentences [S, H]), unit
        rows that were read together, and how alignable each sentence is, logits [S])."""
        x = self.video_projection(video.rows.to(text.device, text.dtype))
        both = video.with_rows(x).cat(Packed(text, sentences))
        is_text = both.positions >= video.lengths[both.owners]
        positions = both.positions.masked_fill(is_text, self.config.max_seconds)  # one place for all of them
        rows, is_text = self.joint(both, positions, is_text.long()).rows, is_text.to(text.device)
        shown, said = rows[~is_text], rows[is_text]  # (N, H), (S, H)
        return (F.normalize(shown, dim=-1), F.normalize(said, dim=-1)), self.alignable(said)[:, 0]

    def _contrast(self, video: Tensor, text: Tensor, positive: Tensor, counts: tuple[int, ...] | list[int]) -> Tensor:
        """MIL-NCE in both directions: sentences against the seconds, seconds against the sentences of all workers."""
        everyone = gather_with_gradient(video), gather_with_gradient(text)
        of_text, of_video = multiple_instance_losses(video, text, positive, self.temperature, everyone)
        means = [mean_over_all(x.sum(), len(x), counts) for x in (of_text, of_video)]
        return torch.stack(means).mean()

    def _judge(self, alignable: Tensor, peaks: list[Tensor], counts: tuple[int, ...] | list[int]) -> Tensor:
        """The head learns what both ways agree on: peaks [S] above the median of all, or below it."""
        above = torch.stack([peak > gather(peak).median() for peak in peaks])
        sure = above[0] == above[1]
        each = F.binary_cross_entropy_with_logits(alignable[sure], above[0][sure].float(), reduction="sum")
        return mean_over_all(each, int(sure.sum()), counts)

    def after_step(self) -> None:
        """Count steps: co-training begins after so many."""
        super().after_step()
        self.steps += 1


def sampler(
    options: Options, shards: Shards, tokenizer: WordTokenizer, clips: ClipConfig, cache: Path
) -> StretchSampler:
    """What this recipe is trained on: long stretches, one of every video in a batch."""
    return StretchSampler(shards, tokenizer, clips, cache, options.max_seconds, clips.max_words)


def build(options: Options, manifest: Manifest, tokenizer: WordTokenizer) -> Recipe:
    """A new model for shards of `manifest`'s encoder and texts cut by `tokenizer`."""
    text_encoder = FrozenTextEncoder(options.text_encoder) if options.text_encoder else None
    towers = asdict(videoclip.configuration(options, manifest, tokenizer, text_encoder))
    new = AlignmentConfig(
        **towers, joint_layers=options.joint_layers, agree_after=options.agree_after, agreement=options.agreement
    )
    model = Recipe(new)
    model.frozen.tokenizer, model.frozen.text_encoder = tokenizer, text_encoder
    return model
