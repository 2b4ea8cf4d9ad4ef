"""What a recipe with two towers offers around its losses: own texts and videos, a folder to save to and read from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.data.words import WordTokenizer
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.packed import Packed
from videoclip.pretrained import FrozenParts, ModelCard, save_card, save_model


class SavedTowers(nn.Module):
    """A module with `config`, `embed_video` and `embed_text`, and the frozen parts that it belongs to."""

    recipe: ClassVar[str]
    """What `config.json` names: the file in `videoclip/recipes/` that trains this."""
    config: Any
    """A frozen dataclass with what `embedding.TwoTowersConfig` names, and `describe()`."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = FrozenParts()

    def embed_video(self, tokens: Packed) -> Tensor:
        """Rows [N, D] of B clips -> [B, H]."""
        raise NotImplementedError

    def embed_text(self, word_ids: Packed) -> Tensor:
        """Rows int [N] of B texts, start and end word included -> [B, H]."""
        raise NotImplementedError

    def tokenizer(self) -> WordTokenizer:
        """The tokenizer of the model's folder. Raises InputError if there is none."""
        return self.frozen.need_tokenizer()

    def frozen_video_encoder(self) -> VideoEncoder:
        """The video encoder of the model's folder, checked to be the one that the model was trained on."""
        return self.frozen.need_video_encoder(self.config.video_encoder)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Embed texts -> float32 [N, H]. Words beyond `max_words` are left out."""
        tokenizer = self.tokenizer()
        pieces = (texts[first : first + batch] for first in range(0, len(texts), batch))
        return torch.cat(
            [self.embed_text(tokenizer.clip_ids(piece, self.config.max_words)).float() for piece in pieces]
        )

    @torch.inference_mode()
    def encode_video(self, path: Path | str, start: float = 0.0, end: float | None = None) -> Tensor:
        """Embed [start, end) seconds of a video file: decode, frozen encoder, tokens -> float32 [H].

        Raises InputError if the file cannot be decoded or the model's folder holds no video encoder.
        """
        tokens = torch.from_numpy(self.frozen_video_encoder().encode_video(Path(path).expanduser(), start, end))
        mean = self.embed_video(Packed.of(tokens.split(self.config.max_seconds))).float().mean(0)
        return F.normalize(mean, dim=0)

    def save_pretrained(self, folder: Path | str, card: ModelCard | None = None, **_: object) -> None:
        """Write `config.json`, `model.safetensors`, a card, and the tokenizer and frozen encoders that are there."""
        folder = Path(folder)
        save_model(folder, self, self.config, self.recipe)
        save_card(folder, card or ModelCard(), self.config.describe())
        self.frozen.save(folder)
