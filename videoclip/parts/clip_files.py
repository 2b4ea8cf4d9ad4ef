"""A CLIP from its public files: Hugging Face's folders, OpenAI's archives, a bare state dict. Nothing in them is run.

OpenAI's `ViT-B-16.pt` is a TorchScript archive: a zip of one pickle that names stored tensors, the tensors, and code.
Here only the tensors are read, by an unpickler that knows nothing else.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videoclip.encoders.weights import load_checked, read_tensors
from videoclip.errors import InputError
from videoclip.files import read_json
from videoclip.parts.clip import Activation, Clip, read_clip_config

MOST_BYTES = 8 << 30  # of one archive's tensors; the largest CLIP has 2 GB
BUFFERS = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI stores beside the weights
DTYPES = {
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
# Hugging Face's name of a block's part -> OpenAI's; query, key and value become one matrix.
BLOCK_PARTS = (
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
# The rest, as (Hugging Face, OpenAI, whether it is stored the other way round).
NAMES = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight", False),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding", False),
    ("text_model.final_layer_norm.weight", "ln_final.weight", False),
    ("text_model.final_layer_norm.bias", "ln_final.bias", False),
    ("text_projection.weight", "text_projection", True),
    ("logit_scale", "logit_scale", False),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding", False),
    ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight", False),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding", False),
    ("vision_model.pre_layrnorm.weight", "visual.ln_pre.weight", False),
    ("vision_model.pre_layrnorm.bias", "visual.ln_pre.bias", False),
    ("vision_model.post_layernorm.weight", "visual.ln_post.weight", False),
    ("vision_model.post_layernorm.bias", "visual.ln_post.bias", False),
    ("visual_projection.weight", "visual.proj", True),
)


def read_clip(path_or_folder: Path | str) -> Clip:
    """A CLIP, frozen and in float32, from a Hugging Face folder, OpenAI's archive, or a file with a state dict.

    Raises InputError if it cannot be read safely, or if names are missing or unknown; it lists them.
    """
    path = Path(path_or_folder)
    heads, activation = (0, 0), "quick_gelu"
    if path.is_dir():
        state, heads, activation = _read_hugging_face(path)
        path = path / "model.safetensors"
    elif zipfile.is_zipfile(path) and _is_torchscript(path):
        state = read_torchscript(path)
    else:
        state = read_tensors(path)
    state = {name: tensor.float() for name, tensor in state.items() if name not in BUFFERS}
    return build_clip(state, path, heads, activation)  # type: ignore[arg-type]  # one of the two


def build_clip(
    state: dict[str, Tensor], path: Path, heads: tuple[int, int] = (0, 0), activation: Activation = "quick_gelu"
) -> Clip:
    """A CLIP from tensors by OpenAI's names. Raises InputError, with what is missing or unknown."""
    try:
        config = read_clip_config(state, heads, activation)
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not a CLIP: missing {error}") from None
    clip = Clip(config)
    load_checked(clip, state, path, "a CLIP", most=20)
    return clip.requires_grad_(False).eval()


