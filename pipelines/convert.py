"""`videoclip convert`: published checkpoints into our format, and folders of `.npy` features into shards and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from pipelines.caption_source import CaptionSource
from pipelines.runs import Quarantine, writes_output
from videoclip.convert import (
    describe,
    features_to_shards,
    fingerprint_of_features,
    from_alpro,
    from_collaborative_experts,
    from_efficient_prompt,
    from_mmpt,
    shards_to_features,
)
from videoclip.data.questions import read_answers
from videoclip.data.shards import MANIFEST, Manifest, Shards, check_encoder
from videoclip.data.words import WordTokenizer
from videoclip.encoders.s3d import S3D
from videoclip.errors import InputError


@dataclass(frozen=True)
class ConvertMMPTConfig:
    """A checkpoint of the public VideoCLIP release into a model folder."""

    checkpoint: Annotated[Path, Positional]
    """The fairseq file, for instance checkpoint_best.pt."""
    output: Annotated[Path, Positional]
    """Model folder to write."""
    tokenizer: Path | None = None
    """Folder of bert-base-uncased with tokenizer.json, to be stored in the model folder."""
    video_encoder: Path | None = None
    """s3d_howto100m.pth, to be stored in the model folder, so that the model takes video files."""
    heads: int | None = None
    """Attention heads, where they are not one for 64 columns."""


@dataclass(frozen=True)
class ConvertAlproConfig:
    """A checkpoint of the public ALPRO release into a model folder: pretraining, retrieval or question answering."""

    checkpoint: Annotated[Path, Positional]
    """For instance alpro_pretrained_ckpt.pt; which task it is of is read off the names."""
    output: Annotated[Path, Positional]
    """Model folder to write."""
    tokenizer: Path
    """Folder of bert-base-uncased with tokenizer.json."""
    answers: Path | None = None
    """train_ans2label.json, for a checkpoint of question answering: its answers in words."""
    heads: int | None = None
    """Attention heads, where they are not one for 64 columns."""


@dataclass(frozen=True)
class ConvertExpertsConfig:
    """A checkpoint of the collaborative-experts and TeachText release, CE or MoEE, into a model folder."""

    checkpoint: Annotated[Path, Positional]
    """The release's trained_model.pth; nothing that it pickles is run."""
    output: Annotated[Path, Positional]
    """Model folder to write."""


@dataclass(frozen=True)
class ConvertPromptsConfig:
    """A checkpoint of the Efficient-Prompt release, with the CLIP that is in it, into a model folder."""

    checkpoint: Annotated[Path, Positional]
    """For instance HMDB_best.pth.tar."""
    output: Annotated[Path, Positional]
    """Model folder to write."""
    prefix: int = 16
    """Vectors before a name's words, as it was trained: the file does not say."""
    postfix: int = 16
    """Vectors behind them."""
    tokenizer: Path | None = None
    """Folder of the CLIP with tokenizer.json, to be stored in the model folder, so that it takes texts."""


@dataclass(frozen=True)
class ConvertFeaturesConfig:
    """A folder of <id>.npy token arrays, one row a second, into shards."""

    features: Annotated[Path, Positional]
    output: Annotated[Path, Positional]
    encoder: str = "s3d"
    """Name of the encoder that made them; tokens of differently named encoders are never mixed."""
    captions: str | None = None
    """Captions as for `extract`: a folder or a file of HowTo100M's json or csv, srt, vtt and others. They can be given,
    or changed, later."""
    keep_rolling_repeats: bool = False
    """Leave captions as they are, instead of removing what rolling captions repeat."""
    seed: int = 0


@dataclass(frozen=True)
class ConvertShardsConfig:
    """Shards into a folder of <id>.npy token arrays."""

    shards: Annotated[Path, Positional]
    output: Annotated[Path, Positional]


