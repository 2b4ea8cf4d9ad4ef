"""Weights to start a training from: BERT's, as the paper does, or those of an earlier model of ours."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from videoclip.convert.bert import load_bert
from videoclip.errors import InputError
from videoclip.files import read_json
from videoclip.model import VideoCLIP
from videoclip.pretrained import CONFIG_FILE, find_folder
from videoclip.recipes import from_pretrained


def initialise(recipe: nn.Module, folder_or_id: Path | str) -> None:
    """Let a new module start from a folder or hub id: a BERT's, or that of a model of ours with the same shape.

    Raises InputError if there is none, or its tensors do not fit.
    """
    folder = find_folder(folder_or_id)
    if read_json(folder / CONFIG_FILE).get("model_type") == "bert":
        if not isinstance(recipe, VideoCLIP):
            raise InputError(f"{folder_or_id}: a BERT, which a {type(recipe).__module__} cannot start from")
        load_bert(recipe, folder)
        return
    source = from_pretrained(folder).state_dict()
    target = recipe.state_dict()
    names = sorted(source.keys() ^ target.keys())
    names += sorted(name for name in source.keys() & target.keys() if source[name].shape != target[name].shape)
    if names:
        raise InputError(
            f"{folder_or_id}: a model of another shape ({len(names)} tensors differ, for instance {names[0]}); "
            "give the same --model.* and --clips.max-* options as it was trained with"
        )
    recipe.load_state_dict(source)
