"""Public checkpoints in, ours out; and folders of `.npy` features in and out of shards."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from videoclip.data.captions import NO_CAPTIONS, Captions
from videoclip.data.shards import Manifest, Shards, ShardWriter, VideoRecord
from videoclip.encoders.weights import load_checked, read_checkpoint
from videoclip.errors import InputError
from videoclip.files import write_array
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


def from_bert(folder: Path | str, config: VideoCLIPConfig) -> VideoCLIP:
    """A VideoCLIP whose transformers start from BERT, as the paper's do; the token MLP starts at random.

    `folder` holds a BERT model with `config`'s width, at least its layers, and its vocabulary (safetensors).
    Raises InputError if a tensor is missing or does not fit.
    """
    from safetensors.torch import load_file

    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file; a BERT folder with safetensors weights is needed")
    stored = {name.removeprefix("bert."): tensor for name, tensor in load_file(path).items()}
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        stored = {name.replace(old, new): tensor for name, tensor in stored.items()}  # as old BERT files call them
    config = replace(config, positions=min(config.positions, len(stored["embeddings.position_embeddings.weight"])))
    model = VideoCLIP(config)
    towers = {"mm_encoder.bert."} if config.transformer == "shared" else {"video_encoder.bert.", "text_encoder."}
    state = model.state_dict()
    for name in state:
        tower = next((prefix for prefix in towers if name.startswith(prefix)), None)
        if tower is None:
            continue
        source = stored.get(name.removeprefix(tower))
        if source is None:
            raise InputError(f"{path}: lacks {name.removeprefix(tower)}; not a BERT of {config.layers} layers")
        if len(state[name]) == 2 and name.endswith("word_embeddings.weight"):
            source = source[[config.cls_id, config.sep_id]]
        if "position_embeddings" in name:
            source = source[: config.positions]
        if source.shape != state[name].shape:
            wanted = tuple(state[name].shape)
            raise InputError(f"{path}: {name} is {tuple(source.shape)}, the configuration wants {wanted}")
        state[name] = source
    model.load_state_dict(state)
    return model


def features_to_shards(
    folder: Path, output: Path, captions: Mapping[str, Captions], encoder: str, videos_per_part: int = 256
) -> Iterator[tuple[str, str]]:
    """Write `<id>.npy` arrays [seconds, width], as older tools leave them, into shards; yields (id, reason) of rejects.

    Arrays are read without pickle. The manifest names `encoder`, whose weights are not known: its fingerprint is the
    hash of that name, so that tokens of differently named encoders are never mixed.
    Raises InputError if the folder holds no array that can be used, or if shards of another encoder are there.
    """
    files = sorted(Path(folder).glob("*.npy"))
    if not files:
        raise InputError(f"{folder}: holds no .npy files")
    width = _usual_width(files)
    fingerprint = hashlib.sha256(f"features:{encoder}".encode()).hexdigest()
    writer: ShardWriter | None = None
    done: set[str] = set()
    for file in files:
        try:
            tokens = _read_features(file)
        except InputError as error:
            yield file.stem, str(error)
            continue
        if writer is None:
            writer = ShardWriter(output, Manifest(encoder, fingerprint, width), videos_per_part)
            done = set(Shards(output).video_ids()) if writer.manifest.parts else set()
        if file.stem in done:
            continue
        try:
            writer.add(VideoRecord(file.stem, float(len(tokens)), tokens, captions.get(file.stem, NO_CAPTIONS)))
        except InputError as error:
            yield file.stem, str(error)
    if writer is None:
        raise InputError(f"{folder}: none of {len(files)} .npy files could be used")
    writer.close()


def _usual_width(files: list[Path]) -> int:
    """The width that most arrays have; only their headers are read."""
    widths: Counter[int] = Counter()
    for file in files:
        try:
            shape = np.load(file, mmap_mode="r", allow_pickle=False).shape
        except (ValueError, OSError, EOFError):
            continue  # named when it is read as a whole
        if len(shape) == 2:
            widths[shape[1]] += 1
    return widths.most_common(1)[0][0] if widths else 0


def _read_features(file: Path) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{file}: not an array that can be read safely ({' '.join(str(error).split())})") from None
    if array.ndim != 2 or not len(array) or array.dtype.kind != "f":
        raise InputError(f"{file}: expected floats [seconds, width], found {array.dtype} {array.shape}")
    tokens = array.astype(np.float16)
    if not np.isfinite(tokens).all():
        raise InputError(f"{file}: holds values that are not finite in half precision")
    return tokens


def shards_to_features(shards: Shards, folder: Path) -> int:
    """Write every video's tokens as `<id>.npy` float16 [T, D]; returns how many.

    Raises InputError for an id that cannot be a file name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for record in shards:
        if Path(record.video_id).name != record.video_id or record.video_id in ("", ".", ".."):
            raise InputError(f"video id {record.video_id!r} cannot be a file name")
        write_array(folder / f"{record.video_id}.npy", record.tokens)
    return len(shards)


def describe(model: VideoCLIP) -> dict[str, Any]:
    """What a converted release expects around it: its frozen encoder and tokenizer, in words."""
    return {
        "video tokens": f"S3D (MIL-NCE, s3d_howto100m.pth), unit length, {model.config.video_dimension} wide",
        "tokenizer": f"bert-base-uncased ({model.config.vocabulary} words)",
    }