@writes_output
def convert_mmpt(config: ConvertMMPTConfig) -> None:
    """Raises InputError if the checkpoint cannot be read safely or is of another model."""

    model = from_mmpt(config.checkpoint, config.heads)
    if config.tokenizer is not None:
        tokenizer = WordTokenizer.load(config.tokenizer)
        if tokenizer.vocabulary > model.config.vocabulary:
            raise InputError(
                f"{config.tokenizer}: knows {tokenizer.vocabulary} words but the checkpoint {model.config.vocabulary}; "
                "it was trained with another tokenizer"
            )
        model.frozen.tokenizer = tokenizer
    if config.video_encoder is not None:
        encoder = S3D.from_howto100m(config.video_encoder)
        model.frozen.video_encoder = encoder
        model.config = replace(model.config, video_encoder=encoder.fingerprint())
    model.save_pretrained(config.output)
    print(f"{config.output}: {model.config.transformer} transformers, {model.config.width} wide. It expects")
    for name, value in describe(model).items():
        print(f"  {name}: {value}")


@writes_output
def convert_alpro(config: ConvertAlproConfig) -> None:
    """Raises InputError if the checkpoint cannot be read safely, or tokenizer or answers are another model's."""
    model = from_alpro(config.checkpoint, config.heads)
    tokenizer = WordTokenizer.load(config.tokenizer)
    if tokenizer.vocabulary != model.shape.vocabulary:
        raise InputError(
            f"{config.tokenizer}: knows {tokenizer.vocabulary} words but the checkpoint {model.shape.vocabulary}; "
            "it was trained with another tokenizer"
        )
    model.frozen.tokenizer = tokenizer
    if config.answers is not None:
        numbers = read_answers(config.answers)
        if len(numbers) != model.config.answers:
            raise InputError(f"{config.answers}: {len(numbers)} answers; the checkpoint has {model.config.answers}")
        model.config = replace(model.config, answer_names=tuple(sorted(numbers, key=numbers.__getitem__)))
    model.save_pretrained(config.output)
    vision, trained = model.shape.vision, ", ".join(model.config.losses) or f"{model.config.answers} answers"
    print(f"{config.output}: {vision.frames} frames of {vision.size} x {vision.size}; {trained}")


@writes_output
def convert_experts(config: ConvertExpertsConfig) -> None:
    """Raises InputError if the checkpoint cannot be read safely or is of another model."""
    model = from_collaborative_experts(config.checkpoint)
    model.save_pretrained(config.output)
    kind = "experts that gate each other (CE)" if model.config.collaborative else "experts for themselves (MoEE)"
    print(f"{config.output}: {len(model.config.widths)} {kind}, texts {model.config.text_dimension} wide")


@writes_output
def convert_prompts(config: ConvertPromptsConfig) -> None:
    """Raises InputError if the checkpoint cannot be read safely, is of another model, or the tokenizer of another."""
    model = from_efficient_prompt(config.checkpoint, config.prefix, config.postfix)
    if config.tokenizer is not None:
        tokenizer = WordTokenizer.load(config.tokenizer)
        if tokenizer.vocabulary != model.config.clip["vocabulary"]:
            raise InputError(
                f"{config.tokenizer}: knows {tokenizer.vocabulary} words but the checkpoint's CLIP "
                f"{model.config.clip['vocabulary']}; it was trained with another tokenizer"
            )
        model.frozen.tokenizer = tokenizer
    model.save_pretrained(config.output)
    print(f"{config.output}: {'; '.join(model.config.describe().values())}")


@writes_output
def convert_features(config: ConvertFeaturesConfig) -> None:
    """Bad arrays and caption lines go to quarantine. Shards that are there keep their tokens and get these captions.

    Raises InputError if nothing in the folder can be used, or the output holds the tokens of another encoder.
    """
    quarantine = Quarantine(config.output)
    captions = CaptionSource(config.captions, config.keep_rolling_repeats, config.seed, quarantine)
    if (config.output / MANIFEST).exists():
        fingerprint = fingerprint_of_features(config.encoder)
        check_encoder(Manifest.read(config.output), fingerprint, config.encoder, config.output)
    captions.refuse_left_out(config.output)
    captions.update_shards(config.output)
    for video_id, reason in features_to_shards(config.features, config.output, captions.of_video, config.encoder):
        quarantine.add(video_id, reason)
    quarantine.save()
    print(f"{config.output}: shards written; {quarantine.summary()}")


@writes_output
def convert_shards(config: ConvertShardsConfig) -> None:
    """Raises InputError if the shards are damaged or an id cannot be a file name."""
    count = shards_to_features(Shards(config.shards, verify=True), config.output)
    print(f"{config.output}: {count} arrays written")