def _read_hugging_face(folder: Path) -> tuple[dict[str, Tensor], tuple[int, int], str]:
    """Tensors by OpenAI's names, heads of text and image side, and the activation."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    values = read_json(folder / "config.json")
    try:
        text, image = values["text_config"], values["vision_config"]
        heads = int(text.get("num_attention_heads", 8)), int(image.get("num_attention_heads", 12))
        activations = {side.get("hidden_act", "quick_gelu") for side in (text, image)}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'}: not a CLIP's configuration (missing {error})") from None
    if len(activations) != 1 or not activations <= {"quick_gelu", "gelu"}:
        raise InputError(f"{folder / 'config.json'}: hidden_act {', '.join(sorted(activations))} is not known here")
    path = folder / "model.safetensors"
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not weights that can be read safely ({str(error).splitlines()[0]})") from None
    return _openai_names(stored), heads, activations.pop()


def _openai_names(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors by OpenAI's names; those without one keep theirs, and are then named as unknown."""
    left = {name: tensor for name, tensor in stored.items() if not name.endswith("position_ids")}
    state = {}
    for theirs, ours, turned in NAMES:
        if theirs in left:
            tensor = left.pop(theirs)
            state[ours] = tensor.T.contiguous() if turned else tensor
    for side, prefix in (("text_model.", "transformer."), ("vision_model.", "visual.transformer.")):
        start = f"{side}encoder.layers."
        numbers = {name.removeprefix(start).split(".")[0] for name in left if name.startswith(start)}
        for number in numbers:
            theirs, ours = f"{start}{number}.", f"{prefix}resblocks.{number}."
            for kind in ("weight", "bias"):
                split = [f"{theirs}self_attn.{part}_proj.{kind}" for part in "qkv"]
                if all(name in left for name in split):
                    state[f"{ours}attn.in_proj_{kind}"] = torch.cat([left.pop(name) for name in split])
                for old, new in BLOCK_PARTS:
                    if f"{theirs}{old}.{kind}" in left:
                        state[f"{ours}{new}.{kind}"] = left.pop(f"{theirs}{old}.{kind}")
    return {**state, **left}


# --- TorchScript archives, without running them -------------------------------------------------------------------


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive by name; its code is neither compiled nor run.

    Raises InputError if the file is damaged, too large, or its pickle wants anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            root = next(name for name in sizes if name.endswith("/data.pkl")).removesuffix("data.pkl")
            if sum(size for name, size in sizes.items() if name.startswith(root)) > MOST_BYTES:
                raise InputError(f"{path}: tensors of more than {MOST_BYTES >> 30} GB; not a CLIP")
            module = _TensorUnpickler(io.BytesIO(archive.read(f"{root}data.pkl")), archive, f"{root}data/").load()
    except (zipfile.BadZipFile, StopIteration, pickle.UnpicklingError, KeyError, EOFError, ValueError) as error:
        raise InputError(f"{path}: not a TorchScript archive that can be read safely ({error})") from None
    state: dict[str, Tensor] = {}
    _collect(module, "", state)
    if not state:
        raise InputError(f"{path}: a TorchScript archive without tensors")
    return state


class _Module:
    """What stands for every class of an archive: its attributes, and no behaviour."""

    def __init__(self, *_: object) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.attributes = dict(state) if isinstance(state, dict) else {}


def _collect(module: object, prefix: str, state: dict[str, Tensor]) -> None:
    if isinstance(module, _Module):
        for name, value in module.attributes.items():
            if isinstance(value, Tensor):
                state[f"{prefix}{name}"] = value
            else:
                _collect(value, f"{prefix}{name}.", state)


class _TensorUnpickler(pickle.Unpickler):
    """Knows how tensors are put together, and stands-in for the archive's own classes. Everything else is refused."""

    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        """Only what rebuilds tensors is found; the rest is refused by name."""
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch.jit._pickle" and re.fullmatch(r"build_\w+list|restore_type_tag", name):
            return _plain_value
        raise pickle.UnpicklingError(f"it wants {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        """The storage of a tensor."""
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not re.fullmatch(r"\w+", str(key)):
            raise pickle.UnpicklingError("it stores something that is no tensor")
        stored = bytearray(self._archive.read(f"{self._folder}{key}"))
        return torch.frombuffer(stored, dtype=dtype) if stored else torch.empty(0, dtype=dtype)


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """A tensor of its own from a storage. `as_strided` refuses what lies outside of it."""
    try:
        return storage.as_strided(size, stride, offset).clone()
    except (RuntimeError, TypeError) as error:
        raise pickle.UnpicklingError(f"a tensor outside its storage ({str(error).splitlines()[0]})") from None


def _plain_value(value: object, *_: object) -> object:
    return value
