"""Checkpoints of the public release of collaborative experts and TeachText: CE and MoEE, whatever their sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from videoclip.data.pickles import read_torch_file, tensors_by_name
from videoclip.encoders.weights import load_checked
from videoclip.errors import InputError
from videoclip.recipes.experts import Experts, ExpertsConfig

# What old files hold and no released model uses.
UNUSED = re.compile(r"^ce\.(moe_fc_bottleneck1|moe_cg|moe_fc_proj)\.")


def from_collaborative_experts(path: Path | str) -> Experts:
    """Read `trained_model.pth`: its `state_dict`, or a bare one; nothing else that it pickles is looked at.

    All sizes are read off the tensors. Names of experts are not among them: `similarities` takes the experts under
    any names and sorts them, as the release does; `audio`, `speech` and `ocr` keep theirs. The model pads nothing:
    give sequences with the number of rows that it was trained with (37 words for MSR-VTT), zeros included.

    Raises InputError if the file cannot be read safely, or if names are missing or unknown; it lists them.
    """
    path = Path(path)
    stored = read_torch_file(path)
    if isinstance(stored, Mapping) and "state_dict" in stored:
        stored = stored["state_dict"]
    state = {
        name.removeprefix("module."): tensor  # as torch's DataParallel writes them
        for name, tensor in tensors_by_name(stored, path).items()
        if not UNUSED.match(name.removeprefix("module."))
    }
    config = _config(path, state)
    with torch.device("meta"):  # a quarter of a billion numbers need not be drawn first
        model = Experts(config)
    model.to_empty(device="cpu")
    load_checked(model, state, path, "a checkpoint of collaborative experts", most=20)
    return model.eval()


def _config(path: Path, state: Mapping[str, Tensor]) -> ExpertsConfig:
    collaborative = any(name.startswith(("ce.video_dim_reduce.", "ce.g_reason")) for name in state)
    unit = "ce.video_dim_reduce.{}.fc.weight" if collaborative else "ce.video_GU.{}.fc.weight"
    try:
        text_dimension, columns = state["text_pooling.clusters"].shape
        clusters = state["text_pooling.clusters2"].shape[2]
        experts = [state[unit.format(m)].shape for m in range(len(state["ce.moe_fc.weight"]))]
        pooled = sorted({name.split(".")[1] for name in state if name.startswith("pooling.")})
        sizes = [(name, *state[f"pooling.{name}.clusters2"].shape[1:]) for name in pooled]
        return ExpertsConfig(
            names=(),
            widths=tuple(width for _, width in experts),
            outputs=tuple(output for output, _ in experts),
            pooled=tuple((name, width, columns) for name, width, columns in sizes),
            text_dimension=text_dimension,
            text_clusters=clusters,
            text_ghosts=columns - clusters,
            collaborative=collaborative,
            masked=False,
        )
    except KeyError as error:
        raise InputError(f"{path}: not a checkpoint of collaborative experts: missing {error}") from None
    except (ValueError, IndexError, TypeError):
        raise InputError(f"{path}: not a checkpoint of collaborative experts: tensors of another shape") from None
