"""What models on frames share: their folder, their tokenizer, and clips of one frame a second out of shards.

Shards of the encoder `pixels-64` (`videoclip/encoders/pixels.py`) hold a video's frames, one a second, in the place of
tokens. So a recipe on pixels is trained, clustered, evaluated and searched by the same stages as one on tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from videoclip.data.clips import ClipBatch
from videoclip.data.frames import FrameBatch, choose_frames, random_crop_of_patches
from videoclip.data.shards import Manifest
from videoclip.data.words import WordTokenizer
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.errors import InputError
from videoclip.files import read_json
from videoclip.packed import Packed
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

ConfigT = TypeVar("ConfigT")


class PixelModel(nn.Module):
    """Saving, loading and the frozen parts of a model on frames. Subclasses set `recipe`, `config_class`, `config`."""

    recipe: ClassVar[str]
    config_class: ClassVar[type]
    config: Any

    def __init__(self) -> None:
        super().__init__()
        self.frozen = FrozenParts()

    def tokenizer(self) -> WordTokenizer:
        """The tokenizer of the model's folder. Raises InputError if there is none."""
        return self.frozen.need_tokenizer()

    def frozen_video_encoder(self) -> VideoEncoder:
        """What turned videos into the frames that the model was trained on."""
        return self.frozen.need_video_encoder(self.config.video_encoder)

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


def as_frames(tokens: Packed, size: int) -> Packed:
    """Rows of shards, float [N, size * size * 3] holding 0 … 255 -> uint8 [N, size, size, 3]; frames stay as they are.

    Raises InputError if the rows are no frames of that size.
    """
    rows = tokens.rows
    if rows.ndim == 2 and rows.shape[1] == size * size * 3:
        return tokens.with_rows(rows.to(torch.uint8).unflatten(1, (size, size, 3)))
    if rows.ndim != 4 or rows.shape[1:] != (size, size, 3) or rows.dtype != torch.uint8:
        raise InputError(
            f"rows {list(rows.shape)} are no frames of {size} x {size}: extract with --encoder pixels-{size}"
        )
    return tokens


def frame_batch(batch: ClipBatch | FrameBatch, size: int, frames: int, grid: int, sampler: str) -> FrameBatch:
    """Pairs drawn from shards of frames -> clips of `frames` frames each, a crop each, and a generator.

    All that is drawn follows from the batch itself, so a resumed run draws the same again.
    """
    if isinstance(batch, FrameBatch):
        return batch
    clips = as_frames(batch.video_tokens, size)
    seed = zlib.crc32(batch.word_ids.rows.cpu().numpy().tobytes(), zlib.crc32(batch.video.cpu().numpy().tobytes()))
    generator = np.random.default_rng(seed)
    chosen = [
        start + choose_frames(length, frames, sampler, generator)
        for start, length in zip(clips.starts.tolist(), clips.lengths.tolist())
    ]
    crops = [random_crop_of_patches(grid, generator, patch=size // grid) for _ in chosen]
    return FrameBatch(
        clips.rows[torch.from_numpy(np.stack(chosen)).to(clips.rows.device)],
        batch.word_ids.to(batch.word_ids.rows.device, torch.int64),
        torch.Generator().manual_seed(seed),
        torch.from_numpy(np.stack(crops)),
        excluded=_excluded(batch),
        rows_per_rank=batch.rows_per_rank,
    )


def _excluded(batch: ClipBatch) -> Tensor | None:
    """bool [P, P]: own pairs that are no negatives of each other, where the batch says so."""
    if batch.labels is None:
        return None
    from videoclip.retrieval.false_negatives import false_negatives

    return false_negatives(batch.labels, batch.labels, 0)


def frame_size(manifest: Manifest) -> int:
    """Height and width of the frames in shards. Raises InputError if they hold something else."""
    name, _, size = manifest.encoder.rpartition("-")
    if name != "pixels" or not size.isdigit() or int(size) ** 2 * 3 != manifest.dimension:
        raise InputError(
            f"shards of the encoder {manifest.encoder} hold tokens, and this recipe is trained from frames: "
            "extract with --encoder pixels-64"
        )
    return int(size)
