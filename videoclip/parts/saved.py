"""Towers that are saved to a folder and read from it, for recipes that are no VideoCLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from videoclip.pretrained import FrozenParts, ModelCard, save_card, save_model
from videoclip.two_towers import EncodesFiles


class SavedTowers(EncodesFiles, nn.Module):
    """A module with `config`, `embed_video` and `embed_text`, and the frozen parts that it belongs to."""

    recipe: ClassVar[str]
    """What `config.json` names: the file in `videoclip/recipes/` that trains this."""
    config: Any
    """A frozen dataclass with what `embedding.TwoTowersConfig` names, and `describe()`."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = FrozenParts()

    def save_pretrained(self, folder: Path | str, card: ModelCard | None = None, **_: object) -> None:
        """Write `config.json`, `model.safetensors`, a card, and the tokenizer and frozen encoders that are there."""
        folder = Path(folder)
        save_model(folder, self, self.config, self.recipe)
        save_card(folder, card or ModelCard(), self.config.describe())
        self.frozen.save(folder)
