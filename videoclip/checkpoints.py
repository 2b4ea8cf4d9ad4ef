"""Tensors and training state of any module on disk, so that a run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from videoclip.errors import InputError
from videoclip.files import atomic_path, read_json, write_json

WEIGHTS_FILE = "model.safetensors"


@dataclass
class TrainingState:
    """Everything that a resumed run needs: how far it is, besides weights and optimiser moments."""

    epoch: int = 0
    step: int = 0


def save_tensors(path: Path, module: nn.Module) -> None:
    """Write all parameters and buffers of a module as safetensors, atomically."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def load_tensors(path: Path, module: nn.Module, what: str = "this model") -> None:
    """Read what `save_tensors` wrote into a module of the same shape.

    Raises InputError if the file is missing, damaged, or not `what`.
    """
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # safetensors and load_state_dict raise many kinds for a file that does not fit
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: does not fit {what}: {reason}") from None


def save_checkpoint(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    run: Mapping[str, Any],
) -> None:
    """Write weights, optimiser and state into `folder`; `state.json` comes last and says that the rest is complete.

    `run` describes what is being trained (seed, data, configuration); a resume with another one is refused.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS_FILE, module)
    with atomic_path(folder / "optimizer.pt") as temporary:
        torch.save(optimizer.state_dict(), temporary)
    write_json(folder / "state.json", {**asdict(state), "run": run})


def load_checkpoint(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, run: Mapping[str, Any]
) -> TrainingState:
    """Continue from `save_checkpoint`. The random draws need no state: they follow from seed, epoch and step.

    Raises InputError if the checkpoint belongs to another run.
    """
    folder = Path(folder)
    values = read_json(folder / "state.json")
    stored, asked = values["run"], json.loads(json.dumps(run))
    if stored != asked:
        differing = sorted(key for key in {*stored, *asked} if stored.get(key) != asked.get(key))
        raise InputError(
            f"{folder}: the run here was started with other {', '.join(differing)}; "
            "give the same options to continue it, or another --output to start anew"
        )
    load_tensors(folder / WEIGHTS_FILE, module)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    return TrainingState(values["epoch"], values["step"])
