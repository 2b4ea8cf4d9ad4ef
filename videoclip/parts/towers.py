"""Two towers on frames and words, with ALPRO's names: a vision transformer, BERT's lower layers, two projections.

They are the base of ALPRO, and the whole of its prompter.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.errors import InputError
from videoclip.packed import Packed
from videoclip.parts.fusion import first_rows, through
from videoclip.parts.masked_words import MaskedWordHead
from videoclip.parts.vision_transformer import VisionShape, VisionTransformer
from videoclip.transformer import Bert, TransformerShape, initialise_as_bert


@dataclass(frozen=True)
class TowersShape:
    """Sizes of both towers. The defaults are ALPRO's."""

    vision: VisionShape = field(default_factory=lambda: VisionShape(drop_path=0.1))
    text: TransformerShape = field(default_factory=TransformerShape)
    text_layers: int = 6
    """BERT layers that see words alone; the others see words and video."""
    vocabulary: int = 30522
    projection: int = 256
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if self.vision.width != self.text.width:
            raise InputError(f"vision is {self.vision.width} wide and text {self.text.width}: fusion needs one width")
        if not 0 < self.text_layers <= self.text.layers:
            raise InputError(f"{self.text_layers} text layers of {self.text.layers}")


class VisualEncoder(nn.Module):
    """The release keeps its transformer under `model`."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.model = VisionTransformer(shape)


class TextEncoder(nn.Module):
    """The release keeps BERT under `bert`, and beside it, where words are masked, a head for words."""

    cls: MaskedWordHead

    def __init__(self, shape: TransformerShape, vocabulary: int) -> None:
        super().__init__()
        self.bert = Bert(shape, vocabulary)


class Towers(nn.Module):
    """Video and text to unit vectors. Subclasses add what is theirs."""

    def __init__(self, shape: TowersShape, layers: int | None = None) -> None:
        """`layers`: how many of BERT's layers are held, all unless given (a prompter needs the text's alone)."""
        super().__init__()
        self.shape = shape
        held = replace(shape.text, layers=layers or shape.text.layers)
        self.visual_encoder = VisualEncoder(shape.vision)
        self.text_encoder = TextEncoder(held, shape.vocabulary)
        self.vision_proj = nn.Linear(shape.vision.width, shape.projection)
        self.text_proj = nn.Linear(shape.text.width, shape.projection)
        self.temp = nn.Parameter(torch.tensor(shape.temperature))
        self.text_encoder.apply(initialise_as_bert)

    def video_tokens(self, frames: Tensor) -> Tensor:
        """Normalised frames [B, T, 3, S, S] -> [B, 1 + K, W]: [CLS], then every patch, averaged over time.

        Raises InputError if size or number of the frames do not fit.
        """
        seen = self.visual_encoder.model(frames)
        return torch.cat([seen.special, seen.patches.mean(1)], 1)

    def text_tokens(self, words: Packed) -> Packed:
        """Word ids with [CLS] … [SEP], int64 [N] -> states of the text layers [N, W]."""
        bert = self.text_encoder.bert
        return through(bert.encoder.layer[: self.shape.text_layers], embedded(bert, words))

    def projected_video(self, tokens: Tensor) -> Tensor:
        """[B, 1 + K, W] -> unit vectors [B, projection], from [CLS]."""
        return F.normalize(self.vision_proj(tokens[:, 0]), dim=-1)

    def projected_text(self, tokens: Packed) -> Tensor:
        """States -> unit vectors [B, projection], from [CLS]."""
        return F.normalize(self.text_proj(first_rows(tokens)), dim=-1)

    def video_features(self, frames: Tensor) -> Tensor:
        """Normalised frames [B, T, 3, S, S] -> unit vectors [B, projection]."""
        return self.projected_video(self.video_tokens(frames))

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Word ids [B, L] and their mask [B, L] -> unit vectors [B, projection]."""
        return self.projected_text(self.text_tokens(Packed.from_padded(ids, mask)))


def embedded(bert: Bert, words: Packed) -> Packed:
    """Word ids [N] -> word, position and token-type embeddings [N, W]."""
    tokens = bert.embeddings.word_embeddings(words.rows)
    return words.with_rows(bert.embeddings(tokens, words.positions, torch.zeros_like(words.positions)))
