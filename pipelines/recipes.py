"""What can be trained: the table of recipes, printed."""

from __future__ import annotations

from dataclasses import dataclass

from videoclip.recipes.about import ABOUT


@dataclass(frozen=True)
class RecipesConfig:
    """Print the recipes: name, paper, what each needs, and what is approximate."""


def print_recipes(config: RecipesConfig) -> None:
    """The table, one recipe a paragraph."""
    for name, about in ABOUT.items():
        print(f"{name}: {about.paper}")
        print(f"  needs: {about.needs}")
        print(f"  approximate: {about.approximate}\n")
    print("Train one: videoclip pretrain --recipe NAME …; its options: videoclip pretrain --recipe NAME --help")
