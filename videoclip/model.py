"""VideoCLIP: frozen tokens in, one vector per clip out, for video and for text in the same space.

Sequences come packed, end to end instead of padded. There is one numerical path; padded inputs are packed first.
Parameter names are those of the public release (and so of BERT), so a checkpoint loads without a map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from videoclip.errors import InputError
from videoclip.files import write_json
from videoclip.packed import Packed
from videoclip.pretrained import FrozenParts, ModelCard, find_folder, load_weights, read_config, save_card, save_model
from videoclip.transformer import Bert, TransformerShape, initialise_as_bert
from videoclip.two_towers import EncodesFiles, LearnsTemperature

try:
    from huggingface_hub import ModelHubMixin
except ImportError:  # training and saving work without it; only the hub does not

    class ModelHubMixin:  # type: ignore[no-redef]
        """Stands in where huggingface_hub is not installed."""


MODULES_FILE = "modules.json"
SENTENCE_TRANSFORMERS = [
    {"idx": 0, "name": "0", "path": "", "type": "videoclip.sentence_transformers_module.VideoCLIPModule"}
]


@dataclass(frozen=True)
class VideoCLIPConfig:
    """Shape of a model. The defaults are the public release's separate variant, trained as the paper says."""

    video_dimension: int = 512
    """Width of a video token."""
    width: int = 768
    layers: int = 12
    """Of the text transformer, or of the shared one."""
    video_layers: int = 6
    """Of the video transformer, where transformers are separate."""
    heads: int = 12
    intermediate: int = 3072
    transformer: Literal["shared", "separate"] = "shared"
    """`shared`: one transformer for both sides. `separate`: one each."""
    pooling: Literal["mean", "cls"] = "mean"
    """`mean` over all positions but [CLS], or `cls`."""
    text: Literal["embeddings", "frozen"] = "embeddings"
    """`embeddings`: trainable word embeddings. `frozen`: hidden states of a frozen encoder."""
    text_dimension: int = 768
    """Width of the frozen text encoder's hidden states, where text is `frozen`."""
    vocabulary: int = 30522
    positions: int = 512
    max_seconds: int = 32
    """Most video tokens in one clip."""
    max_words: int = 64
    """Most words in one text, special words not counted."""
    cls_id: int = 101
    sep_id: int = 102
    dropout: float = 0.1
    normalize: bool = True
    """Whether embeddings have unit length. The release's have not."""
    temperature: float = 0.07
    """Divides similarities; where it is trained, its starting value."""
    train_temperature: bool = True
    video_encoder: str = ""
    """Fingerprint of the frozen encoder whose tokens this model was trained on; empty if unknown."""
    text_encoder: str = ""
    """Hub id of the frozen text encoder, or empty where its copy stands in the model's folder."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            allowed = get_args(kind) if get_origin(kind) is Literal else ()
            if allowed and getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if not 0 <= self.cls_id < self.vocabulary or not 0 <= self.sep_id < self.vocabulary:
            raise InputError(
                f"cls_id {self.cls_id} and sep_id {self.sep_id} must lie in a vocabulary of {self.vocabulary}"
            )
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not a multiple of {self.heads} heads")
        if self.first_text_position + self.max_words + 1 > self.positions or self.max_seconds + 2 > self.positions:
            raise InputError(f"{self.positions} positions are too few for these clips; raise `positions`")

    @property
    def first_text_position(self) -> int:
        """Position of a text's first word; in the shared variant the places of a full video clip come before it."""
        return self.max_seconds + 2 if self.transformer == "shared" else 1

    def shape(self, layers: int) -> TransformerShape:
        """Of a transformer with so many layers."""
        return TransformerShape(self.width, self.heads, self.intermediate, layers, self.dropout, self.positions)

    def describe(self) -> dict[str, str]:
        """What a model's card says of it."""
        text = {"embeddings": "trainable word embeddings", "frozen": f"frozen {self.text_encoder or 'encoder'}"}
        layers = (
            f"{self.layers} layers" if self.transformer == "shared" else f"{self.video_layers}+{self.layers} layers"
        )
        return {
            "Video tokens": f"{self.video_dimension} wide, one a second",
            "Text": f"{text[self.text]}, {self.vocabulary} words",
            "Transformer": f"{self.transformer}, {layers}, {self.width} wide, {self.pooling} pooling",
        }


