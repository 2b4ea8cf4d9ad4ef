"""What an evaluation looks at: a model, the shards that it is to read, and which annotated videos are among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar, cast

import torch

from videoclip.checkpoints import WEIGHTS_FILE
from videoclip.data.shards import FROZEN, Manifest, Shards, check_encoder
from videoclip.errors import InputError
from videoclip.files import sha256
from videoclip.recipes import from_pretrained
from videoclip.recipes.towers import frozen_towers
from videoclip.recipes.videoclip import Recipe


def is_frozen(model_folder: Path) -> bool:
    """Whether `--model frozen` was said; a model's folder of that name needs its whole path."""
    return str(model_folder) == FROZEN


def open_model(model_folder: Path, shards_folder: Path | None) -> tuple[Recipe, str]:
    """A model and what tells it from others: the digest of its weights, or for `frozen` the shards' fingerprint.

    Raises InputError if there is none, or `frozen` is said without shards.
    """
    if not is_frozen(model_folder):
        model, weights = from_pretrained(model_folder), model_folder / WEIGHTS_FILE
        return model, sha256(weights) if weights.is_file() else ""
    if shards_folder is None:
        raise InputError("--model frozen is the model that made a folder of shards: give --shards, too")
    return cast(Recipe, frozen_towers(shards_folder)), Manifest.read(shards_folder).fingerprint


class OfVideo(Protocol):
    """An annotation that belongs to one video."""

    @property
    def video_id(self) -> str: ...


AnnotationT = TypeVar("AnnotationT", bound=OfVideo)


def load_model_and_shards(model_folder: Path, shards_folder: Path) -> tuple[Recipe, Shards]:
    """A model, on the GPU if there is one, and the shards that it is to read.

    The model `frozen` is the two-tower model that made the shards, as it is.
    Raises InputError if the shards do not come from the encoder that the model was trained on, or are to be read by
    their own and it has no text side.
    """
    shards = Shards(shards_folder)
    model, _ = open_model(model_folder, shards_folder)
    if model.config.video_encoder:
        check_encoder(
            shards.manifest, model.config.video_encoder, "the encoder the model was trained on", shards_folder
        )
    return (model.to("cuda") if torch.cuda.is_available() else model), shards


def known_videos(items: Sequence[AnnotationT], shards: Shards) -> tuple[list[tuple[AnnotationT, int]], int]:
    """Those items whose video is in the shards, with its row; and how many are not.

    Raises InputError if none is.
    """
    rows = shards.rows_by_id()
    known = [(item, rows[item.video_id]) for item in items if item.video_id in rows]
    if not known:
        raise InputError(f"{shards.folder}: holds none of the {len(items)} annotated videos")
    return known, len(items) - len(known)
