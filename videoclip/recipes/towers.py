"""Frozen towers that keep what they know: a two-tower model of single pictures, and what narration adds to it.

video = frozen mean of the frames + a small transformer over frozen frame tokens, text = frozen text embedding + a small
transformer over frozen word states. The last layer of both additions starts at zero, so that the model of step 0 *is*
the frozen one, which already ranks videos without any training; overlapping positives and batches of similar videos
teach the rest. Training on narration alone forgets: look at a written benchmark beside the narrated one, and hold the
embeddings near the frozen space with `penalty` or `weight_decay`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.data.clips import ClipBatch
from videoclip.data.shards import Manifest, check_encoder
from videoclip.data.words import WordTokenizer
from videoclip.encoders.catalog import load_video_encoder
from videoclip.encoders.image import ImageEncoder
from videoclip.encoders.text_tower import TextTower
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.errors import InputError
from videoclip.packed import Packed
from videoclip.parts.clip import Transformer
from videoclip.parts.pairs import gather_pairs
from videoclip.parts.saved import SavedTowers
from videoclip.pretrained import find_folder, load_weights, read_config
from videoclip.storage import local_copy
from videoclip.two_towers import LearnsTemperature

Sides = Literal["both", "text"]
FROZEN_SECONDS = 512  # longest clip of a model without trained positions


@dataclass(frozen=True)
class Options:
    """Small transformers on top of frozen towers, whose shards are read with the text side that belongs to them."""

    encoder: str = ""
    """Folder with the frozen towers; empty: that of the shards."""
    hidden_width: int = 256
    """Of the small transformers."""
    layers: int = 2
    heads: int = 4
    sides: Sides = "both"
    """`text`: nothing is added to the frozen embeddings of videos, which then need no index anew."""
    penalty: float = 0.0
    """Times the mean squared distance of embeddings from the frozen model's, added to the loss."""
    temperature: float = 0.05
    """Starting value; it is learned."""
    max_seconds: int = 0
    """Longest video clip that the model takes; 0: that of the training clips."""
    max_words: int = 0
    """Longest text that the model takes, at most the towers' own; 0: that of the training clips."""


@dataclass(frozen=True)
class Config:
    """Shape of the additions, and of what is frozen."""

    width: int = 512
    """Of an embedding: the frozen towers' common space."""
    video_dimension: int = 512
    """Of a token: that width, or more where hidden states were kept."""
    word_width: int = 512
    """Of a word's frozen state."""
    hidden_width: int = 256
    layers: int = 2
    """0: no additions at all; the model is the frozen one."""
    heads: int = 4
    sides: Sides = "both"
    penalty: float = 0.0
    temperature: float = 0.05
    max_seconds: int = 32
    max_words: int = 61
    normalize: bool = True
    video_encoder: str = ""
    """Fingerprint of the frozen towers, text side and tokenizer included."""

    def describe(self) -> dict[str, str]:
        """What a model's card says of it."""
        where = "on each side" if self.sides == "both" else "on the text side"
        added = f"{self.layers} layers, {self.hidden_width} wide, {where}" if self.layers else "none"
        return {"Towers": f"frozen, {self.width} wide", "Additions": added}


class Addition(nn.Module):
    """A small transformer over frozen rows and the mean of its outputs, through a last layer that starts at zero."""

    def __init__(self, dimension: int, width: int, config: Config, positions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dimension, config.hidden_width)
        self.norm = nn.LayerNorm(dimension)
        self.positions = nn.Embedding(positions, config.hidden_width)
        self.transformer = Transformer(config.hidden_width, config.layers, config.heads)
        self.last_norm = nn.LayerNorm(config.hidden_width)
        self.last = nn.Linear(config.hidden_width, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, rows: Packed) -> Tensor:
        """Rows [N, dimension] of B sequences -> [B, width]; all zero at the start."""
        x, order = rows.by_length()
        places = (torch.arange(len(x.rows)) - x.starts[x.owners]).to(x.rows.device)
        x = self.transformer(x.with_rows(self.linear(self.norm(x.rows)) + self.positions(places)))
        pooled = torch.cat([run.mean(1) for run in x.by_run()])[torch.argsort(order).to(x.rows.device)]
        # Adam's first steps move every weight by the learning rate, and here all at once: without the root an addition
        # of noise outweighs the frozen embedding, which is of unit length, within ten steps.
        return self.last(self.last_norm(pooled)) / math.sqrt(self.last.in_features)