class VideoTokenMLP(nn.Module):
    """Maps frozen video tokens into the transformer's width (the release's `videomlp`)."""

    def __init__(self, config: VideoCLIPConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.video_dimension, config.width)
        self.LayerNorm = nn.LayerNorm(config.width)
        self.linear2 = nn.Linear(config.width, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear2(self.LayerNorm(F.gelu(self.linear1(tokens))))


class VideoTower(nn.Module):
    """Token MLP and transformer of the video side; in the shared variant, of both sides."""

    def __init__(self, config: VideoCLIPConfig, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.videomlp = VideoTokenMLP(config)
        self.bert = Bert(config.shape(layers), vocabulary)


class VideoCLIP(LearnsTemperature, EncodesFiles, nn.Module, ModelHubMixin):
    """The trainable part of VideoCLIP, with the frozen encoders and the tokenizer it belongs to where they are known.

    `frozen` holds those; they are no parameters, and are read from the model's folder when they are first needed.
    `push_to_hub(repo_id)` is huggingface_hub's; it uploads what `save_pretrained` writes.
    """

    recipe: ClassVar[str] = "videoclip"
    """What `config.json` names: the file in `videoclip/recipes/` that trains this."""
    config_class: ClassVar[type[VideoCLIPConfig]] = VideoCLIPConfig

    def __init__(self, config: VideoCLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.frozen = FrozenParts()
        words = config.vocabulary if config.text == "embeddings" else 2
        if config.transformer == "shared":
            self.mm_encoder = VideoTower(config, config.layers, words)
        else:
            self.video_encoder = VideoTower(config, config.video_layers, 2)
            self.text_encoder = Bert(config.shape(config.layers), words)
        if config.text == "frozen" and config.transformer == "separate":
            self.text_encoder.embeddings.word_embeddings.requires_grad_(False)  # never looked at
        if config.text == "frozen" and config.text_dimension != config.width:
            self.text_projection = nn.Linear(config.text_dimension, config.width)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(config.temperature)), requires_grad=config.train_temperature
        )
        self.apply(initialise_as_bert)

    # --- Embedding ------------------------------------------------------------------------------------------------

    def embed_video(self, tokens: Packed) -> Tensor:
        """Video tokens of B clips, rows float [N, D] -> [B, H].

        Raises InputError if the tokens have another width, or a clip is longer than `max_seconds`.
        """
        return self._features(*self._encode_video(tokens))

    def video_hidden(self, tokens: Packed) -> Packed:
        """The transformer's output for every token: the same sequences, rows [N, H].

        A clip's embedding is the mean of these rows and of that of [SEP] (with mean pooling), scaled to unit length.
        Raises InputError as `embed_video` does.
        """
        x, order = self._encode_video(tokens)
        wrapped = x.take(torch.argsort(order))
        within, length = wrapped.positions, wrapped.lengths[wrapped.owners]
        numbers = torch.arange(len(wrapped.rows)) - wrapped.starts[wrapped.owners]
        inner = (numbers > 0) & (numbers < length - 1)
        return Packed(wrapped.rows[inner.to(x.rows.device)], tokens.lengths, within[inner] - 1)

    def _encode_video(self, tokens: Packed) -> tuple[Packed, Tensor]:
        """Outputs for `[CLS] tokens [SEP]`, shortest clip first, and which clip each was before."""
        self._check_video(tokens)
        tower = self._video_tower
        special = self._special_words(tower)  # (2, H)
        rows = tower.videomlp(tokens.rows.to(special.device, special.dtype))  # (N, H)
        # Row numbers are brought into order first, so that the wide rows are moved only once.
        count = torch.tensor([len(rows)])
        numbers, order = tokens.with_rows(torch.arange(len(rows))).wrapped(count, count + 1).by_length()
        embedded = torch.cat([rows, special])[numbers.rows.to(rows.device)]  # (N + 2 B, H)
        positions = numbers.positions.clone()
        positions[numbers.starts + numbers.lengths - 1] = self.config.max_seconds + 1  # [SEP], whatever the length
        x = tower.bert(numbers.with_rows(embedded), positions, torch.zeros_like(positions))
        return x, order

    def embed_text(self, word_ids: Packed) -> Tensor:
        """Word ids of B texts, rows int [N], each text `[CLS] … [SEP]` -> [B, H].

        Raises InputError if an id is not in the vocabulary or a text is longer than `max_words`.
        """
        return self.embed_word_vectors(self.word_vectors(word_ids))

    def word_vectors(self, word_ids: Packed) -> Packed:
        """Word ids, rows int [N], each text `[CLS] … [SEP]` -> what they are looked up as, rows [N, H].

        Raises InputError as `embed_text` does.
        """
        self._check_text(word_ids)
        word_ids = word_ids.to(self.log_temperature.device, torch.int64)
        if self.config.text == "embeddings":
            return word_ids.with_rows(self._text_bert.embeddings.word_embeddings(word_ids.rows))
        text_encoder = self.frozen.need_text_encoder(self.config.text_encoder).to(word_ids.rows.device)
        x = text_encoder.encode_packed(word_ids)
        return x.with_rows(self.text_projection(x.rows)) if hasattr(self, "text_projection") else x

    @property
    def word_width(self) -> int:
        """Width of a word's vector."""
        return self.config.width

    @property
    def word_positions(self) -> int:
        """Most vectors of one text, [CLS] and [SEP] among them."""
        return self.config.positions - self.config.first_text_position + 1

    def embed_word_vectors(self, vectors: Packed) -> Tensor:
        """Vectors of B texts, `[CLS] … [SEP]`, rows [N, H] -> [B, H]: they need be no words, as prompts are not.

        Raises InputError if a text has more vectors than there are positions.
        """
        return self._features(*self._encode_word_vectors(vectors))

    def _encode_word_vectors(self, vectors: Packed) -> tuple[Packed, Tensor]:
        """Outputs for `[CLS] … [SEP]`, shortest text first, and which text each was before."""
        if int(vectors.lengths.max()) > self.word_positions:
            raise InputError(
                f"a text of {int(vectors.lengths.max())} words and prompts; this model has {self.word_positions} "
                "positions for texts"
            )
        x, order = vectors.by_length()
        positions, types = x.positions, torch.zeros(len(x.rows), dtype=torch.int64)
        if self.config.transformer == "shared":  # the places of a full video clip come first
            is_word = positions > 0
            positions = torch.where(is_word, positions + self.config.first_text_position - 1, 0)
            types = is_word.long()
        return self._text_bert(x, positions, types), order

    def get_video_features(self, video_tokens: Tensor, video_mask: Tensor) -> Tensor:
        """Padded tokens [B, T, D] and their mask, bool [B, T] (True where there is a token) -> [B, H]."""
        return self.embed_video(Packed.from_padded(video_tokens, video_mask))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Padded word ids int64 [B, L], `[CLS] … [SEP]` included, and their mask [B, L] -> [B, H]."""
        return self.embed_text(Packed.from_padded(input_ids, attention_mask))

    def _features(self, x: Packed, order: Tensor) -> Tensor:
        """Pool every sequence to one vector, back in the order in which they came: [B, H]."""
        pooled = self._pool(x)[torch.argsort(order).to(x.rows.device)]
        return F.normalize(pooled, dim=-1) if self.config.normalize else pooled

    def _pool(self, x: Packed) -> Tensor:
        """[B, H]. The mean leaves [CLS] out and counts [SEP], as the release does."""
        if self.config.pooling == "cls":
            return x.rows[x.starts.to(x.rows.device)]
        return torch.cat([run[:, 1:].mean(1) for run in x.by_run()])  # run: (count, length, H)

    @property
    def _video_tower(self) -> VideoTower:
        return self.mm_encoder if self.config.transformer == "shared" else self.video_encoder

    @property
    def _text_bert(self) -> Bert:
        return self.mm_encoder.bert if self.config.transformer == "shared" else self.text_encoder

    def _special_words(self, tower: VideoTower) -> Tensor:
        """[2, H]: the word embeddings of [CLS] and [SEP] that wrap a video."""
        weight = tower.bert.embeddings.word_embeddings.weight
        if len(weight) == 2:
            return weight
        return weight[[self.config.cls_id, self.config.sep_id]]

    def _check_video(self, tokens: Packed) -> None:
        config = self.config
        if tokens.rows.ndim != 2 or tokens.rows.shape[1] != config.video_dimension:
            raise InputError(
                f"video tokens are {tokens.rows.shape[-1]} wide, but this model takes {config.video_dimension}; "
                "extract them with the encoder that it was trained on"
            )
        if not self.training and not torch.isfinite(tokens.rows).all():
            raise InputError("video tokens hold values that are not finite; extract them again")
        if len(tokens) and not 1 <= int(tokens.lengths.min()) <= int(tokens.lengths.max()) <= config.max_seconds:
            raise InputError(f"a video clip must have 1 to {config.max_seconds} tokens")

    def _check_text(self, word_ids: Packed) -> None:
        lengths, ids = word_ids.lengths, word_ids.rows
        if not len(lengths) or int(lengths.min()) < 2 or int(lengths.max()) > self.config.max_words + 2:
            raise InputError(f"a text must be [CLS], at most {self.config.max_words} words, [SEP]")
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocabulary:
            raise InputError(
                f"word id {int(ids.max())} is outside the vocabulary of {self.config.vocabulary}; "
                "the text was cut by another tokenizer"
            )

    # --- Saving ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str, card: ModelCard | None = None, **_: object) -> None:  # type: ignore[override]
        """Write `config.json`, `model.safetensors`, the tokenizer and frozen encoders that the model has, a card, and
        `modules.json`, by which sentence-transformers knows how to load the folder.

        Other keywords are those that huggingface_hub's `push_to_hub` passes; nothing here depends on them.
        """
        folder = Path(folder)
        save_model(folder, self, self.config, self.recipe)
        save_card(folder, card or ModelCard(), self.config.describe())
        write_json(folder / MODULES_FILE, SENTENCE_TRANSFORMERS)
        self.frozen.save(folder)

    @classmethod
    def from_pretrained(cls, folder_or_id: Path | str) -> Self:  # type: ignore[override]
        """Read a model from a folder, or from a hub id.

        Raises InputError if it is neither, or if configuration and weights do not fit together.
        """
        folder = find_folder(folder_or_id)
        model = cls(read_config(folder, cls.config_class))
        load_weights(folder, model)
        model.frozen.folder = folder
        return model.eval()
