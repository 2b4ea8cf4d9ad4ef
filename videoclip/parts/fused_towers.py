"""ALPRO's body under its release's names: towers, a fusion encoder that is BERT's upper layers, and heads.

What is said of pairs, words, regions and questions stands here; by what it is trained, in `recipes/alpro.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from videoclip.data.frames import FrameBatch
from videoclip.errors import InputError
from videoclip.frame_model import FrameModel
from videoclip.packed import Packed
from videoclip.parts.frame_batches import as_frames
from videoclip.parts.fusion import first_rows, from_even, fuse, last_rows
from videoclip.parts.masked_words import MaskedWordHead, WordMask
from videoclip.parts.pixels import normalised
from videoclip.parts.prompter import Prompter
from videoclip.parts.towers import Towers, TowersShape
from videoclip.parts.vision_transformer import VisionShape

LOSSES = ("vtc", "vtm", "mlm", "pem")


@dataclass(frozen=True)
class AlproConfig:
    """The shape of a model and what it is trained by. The defaults are the published ones."""

    shape: TowersShape = field(default_factory=TowersShape)
    losses: tuple[str, ...] = LOSSES
    entities: int = 1000
    """Entities that the prompter tells apart; 0 without `pem`."""
    entity_names: tuple[str, ...] = ()
    """Those entities in words, where they are known."""
    answers: int = 0
    """Answers to choose from, where questions are answered."""
    answer_names: tuple[str, ...] = ()
    """Those answers in words, where they are known."""
    word_mask: WordMask = field(default_factory=lambda: WordMask(103, 30522, (0, 100, 101, 102, 103)))
    discard: str = "probability"
    threshold: float = 0.2
    tied_words: bool = True
    """Scores of words are taken with the word embeddings, as in BERT."""
    has_prompter: bool = False
    """Whether the weights hold the prompter as well."""
    sampler: str = "headtail"
    """How frames are chosen in training."""
    max_seconds: int = 32
    max_words: int = 30
    video_encoder: str = ""
    """Fingerprint of what made the frames in the shards."""
    normalize: bool = True

    def __post_init__(self) -> None:
        if unknown := set(self.losses) - set(LOSSES):
            raise InputError(f"losses must be some of {', '.join(LOSSES)}; not {', '.join(sorted(unknown))}")
        if not self.losses and not self.answers:
            raise InputError(f"a model needs losses ({', '.join(LOSSES)}), or answers to choose from")
        if ("pem" in self.losses) != bool(self.entities):
            raise InputError("pem needs entities, and entities need pem")

    @property
    def width(self) -> int:
        """Of an embedding."""
        return self.shape.projection


def two_layers(width: int, outputs: int) -> nn.Sequential:
    """A head of two layers, the inner one twice as wide."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, outputs))


