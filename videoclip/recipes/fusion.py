"""Fusion on frozen tokens: VideoCLIP's towers, and above them an encoder that reads words and video together.

After ALPRO (Li et al., CVPR 2022) without its pixels and its prompter: the towers are aligned by contrast (`vtc`), the
fusion encoder says whether a text belongs to a clip (`vtm`, against negatives drawn by likeness) and guesses hidden
words with the video's help (`mlm`). Its judgement re-ranks what the towers find.

Negatives are drawn among the pairs of all workers, never an excluded one; the towers' outputs travel for that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from videoclip.data.clips import ClipBatch
from videoclip.data.shards import Manifest
from videoclip.data.words import WordTokenizer
from videoclip.encoders.text import FrozenTextEncoder
from videoclip.errors import InputError
from videoclip.gather import rows_per_rank, shared_generator
from videoclip.losses import mean_cross_entropy, share_right
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.packed import Packed
from videoclip.parts.fusion import FusionEncoder, first_rows
from videoclip.parts.masked_words import NOT_MASKED, MaskedWordHead, WordMask, draw_hidden
from videoclip.parts.matching import pairs_to_judge
from videoclip.parts.pairs import gather_pairs
from videoclip.recipes import videoclip
from videoclip.transformer import initialise_as_bert

LOSSES = ("vtc", "vtm", "mlm")


@dataclass(frozen=True)
class FusionOptions:
    """The fusion encoder, with ALPRO's constants."""

    fusion_layers: int = 6
    losses: tuple[str, ...] = LOSSES
    """`vtc` contrast; `vtm` matching, which re-ranking needs; `mlm` masked words."""
    masked_share: float = 0.15
    """Of the words that are hidden."""
    always_mask: bool = False
    """Hidden words are always [MASK], as ALPRO's paper says; else now and then another word, as BERT's are."""


@dataclass(frozen=True)
class Options(FusionOptions, videoclip.Options):
    """VideoCLIP's towers, and a fusion encoder with ALPRO's constants."""


@dataclass(frozen=True)
class FusionConfig(FusionOptions, VideoCLIPConfig):
    """Towers, what is above them, and what they are trained by."""

    mask_id: int = 103
    special_ids: tuple[int, ...] = (0, 100, 101, 102, 103)
    """Words that are never hidden."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("losses", "special_ids"):  # JSON knows lists alone
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if "vtc" not in self.losses or set(self.losses) - set(LOSSES):
            raise InputError(f"losses must be vtc, and of {', '.join(LOSSES[1:])} what you like; not {self.losses}")

    @property
    def word_mask(self) -> WordMask:
        """How words are hidden."""
        return WordMask(self.mask_id, self.vocabulary, self.special_ids, self.masked_share, self.always_mask)

    def describe(self) -> dict[str, str]:
        """What a model's card says of it."""
        return {**super().describe(), "Fusion": f"{self.fusion_layers} layers, trained by {', '.join(self.losses)}"}


