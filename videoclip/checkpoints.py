"""Tensors and training state of any module on disk, so that a run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videoclip.errors import InputError
from videoclip.files import atomic_path, read_json, sha256, write_json

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "state.json"


@dataclass
class TrainingState:
    """Everything that a resumed run needs: how far it is, besides weights and optimiser moments."""

    epoch: int = 0
    step: int = 0
    place: int = 0
    """Steps done in the present epoch."""
    random: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    """This worker's random state in the checkpoint that was loaded; empty where it comes from other workers."""


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


# --- Checkpoints: one file of tensors a worker, and `state.json`, which comes last and says that all are there --------


def snapshot(module: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0, workers: int = 1) -> dict[str, Tensor]:
    """Copies on the CPU of this worker's share of weights and moments, and its random state: what its file will hold.

    All workers hold the same tensors; each copies and writes about the same number of bytes.
    """
    tensors = {f"weights/{name}": tensor for name, tensor in module.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"moments/{number}/{name}": value for name, value in values.items() if isinstance(value, Tensor)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    before, share = 0, {}
    for name, tensor in tensors.items():
        middle = before + tensor.nbytes // 2
        if middle * workers // max(1, total) == rank:
            share[name] = tensor.detach().to("cpu", copy=True).contiguous()
        before += tensor.nbytes
    share["random/cpu"] = torch.get_rng_state()
    if next(module.parameters()).is_cuda:
        share["random/cuda"] = torch.cuda.get_rng_state()
    return share


def write_share(folder: Path, share: dict[str, Tensor], rank: int = 0, workers: int = 1) -> None:
    """Write a worker's `snapshot` into a checkpoint's folder, and beside it its checksum."""
    from safetensors.torch import save_file

    path = Path(folder) / share_name(rank, workers)
    with atomic_path(path) as temporary:
        save_file(share, temporary)
        digest = sha256(temporary)
    write_json(path.with_suffix(".json"), {"sha256": digest})


def share_name(rank: int, workers: int) -> str:
    """The file of a worker in a checkpoint's folder."""
    return f"share-{rank:05d}-of-{workers:05d}.safetensors"


def is_written(folder: Path, workers: int) -> bool:
    """Whether the shares of all workers are there."""
    names = [share_name(rank, workers) for rank in range(workers)]
    return all((Path(folder) / name).with_suffix(".json").exists() for name in names)


def finish_checkpoint(folder: Path, state: TrainingState, run: Mapping[str, Any], workers: int = 1) -> None:
    """Write `state.json` when all shares are there: from now on the checkpoint is one.

    `run` describes what is being trained (seed, data, configuration); a resume with another one is refused.
    """
    names = [share_name(rank, workers) for rank in range(workers)]
    digests = {name: read_json((Path(folder) / name).with_suffix(".json"))["sha256"] for name in names}
    place = {"epoch": state.epoch, "step": state.step, "place": state.place}
    write_json(Path(folder) / STATE_FILE, {**place, "workers": workers, "files": digests, "run": run})


def save_checkpoint(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    run: Mapping[str, Any],
) -> None:
    """Write a whole checkpoint into `folder` from the only worker. `run` as in `finish_checkpoint`."""
    write_share(folder, snapshot(module, optimizer))
    finish_checkpoint(folder, state, run)


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, by their checksums; empty if nothing is."""
    try:
        files = read_json(Path(folder) / STATE_FILE)["files"]
    except (InputError, KeyError, TypeError):
        return f"{STATE_FILE} is not that of a checkpoint"
    for name, digest in files.items():
        path = Path(folder) / Path(name).name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} is not what was written"
    return ""


def load_checkpoint(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, run: Mapping[str, Any], rank: int = 0
) -> TrainingState:
    """Continue, on any number of workers. The draws of batches need no state: they follow from seed, epoch and step.

    Raises InputError if the checkpoint belongs to another run, or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    values = read_json(folder / STATE_FILE)
    stored, asked = values["run"], json.loads(json.dumps(run))
    if stored != asked:
        differing = sorted(key for key in {*stored, *asked} if stored.get(key) != asked.get(key))
        raise InputError(
            f"{folder}: the run here was started with other {', '.join(differing)}; "
            "give the same options to continue it, or another --output to start anew"
        )
    tensors: dict[str, Tensor] = {}
    random: dict[str, Tensor] = {}
    try:
        for name in values["files"]:
            share = load_file(folder / Path(name).name)
            of_random = {key: share.pop(key) for key in list(share) if key.startswith("random/")}
            random = of_random if name == share_name(rank, values["workers"]) else random
            tensors |= share
        module.load_state_dict(_below("weights/", tensors))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: does not fit this model: {reason}") from None
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _below("moments/", tensors).items():
        number, _, name = key.partition("/")
        moments.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return TrainingState(values["epoch"], values["step"], values["place"], random)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def restore_random_state(random: Mapping[str, Tensor]) -> None:
    """Let this worker's dropout go on where it was when its `snapshot` was taken."""
    torch.set_rng_state(random["random/cpu"])
    if "random/cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["random/cuda"])
