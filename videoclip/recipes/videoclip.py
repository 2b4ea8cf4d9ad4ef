"""VideoCLIP (Xu et al., EMNLP 2021): overlapping clips of video and narration, contrasted with all of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from videoclip.data.clips import ClipBatch
from videoclip.data.shards import Manifest
from videoclip.data.words import WordTokenizer
from videoclip.encoders.text import FrozenTextEncoder
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.parts.pairs import gather_pairs


@dataclass(frozen=True)
class Options:
    """The trainable transformers. Defaults: one of BERT-base's size, for both sides; the paper's own are `separate`,
    12 layers for text and 6 for video, and start from BERT (`--init`)."""

    width: int = 768
    layers: int = 12
    """Of the text transformer, or of the shared one."""
    video_layers: int = 0
    """Of the video transformer, where transformers are separate; 0: half as many as the text's, as in the paper."""
    heads: int = 12
    transformer: Literal["shared", "separate"] = "shared"
    """One transformer for both sides, or one each."""
    pooling: Literal["mean", "cls"] = "mean"
    """Mean over all positions but [CLS], or [CLS]."""
    dropout: float = 0.1
    temperature: float = 0.07
    """Starting value; it is learned."""
    max_seconds: int = 0
    """Longest video clip that the model takes; 0: that of the training clips."""
    max_words: int = 0
    """Longest text that the model takes; 0: that of the training clips."""
    text_encoder: str = ""
    """Folder or hub id of a frozen text encoder whose hidden states take the place of trained word embeddings."""


class Recipe(VideoCLIP):
    """The model with its loss."""

    def forward(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Symmetric InfoNCE over the pairs of all workers, and figures as `Pairs.figures` names them."""
        video, text = self.embed_video(batch.video_tokens), self.embed_text(batch.word_ids)  # (P, H) each
        pairs = gather_pairs(video, text, batch)
        return {
            "loss": pairs.contrast(self.temperature),
            **pairs.figures(),
            "temperature": self.temperature.detach(),
            "chance_loss": pairs.chance_loss(),
        }


def configuration(
    options: Options, manifest: Manifest, tokenizer: WordTokenizer, text_encoder: FrozenTextEncoder | None
) -> VideoCLIPConfig:
    """The model's configuration; what the options leave open follows from the shards and the tokenizer."""
    return VideoCLIPConfig(
        video_dimension=manifest.dimension,
        width=options.width,
        layers=options.layers,
        video_layers=options.video_layers or max(1, options.layers // 2),
        heads=options.heads,
        intermediate=4 * options.width,
        transformer=options.transformer,
        pooling=options.pooling,
        text="frozen" if text_encoder else "embeddings",
        text_dimension=text_encoder.dimension if text_encoder else options.width,
        vocabulary=tokenizer.vocabulary,
        positions=options.max_seconds + options.max_words + 4,
        max_seconds=options.max_seconds,
        max_words=options.max_words,
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        dropout=options.dropout,
        temperature=options.temperature,
        video_encoder=manifest.fingerprint,
        text_encoder=text_encoder.name if text_encoder and not text_encoder.is_local else "",
    )


def build(options: Options, manifest: Manifest, tokenizer: WordTokenizer, recipe: type[Recipe] = Recipe) -> Recipe:
    """A new model for shards of `manifest`'s encoder and texts cut by `tokenizer`."""
    text_encoder = FrozenTextEncoder(options.text_encoder) if options.text_encoder else None
    model = recipe(configuration(options, manifest, tokenizer, text_encoder))
    model.frozen.tokenizer, model.frozen.text_encoder = tokenizer, text_encoder
    return model
