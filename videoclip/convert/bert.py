"""BERT in, a VideoCLIP whose transformers start from it out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from videoclip.errors import InputError
from videoclip.model import VideoCLIP, VideoCLIPConfig


def from_bert(folder: Path | str, config: VideoCLIPConfig) -> VideoCLIP:
    """A VideoCLIP whose transformers start from BERT, as the paper's do; the token MLP starts at random.

    `folder` holds a BERT model with `config`'s width, at least its layers, and its vocabulary (safetensors). Of a
    video transformer with fewer layers, the first ones start from BERT's first.
    Raises InputError if a tensor is missing or does not fit.
    """
    positions = len(_read_bert(Path(folder))["embeddings.position_embeddings.weight"])
    model = VideoCLIP(replace(config, positions=min(config.positions, positions)))
    load_bert(model, folder)
    return model


def load_bert(model: VideoCLIP, folder: Path | str) -> None:
    """Let the transformers of a model start from BERT. Raises InputError as `from_bert` does."""
    path, config = Path(folder) / "model.safetensors", model.config
    stored = _read_bert(Path(folder))
    towers = ("mm_encoder.bert.",) if config.transformer == "shared" else ("video_encoder.bert.", "text_encoder.")
    state = model.state_dict()
    for name in state:
        tower = next((prefix for prefix in towers if name.startswith(prefix)), None)
        if tower is None:
            continue
        source = stored.get(name.removeprefix(tower))
        if source is None:
            raise InputError(f"{path}: lacks {name.removeprefix(tower)}; not a BERT of {config.layers} layers")
        if len(state[name]) == 2 and name.endswith("word_embeddings.weight"):
            source = source[torch.tensor([config.cls_id, config.sep_id])]
        if "position_embeddings" in name:
            source = source[: config.positions]
        if source.shape != state[name].shape:
            wanted = tuple(state[name].shape)
            raise InputError(f"{path}: {name} is {tuple(source.shape)}, the configuration wants {wanted}")
        state[name] = source
    model.load_state_dict(state)


def _read_bert(folder: Path) -> dict[str, Tensor]:
    """The tensors of a BERT folder by the names that they have below `bert.`."""
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file; a BERT folder with safetensors weights is needed")
    stored = {name.removeprefix("bert."): tensor for name, tensor in load_file(path).items()}
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        stored = {name.replace(old, new): tensor for name, tensor in stored.items()}  # as old BERT files call them
    if "embeddings.position_embeddings.weight" not in stored:
        raise InputError(f"{path}: lacks embeddings.position_embeddings.weight; not a BERT")
    return stored
