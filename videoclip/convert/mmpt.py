"""The public VideoCLIP release (code name MMPT): its checkpoints in, our models out."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videoclip.encoders.weights import load_checked, read_checkpoint
from videoclip.errors import InputError
from videoclip.model import VideoCLIP, VideoCLIPConfig

PREFIX = "mmmodel."
CLS_ID, SEP_ID = 101, 102  # of bert-base-uncased, which the release was trained with
MAX_SECONDS, MAX_WORDS = 32, 61
HEAD_WIDTH = 64  # BERT's, for every published size; heads cannot be read off the tensors
# What the release stores and never uses: the pooler of BERT, and buffers that only count positions.
UNUSED = re.compile(r"(\.pooler\.dense\.(weight|bias)|position_ids)$")


def from_mmpt(path: Path | str, heads: int | None = None) -> VideoCLIP:
    """Read a checkpoint of the public VideoCLIP release (code name MMPT), separate or shared transformers.

    Layers, widths and vocabulary are read off the tensors; `heads` is one for 64 columns, as in BERT, unless given.
    The model has the release's conventions: dot products, no normalisation, temperature 1.

    Raises InputError if the file cannot be read safely, or if names are missing or unknown; it lists them.
    """
    path = Path(path)
    state = _mmpt_tensors(path)
    config = _mmpt_config(path, state, heads)
    model = VideoCLIP(config)
    state["log_temperature"] = torch.tensor(0.0)
    video_words = "video_encoder.bert.embeddings.word_embeddings.weight"
    if config.transformer == "separate" and video_words in state:
        # Of the video side's word embeddings only [CLS] and [SEP] are ever used.
        state[video_words] = state[video_words][[CLS_ID, SEP_ID]]
    load_checked(model, state, path, "a VideoCLIP checkpoint", most=20)
    return model.eval()


def _mmpt_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a fairseq file, without their prefix and without those that are never used."""
    # fairseq pickles its command line beside the tensors; a Namespace of plain values does no harm.
    stored = read_checkpoint(
        path,
        [argparse.Namespace],
        "; it cannot be read without running code from it: keep only its tensors, "
        '{"model": …}, with the software that wrote it',
    )
    tensors = stored.get("model") if isinstance(stored, Mapping) else None
    if not isinstance(tensors, Mapping) or not tensors:
        raise InputError(f'{path}: expected a fairseq checkpoint, {{"model": {{name: tensor}}}}')
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path}: holds values under `model` that are no tensors")
    return {name.removeprefix(PREFIX): value.float() for name, value in tensors.items() if not UNUSED.search(name)}


def _mmpt_config(path: Path, state: dict[str, Tensor], heads: int | None) -> VideoCLIPConfig:
    shared = any(name.startswith("mm_encoder.") for name in state)
    video = "mm_encoder" if shared else "video_encoder"
    text = "mm_encoder.bert" if shared else "text_encoder"
    try:
        width, video_dimension = state[f"{video}.videomlp.linear1.weight"].shape
        intermediate = len(state[f"{text}.encoder.layer.0.intermediate.dense.weight"])
        vocabulary = len(state[f"{text}.embeddings.word_embeddings.weight"])
        positions = len(state[f"{text}.embeddings.position_embeddings.weight"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not a VideoCLIP checkpoint: missing {error}") from None
    return VideoCLIPConfig(
        video_dimension=video_dimension,
        width=width,
        layers=_count_layers(state, text),
        video_layers=_count_layers(state, f"{video}.bert"),
        heads=heads or max(1, width // HEAD_WIDTH),
        intermediate=intermediate,
        transformer="shared" if shared else "separate",
        vocabulary=vocabulary,
        positions=positions,
        max_seconds=MAX_SECONDS,
        max_words=MAX_WORDS,
        cls_id=CLS_ID,
        sep_id=SEP_ID,
        normalize=False,
        temperature=1.0,
        train_temperature=False,
    )


def _count_layers(state: dict[str, Tensor], prefix: str) -> int:
    layer = re.compile(rf"{re.escape(prefix)}\.encoder\.layer\.(\d+)\.")
    numbers = [int(found[1]) for name in state if (found := layer.match(name))]
    return max(numbers, default=-1) + 1


def describe(model: VideoCLIP) -> dict[str, Any]:
    """What a converted release expects around it: its frozen encoder and tokenizer, in words."""
    return {
        "video tokens": f"S3D (MIL-NCE, s3d_howto100m.pth), unit length, {model.config.video_dimension} wide",
        "tokenizer": f"bert-base-uncased ({model.config.vocabulary} words)",
    }