class Recipe(VideoCLIP):
    """The towers, the fusion encoder and its heads (`itm_head` and `cls`, named as ALPRO's)."""

    recipe: ClassVar[str] = "fusion"
    config_class: ClassVar[type[VideoCLIPConfig]] = FusionConfig
    config: FusionConfig

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config)
        if {"vtm", "mlm"} & set(config.losses):
            self.fusion = FusionEncoder(config.shape(config.fusion_layers)).apply(initialise_as_bert)
        if "vtm" in config.losses:
            self.itm_head = nn.Linear(config.width, 2).apply(initialise_as_bert)
        if "mlm" in config.losses:
            head = MaskedWordHead(config.width, config.vocabulary, tied=config.text == "embeddings")
            self.cls = head.apply(initialise_as_bert)

    def forward(self, batch: ClipBatch) -> dict[str, Tensor]:
        """The losses by name and their sum; figures as `Pairs.figures` names them, and `matched`, `guessed`: shares
        of pairs judged and of hidden words guessed that are right."""
        video, clips = self._both(*self._encode_video(batch.video_tokens))  # (P, H), P sequences
        text, words = self._both(*self._encode_word_vectors(self.word_vectors(batch.word_ids)))
        pairs = gather_pairs(video, text, batch)
        made = {"vtc": pairs.contrast(self.temperature)}
        figures = {**pairs.figures(), "temperature": self.temperature.detach()}
        counts = batch.rows_per_rank or rows_per_rank(len(batch))
        if self.config.losses != ("vtc",):
            draws = shared_generator(video.device)
        if "vtm" in self.config.losses:
            texts, videos, labels = pairs_to_judge(words, clips, pairs, self.temperature, draws, counts)
            logits = self.matching_logits(texts, videos)
            made["vtm"], figures["matched"] = (f(logits, labels, counts) for f in (mean_cross_entropy, share_right))
        if "mlm" in self.config.losses:
            mask, longest = self.config.word_mask, self.config.max_words + 2
            seen, labels = draw_hidden(batch.word_ids, mask, longest, pairs.rank_offset, draws, counts)
            hidden = (labels != NOT_MASKED).nonzero()[:, 0].cpu()
            scores = self.word_scores(self.text_states(seen), clips, hidden)
            labels = labels[hidden.to(labels.device)].to(scores.device)
            made["mlm"], figures["guessed"] = (f(scores, labels, counts) for f in (mean_cross_entropy, share_right))
        return {"loss": torch.stack(list(made.values())).sum(), **made, **figures}

    def word_scores(self, words: Packed, clips: Packed, places: Tensor) -> Tensor:
        """Scores [M, V] of every word of the vocabulary at `places`, int64 [M], rows of `words`."""
        fused = self.fusion(words, clips)
        rows = (fused.starts[words.owners] + words.positions)[places]
        return self.cls(fused.rows[rows.to(fused.rows.device)], self._text_bert.embeddings.word_embeddings.weight)

    # What re-ranking asks for: each side's states once, then judgements of pairs of them.

    def text_states(self, word_ids: Packed) -> Packed:
        """The text tower's outputs for `[CLS] words [SEP]`, rows [N, W]."""
        return self._both(*self._encode_word_vectors(self.word_vectors(word_ids)))[1]

    def video_states(self, tokens: Packed) -> Packed:
        """The video tower's outputs for `[CLS] tokens [SEP]`, rows [N + 2 B, W]."""
        return self._both(*self._encode_video(tokens))[1]

    def matching_logits(self, words: Packed, clips: Packed) -> Tensor:
        """States of B texts and B clips -> logits [B, 2]; column 1 says that they belong together.

        Raises InputError if the model was trained without matching.
        """
        if "vtm" not in self.config.losses:
            raise InputError("this model was trained without matching (vtm): it cannot judge pairs")
        return self.itm_head(first_rows(self.fusion(words, clips)))

    def _both(self, x: Packed, order: Tensor) -> tuple[Tensor, Packed]:
        """Outputs in the order of their lengths -> embeddings and outputs in the order in which they came."""
        return self._features(x, order), x.take(torch.argsort(order))


def build(options: Options, manifest: Manifest, tokenizer: WordTokenizer) -> Recipe:
    """A new model for shards of `manifest`'s encoder and texts cut by `tokenizer`.

    Raises InputError if words are to be hidden and the vocabulary has no [MASK].
    """
    text_encoder = FrozenTextEncoder(options.text_encoder) if options.text_encoder else None
    towers = videoclip.configuration(options, manifest, tokenizer, text_encoder)
    special = tokenizer.special_ids() if "mlm" in options.losses else {}
    own = {item.name: getattr(options, item.name) for item in fields(FusionOptions)}
    ids: dict[str, Any] = {"mask_id": special.get("[MASK]", 0), "special_ids": tuple(special.values())}
    model = Recipe(FusionConfig(**asdict(towers), **own, **ids))
    model.frozen.tokenizer, model.frozen.text_encoder = tokenizer, text_encoder
    return model
