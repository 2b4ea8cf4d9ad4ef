"""ALPRO's public checkpoints in: pretraining, retrieval and question answering, read off the names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from videoclip.encoders.weights import load_checked, read_checkpoint
from videoclip.errors import InputError
from videoclip.parts.masked_words import WordMask
from videoclip.parts.packed_bert import TransformerShape
from videoclip.parts.prompter import Prompter
from videoclip.parts.towers import TowersShape
from videoclip.parts.vision_transformer import VisionShape
from videoclip.parts.vision_weights import HEAD_WIDTH, stretched
from videoclip.recipes.alpro import Alpro, AlproOptions

TASKS = ("pretraining", "retrieval", "answering")
VISION, BERT = "visual_encoder.model.", "text_encoder.bert."
# What the release stores and never uses: Kinetics' classifier, position counts, a copy of the bias of the word scores,
# and the fusion layers and heads of the prompter (whose higher BERT layers are named by `_unused_layers`).
UNUSED = re.compile(
    r"visual_encoder\.model\.head\.(weight|bias)$|embeddings\.position_ids$|^(prompter\.)?text_encoder\.cls\.predictions\.bias$"
    r"|^prompter\.(text_encoder\.cls\.|itm_head\.)"
)
BERT_SPECIAL = (0, 100, 101, 102, 103)  # [PAD], [UNK], [CLS], [SEP], [MASK] of bert-base-uncased
MASK_ID = 103


def from_alpro(
    path: Path | str,
    heads: int | None = None,
    text_layers: int | None = None,
    task: str | None = None,
    frames: int | None = None,
    size: int | None = None,
    answers: int | None = None,
) -> Alpro:
    """Read a checkpoint of the ALPRO release; its task and all sizes are read off names and shapes.

    `heads`: one for 64 columns unless given; `text_layers`: the lower half of BERT's unless given; neither can be
    read off. `task` ("pretraining", "retrieval", "answering"): what the file must be good for. A pretraining
    checkpoint starts both others, as in the release: the prompter is dropped, and `frames`, `size` and `answers` make
    it another model (time stretched by nearest neighbour; places too, along their flattened order, as the release does
    it; a new classifier).
    The returned model is in evaluation mode.

    Raises InputError if the file cannot be read safely, is a checkpoint of another task, or if names are missing or
    unknown; it lists them.
    """
    path = Path(path)
    state = _tensors(path)
    found = _task(path, state)
    asked = task or found
    if asked not in TASKS:
        raise InputError(f"task must be one of {', '.join(TASKS)}, not {asked!r}")
    if asked != found and found != "pretraining":
        raise InputError(f"{path}: a checkpoint of {found}, not of {asked}; give the pretraining checkpoint")
    if asked != found:
        state = {name: value for name, value in state.items() if not name.startswith(("prompter.", "mpm_head."))}
        if asked == "answering":
            state = {name: value for name, value in state.items() if ".cls." not in name}
    model = Alpro(_options(path, state, heads, text_layers, asked, frames, size, answers))
    _stretch(state, model)
    if asked == "answering" and found != asked:
        state.update({f"classifier.{name}": value for name, value in model.classifier.state_dict().items()})
    if "prompter.temp" in state:
        prompter = Prompter(_towers(path, state, "prompter.", heads, text_layers, None, None), model.options.entities)
        model.attach(prompter)
    load_checked(model, state, path, f"an ALPRO checkpoint of {asked}", most=20)
    return model.eval()


def _tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors under one set of names, float32, without those that are never used."""
    stored = read_checkpoint(path)
    for key in ("model_state_dict", "model"):  # restore.pt of the release, and LAVIS's files
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(v, Tensor) for v in stored.values()):
        raise InputError(f"{path}: expected tensors by name, as in ALPRO's `alpro_pretrained_ckpt.pt`")
    state = {re.sub(r"text_encoder\.(?=embeddings|encoder)", BERT, name): value for name, value in stored.items()}
    for name in [name for name in state if name.endswith("predictions.decoder.bias")]:
        # The release loads this one last, into the same bias.
        state[name.replace("decoder.bias", "bias_used")] = state.pop(name)
    state = {name: value.float() for name, value in state.items() if not UNUSED.search(name)}
    return {name.replace("bias_used", "bias"): value for name, value in state.items() if "bias_used" not in name or True}


def _task(path: Path, state: Mapping[str, Tensor]) -> str:
    if "itm_head.weight" not in state or "visual_encoder.model.cls_token" not in state:
        raise InputError(f"{path}: not an ALPRO checkpoint: lacks itm_head.weight or visual_encoder.model.cls_token")
    if "classifier.0.weight" in state:
        return "answering"
    return "pretraining" if "mpm_head.0.weight" in state else "retrieval"