class Recipe(LearnsTemperature, SavedTowers):
    """Frozen towers and their additions. The text side is the frozen encoder's, found in `frozen.video_encoder`."""

    recipe: ClassVar[str] = "towers"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        if config.layers and config.sides == "both":
            self.video_addition = Addition(config.video_dimension, config.width, config, config.max_seconds)
        if config.layers:
            self.text_addition = Addition(config.word_width, config.width, config, config.max_words + 2)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))
        self._text_tower: TextTower | None = None

    def text_tower(self) -> TextTower:
        """The frozen text side, on this model's device. Raises InputError if the frozen encoder has none."""
        if self._text_tower is None:
            encoder = image_encoder(self.frozen.need_video_encoder(self.config.video_encoder), "this model")
            self._text_tower = encoder.text_tower()
        self._text_tower.network.to(self.log_temperature.device)
        return self._text_tower

    def tokenizer(self) -> WordTokenizer:
        """The frozen text side's."""
        return self.text_tower().words

    def forward(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Symmetric InfoNCE over the pairs of all workers, the penalty, and figures as `Pairs.figures` names them."""
        frozen_video, video = self._video(batch.video_tokens)
        frozen_text, text = self._text(batch.word_ids)
        pairs = gather_pairs(video, text, batch)
        loss = pairs.contrast(self.temperature)
        moved = (video - frozen_video).square().sum(1).mean() + (text - frozen_text).square().sum(1).mean()
        return {
            "loss": loss + self.config.penalty * moved,
            "contrast": loss.detach(),
            "moved": moved.detach(),
            **pairs.figures(),
            "temperature": self.temperature.detach(),
            "chance_loss": pairs.chance_loss(),
        }

    def embed_video(self, tokens: Packed) -> Tensor:
        """Frozen-tower tokens of B clips, rows [N, D] -> [B, H] of unit length.

        Raises InputError if the tokens have another width, or a clip is longer than `max_seconds`.
        """
        return self._video(tokens)[1]

    def embed_text(self, word_ids: Packed) -> Tensor:
        """Word ids of B texts, rows int [N], start and end word included -> [B, H] of unit length."""
        return self._text(word_ids)[1]

    def _video(self, tokens: Packed) -> tuple[Tensor, Tensor]:
        """The frozen embeddings and the model's, [B, H] each."""
        config = self.config
        if tokens.rows.ndim != 2 or tokens.rows.shape[1] != config.video_dimension:
            raise InputError(
                f"video tokens are {tokens.rows.shape[-1]} wide, but this model takes {config.video_dimension}; "
                "extract them with the encoder that it was trained on"
            )
        if len(tokens) and not 1 <= int(tokens.lengths.min()) <= int(tokens.lengths.max()) <= config.max_seconds:
            raise InputError(f"a video clip must have 1 to {config.max_seconds} tokens")
        tokens = tokens.to(self.log_temperature.device, torch.float32)
        frozen = torch.stack([rows[:, : config.width].mean(0) for rows in tokens.split()])
        added = self.video_addition(tokens) if config.layers and config.sides == "both" else None
        return self._with(frozen, added)

    def _text(self, word_ids: Packed) -> tuple[Tensor, Tensor]:
        frozen, states = self.text_tower().encode(word_ids)
        return self._with(frozen, self.text_addition(states) if self.config.layers else None)

    @staticmethod
    def _with(frozen: Tensor, addition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Frozen vectors of unit length, and with the addition to that. Zeros change no bit of them."""
        frozen = F.normalize(frozen, dim=-1)
        added = frozen if addition is None else frozen + addition
        return F.normalize(frozen, dim=-1), F.normalize(added, dim=-1)

    @classmethod
    def from_pretrained(cls, folder_or_id: Path | str) -> Recipe:
        """Read a model from a folder or a hub id. Raises InputError if there is none, or its parts do not fit."""
        folder = find_folder(folder_or_id)
        model = cls(read_config(folder, Config))
        load_weights(folder, model)
        model.frozen.folder = folder
        return model.eval()


def image_encoder(encoder: VideoEncoder, where: Path | str) -> ImageEncoder:
    """The encoder as one of pictures. Raises InputError if it is another kind, which has no text side."""
    if not isinstance(encoder, ImageEncoder):
        raise InputError(
            f"{where}: the encoder {encoder.name} has no text side; extract with a two-tower model, by hub id or folder"
        )
    return encoder


def frozen_towers(shards_folder: Path) -> Recipe:
    """The frozen model of a folder of shards: nothing is trained, and nothing has to be.

    Raises InputError if the encoder that made the shards is not there, or has no text side.
    """
    folder = local_copy(Path(shards_folder))
    encoder = image_encoder(load_video_encoder(folder), folder)
    check_encoder(Manifest.read(folder), encoder.fingerprint(), "the encoder in the folder", folder)
    return around(encoder, Options(layers=0, max_seconds=FROZEN_SECONDS, max_words=0))


def around(encoder: ImageEncoder, options: Options) -> Recipe:
    """A new model around frozen towers. Raises InputError if they have no text side."""
    tower = encoder.text_tower()
    config = Config(
        width=encoder.projected,
        video_dimension=encoder.dimension,
        word_width=tower.width,
        hidden_width=options.hidden_width,
        layers=options.layers,
        heads=options.heads,
        sides=options.sides,
        penalty=options.penalty,
        temperature=options.temperature,
        max_seconds=options.max_seconds,
        max_words=min(options.max_words or tower.max_words, tower.max_words),
        video_encoder=encoder.fingerprint(),
    )
    model = Recipe(config).eval()
    model.frozen.video_encoder, model.frozen.tokenizer = encoder, tower.words
    return model


def build(options: Options, manifest: Manifest, tokenizer: WordTokenizer) -> Recipe:
    """A new model for shards of frozen towers, with texts cut by the towers' own tokenizer.

    Raises InputError if the towers are not those of the shards, have no text side, or another tokenizer was given.
    """
    if not options.encoder:
        raise InputError("name the folder of the frozen towers: --model.encoder, the shards' own folder")
    encoder = read_towers(options)
    check_encoder(manifest, encoder.fingerprint(), f"the towers in {options.encoder}", "the shards")
    model = around(encoder, options)
    if model.tokenizer().fingerprint() != tokenizer.fingerprint():
        raise InputError(f"words are cut by another tokenizer than the towers'; give --tokenizer {options.encoder}")
    return model


def read_towers(options: Options) -> ImageEncoder:
    """The frozen towers that the options name. Raises InputError if there are none, or they have no text side."""
    return image_encoder(load_video_encoder(Path(options.encoder)), options.encoder)


def tokenizer_of(options: Options) -> WordTokenizer:
    """What cuts texts for the towers. Raises InputError as `read_towers`."""
    return read_towers(options).text_tower().words
