"""A model's folder or hub id: weights, configuration, tokenizer, frozen encoders and card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from videoclip.checkpoints import WEIGHTS_FILE, load_tensors, save_tensors
from videoclip.data.words import WordTokenizer
from videoclip.encoders.catalog import load_video_encoder
from videoclip.encoders.text import FrozenTextEncoder
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.errors import InputError
from videoclip.files import read_json, write_json, write_text
from videoclip.storage import local_copy

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CONFIG_FILE = "config.json"
RECIPE_KEY = "recipe"  # in CONFIG_FILE, beside the configuration's own fields
ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


@dataclass
class FrozenParts:
    """What a trained model needs around it and does not train. What is None is read from `folder` when needed."""

    tokenizer: WordTokenizer | None = None
    video_encoder: VideoEncoder | None = None
    text_encoder: FrozenTextEncoder | None = None
    folder: Path | None = None

    def need_tokenizer(self) -> WordTokenizer:
        """Raises InputError if there is none."""
        if self.tokenizer is None:
            self.tokenizer = WordTokenizer.load(self._folder("tokenizer"))
        return self.tokenizer

    def need_video_encoder(self, fingerprint: str = "") -> VideoEncoder:
        """The frozen video encoder; with a `fingerprint`, that very one.

        Raises InputError if there is none, or another.
        """
        if self.video_encoder is None:
            with torch.inference_mode(False):  # weights made inside it could never be told apart from changed ones
                self.video_encoder = load_video_encoder(self._folder("video encoder"))
        if fingerprint and self.video_encoder.fingerprint() != fingerprint:
            raise InputError(f"{self.folder}: its video encoder is not the one that this model was trained on")
        return self.video_encoder

    def need_text_encoder(self, folder_or_id: str = "") -> FrozenTextEncoder:
        """The frozen text encoder: that of the hub id, or the copy in the model's folder.

        Raises InputError if there is none.
        """
        if self.text_encoder is None:
            with torch.inference_mode(False):
                self.text_encoder = FrozenTextEncoder(
                    folder_or_id or str(self._folder("text encoder") / "text_encoder")
                )
        return self.text_encoder

    def save(self, folder: Path) -> None:
        """Write those that are there into a model's folder."""
        for part in (self.tokenizer, self.video_encoder, self.text_encoder):
            if part is not None:
                part.save(folder)

    def _folder(self, name: str) -> Path:
        if self.folder is None:
            raise InputError(f"this model has no {name}: load it with from_pretrained, or set it in its frozen parts")
        return self.folder


@dataclass(frozen=True)
class ModelCard:
    """What a model's README says besides its shape. `scores`: figure -> value, as evaluation wrote them."""

    data: str = "not recorded"
    video_encoder: str = "not recorded"
    license: str = "mit"
    scores: tuple[tuple[str, float], ...] = ()

    def render(self, lines: Mapping[str, str]) -> str:
        """Markdown, with the header that the hub reads. `lines`: what the model says of itself, heading -> words."""
        scores = "\n".join(f"| {name} | {value:.2f} |" for name, value in self.scores)
        table = f"\n| figure | value |\n|---|---|\n{scores}\n" if scores else " none recorded\n"
        said = {"Data": self.data, "Video encoder": self.video_encoder, **lines, "Licence": self.license}
        return (
            f"---\nlicense: {self.license}\nlibrary_name: videoclip\n"
            "tags: [video-text-retrieval, moment-retrieval]\n---\n"
            "# VideoCLIP\n\nVideo and text clips in one space, learned from narration (Xu et al., EMNLP 2021).\n\n"
            + "".join(f"- {name}: {value}\n" for name, value in said.items())
            + f"- Scores:{table}"
        )


def save_model(folder: Path, module: nn.Module, config: DataclassInstance, recipe: str) -> None:
    """Write `config.json` and `model.safetensors` alone."""
    folder = Path(folder)
    save_tensors(folder / WEIGHTS_FILE, module)
    write_json(folder / CONFIG_FILE, {RECIPE_KEY: recipe, **asdict(config)})


def save_card(folder: Path, card: ModelCard, lines: Mapping[str, str]) -> None:
    """Write `README.md`."""
    write_text(Path(folder) / "README.md", card.render(lines))


def read_config(folder: Path, config_class: type[ConfigT]) -> ConfigT:
    """The configuration in a model's folder. Raises InputError if it is of another kind."""
    values = _read_values(folder)
    unknown = set(values) - {item.name for item in fields(config_class)} - {RECIPE_KEY}
    if unknown:
        raise InputError(
            f"{folder / CONFIG_FILE}: not a {config_class.__name__} (unknown: {', '.join(sorted(unknown))})"
        )
    try:
        return config_class(**{name: value for name, value in values.items() if name != RECIPE_KEY})
    except TypeError as error:
        raise InputError(f"{folder / CONFIG_FILE}: not a {config_class.__name__} ({error})") from None


def read_recipe_name(folder: Path) -> str:
    """The recipe that made the model in a folder; models from before there were recipes are VideoCLIPs."""
    return str(_read_values(folder).get(RECIPE_KEY, "videoclip"))


def load_weights(folder: Path, module: nn.Module) -> None:
    """Raises InputError if the weights in a model's folder do not fit its configuration."""
    load_tensors(folder / WEIGHTS_FILE, module, CONFIG_FILE)


def _read_values(folder: Path) -> dict[str, Any]:
    values = read_json(folder / CONFIG_FILE)
    if not isinstance(values, dict):
        raise InputError(f"{folder / CONFIG_FILE}: not a model's configuration (no object)")
    return values


def find_folder(folder_or_id: Path | str) -> Path:
    """A model's folder, fetched if `folder_or_id` is a hub id or names one in a store.

    Raises InputError if it is neither.
    """
    folder = local_copy(Path(folder_or_id))
    if (folder / CONFIG_FILE).is_file():
        return folder
    if folder.exists() or str(folder_or_id).startswith((".", "/", "~")) or str(folder_or_id).count("/") != 1:
        raise InputError(f"{folder}: no model here (a model folder holds {CONFIG_FILE} and {WEIGHTS_FILE})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(str(folder_or_id), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder_or_id}: neither a model folder nor a model on the hub ({reason})") from None
