"""What models with two towers have beside their mathematics: own texts and videos, frozen parts, a temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.data.words import WordTokenizer
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.packed import Packed
from videoclip.pretrained import FrozenParts

LOWEST_TEMPERATURE = 0.01  # CLIP's limit on how much similarities are scaled up


class HasFrozenParts:
    """Mixed into a module with a `config`: the tokenizer and the video encoder that it belongs to."""

    config: Any
    """A frozen dataclass; `video_encoder` is the fingerprint of what made the video's side."""
    frozen: FrozenParts

    def tokenizer(self) -> WordTokenizer:
        """The tokenizer of the model's folder. Raises InputError if there is none."""
        return self.frozen.need_tokenizer()

    def frozen_video_encoder(self) -> VideoEncoder:
        """The video encoder of the model's folder, checked to be the one that the model was trained on."""
        return self.frozen.need_video_encoder(self.config.video_encoder)


class EncodesFiles(HasFrozenParts):
    """Mixed into a module with `embed_video` and `embed_text`: own videos and words."""

    def embed_video(self, tokens: Packed) -> Tensor:
        """Rows [N, D] of B clips -> [B, H]."""
        raise NotImplementedError

    def embed_text(self, word_ids: Packed) -> Tensor:
        """Rows int [N] of B texts, start and end word included -> [B, H]."""
        raise NotImplementedError

    @torch.inference_mode()
    def encode_video(self, path: Path | str, start: float = 0.0, end: float | None = None) -> Tensor:
        """Embed [start, end) seconds of a video file: decode, frozen encoder, tokens -> float32 [H].

        A clip longer than `max_seconds` is embedded in consecutive pieces whose embeddings are averaged.
        Raises InputError if the file cannot be decoded or the model's folder holds no video encoder.
        """
        tokens = self.frozen_video_encoder().encode_video(Path(path).expanduser(), start, end)
        return self.embed_long_video(torch.from_numpy(tokens))

    def embed_long_video(self, tokens: Tensor) -> Tensor:
        """Tokens [T, D] of any length -> [H]: the mean of the embeddings of pieces of at most `max_seconds`."""
        mean = self.embed_video(Packed.of(tokens.split(self.config.max_seconds))).float().mean(0)
        return F.normalize(mean, dim=0) if self.config.normalize else mean

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Embed texts -> float32 [N, H]. Words beyond `max_words` are left out."""
        tokenizer = self.tokenizer()
        pieces = (texts[first : first + batch] for first in range(0, len(texts), batch))
        return torch.cat(
            [self.embed_text(tokenizer.clip_ids(piece, self.config.max_words)).float() for piece in pieces]
        )


class LearnsTemperature:
    """Mixed into a module with the parameter `log_temperature`."""

    log_temperature: nn.Parameter

    @property
    def temperature(self) -> Tensor:
        """Scalar that divides similarities."""
        return self.log_temperature.exp()

    def after_step(self) -> None:
        """Keep the temperature from falling below CLIP's limit; clamping it in `forward` would cut its gradient."""
        with torch.no_grad():
            self.log_temperature.clamp_(min=math.log(LOWEST_TEMPERATURE))