class FusedTowers(FrameModel, Towers):
    """Two towers, what is above them, and a prompter where regions are named."""

    config_class: ClassVar[type] = AlproConfig
    config: AlproConfig
    prompter: Prompter | None
    repeats_pictures: ClassVar[bool] = True
    """A picture is a clip of one frame again and again."""

    def __init__(self, config: AlproConfig) -> None:
        super().__init__(config.shape)
        self.config = config
        width = config.shape.text.width
        self.itm_head = nn.Linear(width, 2)
        if "mlm" in config.losses:
            self.text_encoder.cls = MaskedWordHead(width, config.shape.vocabulary, config.tied_words)
        if config.entities:
            self.mpm_head = two_layers(width, config.entities)
        if config.answers:
            self.classifier = two_layers(width, config.answers)
        self.prompter = None
        self._freeze_what_no_loss_reaches()

    def _freeze_what_no_loss_reaches(self) -> None:
        losses = self.config.losses
        if "vtc" not in losses:
            for part in (self.vision_proj, self.text_proj):
                part.requires_grad_(False)
            self.temp.requires_grad_(False)
        if "vtm" not in losses:
            self.itm_head.requires_grad_(False)
        if losses == ("vtc",):
            for layer in self.text_encoder.bert.encoder.layer[self.shape.text_layers :]:
                layer.requires_grad_(False)

    @classmethod
    def restore(cls, config: AlproConfig) -> Self:
        """With an empty prompter, where the weights hold one."""
        model = cls(config)
        if config.has_prompter:
            model.attach(Prompter(config.shape, config.entities, config.entity_names or None))
        return model

    def attach(self, prompter: Prompter) -> Self:
        """Take a frozen prompter. Raises InputError if it names other entities, or reads other frames."""
        names = self.config.entity_names
        prompter.check_fits(self.config.entities, names, self.shape.vision)
        self.prompter = prompter
        self.config = replace(self.config, has_prompter=True, entity_names=names or prompter.names or ())
        return self

    def after_step(self) -> None:
        """Keep the temperature where the release clamps it."""
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)

    # Pairs, words, regions and questions.

    def fused(self, words: Packed, video: Packed) -> Packed:
        """States of the text layers and video tokens -> fused states, words first, then [CLS] and the patches."""
        return fuse(self.text_encoder.bert.encoder.layer[self.shape.text_layers :], words, video)

    def word_scores(self, words: Packed, video: Packed) -> Tensor:
        """Word ids and video tokens -> scores [N, V] of every word of the vocabulary at every place of the text."""
        fused = self.fused(self.text_tokens(words), video)
        at_words = fused.rows[(fused.positions < words.lengths[fused.owners]).to(fused.rows.device)]
        return self.text_encoder.cls(at_words, self.text_encoder.bert.embeddings.word_embeddings.weight)

    def entity_logits(self, fused: Packed, crop: Tensor) -> Tensor:
        """Fused pairs and bool [B, grid, grid] -> [B, entities], from the mean of the patches inside."""
        patches = last_rows(fused, self.shape.vision.places)  # [B, K, W]
        share = crop.flatten(1).to(patches.dtype)
        region = (patches * share[..., None]).sum(1) / share.sum(1, keepdim=True).clamp(min=1)
        return self.mpm_head(region)

    def matching_scores(self, frames: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Normalised frames [B, T, 3, S, S], word ids and mask [B, L] -> logits [B, 2]; column 1 says "matched"."""
        words = self.text_tokens(Packed.from_padded(ids, mask))
        return self.itm_head(first_rows(self.fused(words, from_even(self.video_tokens(frames)))))

    def answer_scores(self, frames: Tensor, questions: Packed) -> Tensor:
        """Normalised frames and word ids of questions -> logits [B, answers]."""
        if not self.config.answers:
            raise InputError("this model answers no questions: it has no classifier")
        fused = self.fused(self.text_tokens(questions), from_even(self.video_tokens(frames)))
        return self.classifier(first_rows(fused))

    # What re-ranking asks for: each side's states once, then judgements of pairs of them.

    def text_states(self, word_ids: Packed) -> Packed:
        """Word ids with [CLS] … [SEP] -> states of the text layers, rows [N, W]."""
        return self.text_tokens(word_ids.to(self.temp.device, torch.int64))

    def video_states(self, frames: Packed) -> Packed:
        """Clips of any number of frames -> tokens, rows [B (1 + K), W]."""
        return from_even(self.video_tokens(self._evenly_chosen(frames)))

    def matching_logits(self, words: Packed, clips: Packed) -> Tensor:
        """States of B texts and B clips -> logits [B, 2]; column 1 says that they belong together.

        Raises InputError if the model was trained without matching.
        """
        if "vtm" not in self.config.losses:
            raise InputError("this model was trained without matching (vtm): it cannot judge pairs")
        return self.itm_head(first_rows(self.fused(words, clips)))

    # What evaluation, clustering and search ask for.

    @property
    def vision(self) -> VisionShape:
        """The shape of what looks at frames."""
        return self.shape.vision

    @property
    def training_sampler(self) -> str:
        """How frames are chosen in training."""
        return self.config.sampler

    @property
    def frames(self) -> int:
        """How many frames clips have."""
        return self.shape.vision.frames

    @property
    def temperature(self) -> Tensor:
        """Divides cosines."""
        return self.temp

    def embed_video(self, frames: Packed) -> Tensor:
        """Clips of any number of frames, uint8 [N, S, S, 3] or rows of shards -> unit vectors [B, projection]."""
        return self.video_features(self._evenly_chosen(frames))

    def embed_text(self, word_ids: Packed) -> Tensor:
        """Word ids with [CLS] … [SEP] -> unit vectors [B, projection]."""
        return self.projected_text(self.text_states(word_ids))

    def _evenly_chosen(self, frames: Packed) -> Tensor:
        """Normalised [B, T, 3, S, S], as many frames as the model looks at."""
        vision = self.shape.vision
        clips = FrameBatch.even(as_frames(frames, vision.size), vision.frames)
        return normalised(clips.to(self.temp.device))
