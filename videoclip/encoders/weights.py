"""Reading weight files of strangers: tensors and nothing else, and only those that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videoclip.errors import InputError


def read_checkpoint(path: Path, allowed: Sequence[type] = (), advice: str = "") -> Any:
    """`torch.load` with `weights_only=True`: other classes than the `allowed` are refused, never run.

    `advice` ends the error's line.

    Raises InputError if the file is missing, damaged, or holds foreign classes.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is no checkpoint
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a weights file that can be read safely ({first_line}){advice}") from None


def read_tensors(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """A state dict: the file's own, or the one that it holds under `key`.

    Raises InputError if the file holds something else.
    """
    stored = read_checkpoint(path)
    if key is not None:
        stored = stored.get(key) if isinstance(stored, dict) else None
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        layout = f"{{{key!r}: ...}}" if key else "a state dict"
        raise InputError(f"{path}: expected {layout} of tensors by name")
    return dict(stored)


def load_checked(
    module: nn.Module,
    state: Mapping[str, Tensor],
    path: Path,
    what: str = "the weights of this network",
    most: int = 5,
) -> None:
    """Load `state` into `module`. Raises InputError as `check_names` does."""
    check_names(module, state, path, what, most)
    module.load_state_dict(state)


def check_names(module: nn.Module, state: Mapping[str, Tensor], path: Path, what: str, most: int = 5) -> None:
    """Raises InputError, naming `most` of what differs, unless names and shapes are exactly the module's."""
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    misshapen = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    if missing or unknown or misshapen:
        lists = (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
        details = "; ".join(f"{len(names)} {kind}: {_some(names, most)}" for kind, names in lists if names)
        raise InputError(f"{path}: not {what}: {details}")


def _some(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
