"""What recipes on frames have in common: the sizes that `--model.*` sets, and the shapes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

from videoclip.data.shards import Manifest
from videoclip.parts.frame_batches import frame_size
from videoclip.parts.vision_blocks import VisionShape
from videoclip.transformer import TransformerShape

SHORTEST_TEXTS = 64  # positions that a text tower has at least: questions and prompts may be longer than captions


@dataclass(frozen=True)
class FrameOptions:
    """Sizes. The defaults are those of ViT-B/16 and BERT-base."""

    patch: int = 16
    frames: int = 4
    """Most frames of a clip."""
    width: int = 768
    heads: int = 12
    vision_layers: int = 12
    text_layers: int = 6
    projection: int = 256
    """Width of an embedding."""
    temperature: float = 0.07
    dropout: float = 0.1
    max_seconds: int = 0
    """Longest video clip; 0: that of the training clips."""
    max_words: int = 0
    """Longest text; 0: that of the training clips."""

    def vision(self, manifest: Manifest, attention: str = "divided", drop_path: float = 0.0) -> VisionShape:
        """For the frames in shards. Raises InputError if these hold none, or the sizes do not fit each other."""
        return VisionShape(
            frame_size(manifest),
            self.patch,
            frames=self.frames,
            width=self.width,
            layers=self.vision_layers,
            heads=self.heads,
            intermediate=4 * self.width,
            attention=attention,
            drop_path=drop_path,
        )

    def text(self, layers: int) -> TransformerShape:
        """A BERT of so many layers."""
        positions = max(SHORTEST_TEXTS, self.max_words + 2)
        return TransformerShape(self.width, self.heads, 4 * self.width, layers, self.dropout, positions)
