"""Public files of vision transformers into ours: ViT, DeiT, TimeSformer, VideoMAE and Frozen in Time's towers.

Files of timm, of the releases and of transformers differ in names only; the table of renames stands here. What a
picture's transformer lacks, time, starts as the releases start it: attention through time copied from space with its
last layer at zero (TimeSformer, ALPRO), or looking nowhere (Frozen in Time).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from videoclip.encoders.weights import load_checked, read_checkpoint
from videoclip.errors import InputError
from videoclip.parts.vision_transformer import VisionShape, VisionTransformer

HEAD_WIDTH = 64  # of every published size; heads cannot be read off the tensors

# What files call otherwise, in the order in which it is renamed.
RENAMES = (
    (
        r"^(module\.|model\.|encoder\.(?=blocks|patch_embed|norm)|video_model\.|vit\.|deit\.|timesformer\.|videomae\.)+",
        "",
    ),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.time_embeddings$", "time_embed"),
    (r"^temporal_embed$", "time_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.temporal_layernorm\.", ".temporal_norm1."),
    (r"\.temporal_dense\.", ".temporal_fc."),
    (r"\.temporal_attention\.output\.dense\.", ".temporal_attn.proj."),
    (r"\.temporal_attention\.attention\.", ".temporal_attn."),
    (r"\.attention\.output\.dense\.|\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.attention\.|\.attention\.(?=[qkv]_proj)", ".attn."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^(layernorm|fc_norm)\.", "norm."),
)
# What lies in such files beside the transformer: classifiers, poolers, decoders, the text side of Frozen in Time.
UNUSED = re.compile(
    r"^(head|head_dist|pooler|classifier|pre_logits|decoder|encoder_to_decoder|mask_token|text_model|vid_proj|txt_proj)\b"
    r"|^(cls_classifier|distillation_classifier)\b|position_ids$"
)


def load_vision_transformer(path: Path | str, heads: int | None = None, **changes: object) -> VisionTransformer:
    """Read a file (safetensors, or tensors that torch can open safely) into a model; its shape is read off the tensors.

    `changes` are fields of `VisionShape` that the model shall have instead: `attention="divided", frames=4` makes a
    video model of a picture's. A file without time keeps what it gives for a still clip.
    Raises InputError if the file cannot be read, or if names are missing, unknown or of another shape.
    """
    path = Path(path)
    state = renamed(_read(path))
    stored = _shape(path, state, heads)
    if stored.positions == "sinusoid" and "frames" not in changes:
        changes["frames"] = 16  # VideoMAE's; its positions are not stored
    shape = replace(stored, **changes)  # type: ignore[arg-type]
    model = VisionTransformer(shape)
    adapt_time(state, model.state_dict(), shape)
    load_checked(model, state, path, "a vision transformer of this shape", most=8)
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise InputError(f"{path}: no such weights file")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path}: not a safetensors file ({error})") from None
    stored = read_checkpoint(path)
    for key in ("model_state", "state_dict", "model", "module"):  # as the releases wrap them
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise InputError(f"{path}: expected tensors by name")
    return dict(stored)


def renamed(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under our names: no classifier, and queries, keys and values as one matrix."""
    state: dict[str, Tensor] = {}
    for name, value in stored.items():
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        if not UNUSED.search(name):
            state[name] = value.float()
    for prefix in sorted({name[: name.index(".attn.") + 6] for name in state if ".attn." in name}):
        _join_attention(state, prefix)
    if "norm.weight" not in state and "blocks.0.norm1.weight" in state:
        # A VideoMAE that is pooled by the mean has no last norm of its own.
        raise InputError("the file lacks the last norm; give one with `norm.*` or `fc_norm.*`")
    return state


