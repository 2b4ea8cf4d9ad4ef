"""Systems that can be trained, one file each, and the table of their names.

A recipe's file holds `Options` (a frozen dataclass, the published constants as defaults), `Recipe` (the module that
is trained: `forward(batch)` returns named losses and figures, "loss" being what is stepped on) and
`build(options, manifest, tokenizer)`. docs/extending.md says how to add one.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from videoclip.errors import InputError
from videoclip.pretrained import find_folder, read_recipe_name

if TYPE_CHECKING:
    from torch import nn

    from videoclip.data.shards import Manifest
    from videoclip.data.words import WordTokenizer
    from videoclip.recipes.videoclip import Recipe as VideoCLIPRecipe

RECIPES = {
    "videoclip": "videoclip.recipes.videoclip",
    "margin": "videoclip.recipes.margin",
    "fusion": "videoclip.recipes.fusion",
    "frozen-in-time": "videoclip.recipes.frozen_in_time",
    "alpro": "videoclip.recipes.alpro",
    "prompting": "videoclip.recipes.prompting",
    "towers": "videoclip.recipes.towers",
    "alignment": "videoclip.recipes.alignment",
}


class RecipeFile(Protocol):
    """What a recipe's file holds."""

    Options: type[Any]
    Recipe: type[Any]

    def build(self, options: Any, manifest: Manifest, tokenizer: WordTokenizer) -> nn.Module:
        """A new module for shards and a tokenizer."""


def recipe_named(name: str) -> RecipeFile:
    """Import a recipe's file. Raises InputError if the table has no such name."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return cast(RecipeFile, import_module(RECIPES[name]))


def from_pretrained(folder_or_id: Path | str) -> VideoCLIPRecipe:
    """The model in a folder or of a hub id, whichever recipe made it: `config.json` names it.

    Typed as what evaluation and search need of it. Raises InputError if there is none, or its parts do not fit.
    """
    folder = find_folder(folder_or_id)
    model: VideoCLIPRecipe = recipe_named(read_recipe_name(folder)).Recipe.from_pretrained(folder)
    return model
