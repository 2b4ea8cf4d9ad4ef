"""What models on frames share beside their mathematics: their folder, their tokenizer, their frozen parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from torch import nn
from typing_extensions import Self

from videoclip.errors import InputError
from videoclip.files import read_json
from videoclip.pretrained import (
    CONFIG_FILE,
    RECIPE_KEY,
    FrozenParts,
    ModelCard,
    find_folder,
    load_weights,
    save_card,
    save_model,
)
from videoclip.two_towers import HasFrozenParts

ConfigT = TypeVar("ConfigT")


class FrameModel(HasFrozenParts, nn.Module):
    """Saving, loading and the frozen parts of a model on frames. Subclasses set `recipe`, `config_class`, `config`."""

    recipe: ClassVar[str]
    config_class: ClassVar[type]
    config: Any

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.frozen = FrozenParts()

    def save_pretrained(self, folder: Path | str, card: ModelCard | None = None) -> None:
        """Write `config.json`, `model.safetensors`, the tokenizer and a card."""
        save_model(Path(folder), self, self.config, self.recipe)
        save_card(Path(folder), card or ModelCard(), {"Recipe": self.recipe})
        self.frozen.save(Path(folder))

    @classmethod
    def from_pretrained(cls, folder_or_id: Path | str) -> Self:
        """Read a model from a folder, or from a hub id. Raises InputError if it is neither, or parts do not fit."""
        folder = find_folder(folder_or_id)
        model = cls.restore(read_nested(folder, cls.config_class, cls.recipe))
        load_weights(folder, model)
        model.frozen.folder = folder
        return model.eval()

    @classmethod
    def restore(cls, config: Any) -> Self:
        """A model of this configuration, whose weights are about to be loaded."""
        return cls(config)


def read_nested(folder: Path, config_class: type[ConfigT], recipe: str) -> ConfigT:
    """The configuration in a model's folder, dataclasses within dataclasses. Raises InputError if it is another."""
    values = read_json(folder / CONFIG_FILE)
    if not isinstance(values, dict) or values.pop(RECIPE_KEY, None) != recipe:
        raise InputError(f"{folder / CONFIG_FILE}: not a model of the recipe {recipe!r}")
    try:
        return _restore(config_class, values)
    except (TypeError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG_FILE}: not a {config_class.__name__} ({error})") from None


def _restore(kind: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    hints = get_type_hints(kind)
    unknown = set(values) - {item.name for item in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise TypeError(f"unknown: {', '.join(sorted(unknown))}")
    made = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            made[name] = _restore(hints[name], value)
        else:
            made[name] = _tuples(value)
    return kind(**made)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