def _join_attention(state: dict[str, Tensor], prefix: str) -> None:
    """`q_proj`, `k_proj`, `v_proj` (or `query` …) -> `qkv`; VideoMAE's keys have no bias, which is a bias of zero."""
    for names in (("query", "key", "value"), ("q_proj", "k_proj", "v_proj")):
        if f"{prefix}{names[0]}.weight" in state:
            parts = [state.pop(f"{prefix}{name}.weight") for name in names]
            biases = [state.pop(f"{prefix}{name}.bias", torch.zeros(len(part))) for name, part in zip(names, parts)]
            state[f"{prefix}qkv.weight"], state[f"{prefix}qkv.bias"] = torch.cat(parts), torch.cat(biases)
    if f"{prefix}q_bias" in state:
        query, value = state.pop(f"{prefix}q_bias"), state.pop(f"{prefix}v_bias")
        state[f"{prefix}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])


def _shape(path: Path, state: dict[str, Tensor], heads: int | None) -> VisionShape:
    """Everything that the tensors tell."""
    try:
        projection = state["patch_embed.proj.weight"]  # [W, 3, p, p], or [W, 3, t, p, p]
        width, patch = len(projection), projection.shape[-1]
        special = ("cls_token" in state) + ("dist_token" in state)
        learned = "pos_embed" in state
        places = state["pos_embed"].shape[1] - special if learned else (224 // patch) ** 2
        intermediate = len(state["blocks.0.mlp.fc1.weight"])
    except (KeyError, IndexError) as error:
        raise InputError(f"{path}: not a vision transformer: missing {error}") from None
    numbers = [int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))]
    times = state.get("time_embed")
    attention = "joint"
    if "blocks.0.temporal_fc.weight" in state:
        attention = "divided"
    elif "blocks.0.timeattn.qkv.weight" in state:
        attention = "frozen"
    elif learned and times is None:
        attention = "space"
    tubelet = projection.shape[2] if projection.ndim == 5 else 1
    return VisionShape(
        size=round(places**0.5) * patch,
        patch=patch,
        tubelet=tubelet,
        frames=(1 if times is None else times.shape[1]) * tubelet,
        width=width,
        layers=max(numbers) + 1,
        heads=heads or max(1, width // HEAD_WIDTH),
        intermediate=intermediate,
        attention=attention,
        special=special,
        positions="learned" if learned else "sinusoid",
    )


def adapt_time(state: dict[str, Tensor], fresh: Mapping[str, Tensor], shape: VisionShape) -> None:
    """Fit stored tensors to `shape`: more or fewer frames, and time attention for a file that knows none.

    `fresh` are a new model's tensors. Time embeddings are stretched by nearest neighbour, as TimeSformer and ALPRO do;
    Frozen in Time appends zeros, or cuts.
    """
    times = state.get("time_embed")
    if "time_embed" in fresh:
        wanted = fresh["time_embed"].shape[1]
        if times is None:
            state["time_embed"] = torch.zeros_like(fresh["time_embed"])
        elif shape.attention == "frozen":
            state["time_embed"] = F.pad(times[:, :wanted], (0, 0, 0, max(0, wanted - times.shape[1])))
        elif times.shape[1] != wanted:
            state["time_embed"] = stretched(times, wanted)
    else:
        state.pop("time_embed", None)
    for name in fresh:
        if name in state or not name.startswith("blocks."):
            continue
        if ".temporal_attn." in name or ".temporal_norm1." in name:
            source = name.replace(".temporal_attn.", ".attn.").replace(".temporal_norm1.", ".norm1.")
            state[name] = state[source].clone()
        elif ".temporal_fc." in name:
            state[name] = torch.zeros_like(fresh[name])
        elif ".timeattn." in name or ".norm3." in name:
            state[name] = fresh[name]


def stretched(embeddings: Tensor, count: int) -> Tensor:
    """[1, n, W] -> [1, count, W] by nearest neighbour along the rows, as ALPRO's loader does for time and places."""
    return F.interpolate(embeddings.float().transpose(1, 2), size=count, mode="nearest").transpose(1, 2)
