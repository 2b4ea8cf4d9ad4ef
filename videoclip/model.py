"""VideoCLIP: frozen tokens in, one vector per clip out, for video and for text in the same space.

The trainable transformer (`transformer.py`) takes sequences end to end instead of padded. There is one numerical
path; padded inputs are packed first.

Parameter names are those of the public release (and so of BERT), so a checkpoint loads without a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.errors import InputError
from videoclip.files import atomic_path, read_json, write_json, write_text
from videoclip.transformer import Bert, Packing, within_sequences

try:
    from huggingface_hub import ModelHubMixin
except ImportError:  # training and saving work without it; only the hub does not

    class ModelHubMixin:  # type: ignore[no-redef]
        """Stands in where huggingface_hub is not installed."""


WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
CLS, SEP = 0, 1  # rows of the two-row word embedding that wraps video tokens


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
    transformer: str = "shared"
    """`shared`: one transformer for both sides. `separate`: one each."""
    pooling: str = "mean"
    """`mean` over all positions but [CLS], or `cls`."""
    text: str = "embeddings"
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
        for name, allowed in (
            ("transformer", ("shared", "separate")),
            ("pooling", ("mean", "cls")),
            ("text", ("embeddings", "frozen")),
        ):
            if getattr(self, name) not in allowed:
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


@dataclass(frozen=True)
class ModelCard:
    """What a model's README says besides its configuration. `scores`: figure -> value, as evaluation wrote them."""

    data: str = "not recorded"
    video_encoder: str = "not recorded"
    license: str = "mit"
    scores: tuple[tuple[str, float], ...] = ()

    def render(self, config: VideoCLIPConfig) -> str:
        """Markdown, with the header that the hub reads."""
        text = {"embeddings": "trainable word embeddings", "frozen": f"frozen {config.text_encoder or 'encoder'}"}
        scores = "\n".join(f"| {name} | {value:.2f} |" for name, value in self.scores)
        table = f"\n| figure | value |\n|---|---|\n{scores}\n" if scores else " none recorded\n"
        return (
            f"---\nlicense: {self.license}\nlibrary_name: videoclip\n"
            "tags: [video-text-retrieval, moment-retrieval]\n---\n"
            "# VideoCLIP\n\nVideo and text clips in one space, learned from narration (Xu et al., EMNLP 2021).\n\n"
            f"- Data: {self.data}\n"
            f"- Video tokens: {self.video_encoder}, {config.video_dimension} wide, one a second\n"
            f"- Text: {text[config.text]}, {config.vocabulary} words\n"
            f"- Transformer: {config.transformer}, {config.layers} layers, {config.width} wide, "
            f"{config.pooling} pooling\n"
            f"- Licence: {self.license}\n- Scores:{table}"
        )


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
        self.bert = Bert(config, layers, vocabulary)


class VideoCLIP(nn.Module, ModelHubMixin):
    """The trainable part of VideoCLIP, with the frozen encoders and the tokenizer it belongs to where they are known.

    Frozen encoders and tokenizer are no parameters; they are read from the model's folder when they are first needed.
    `push_to_hub(repo_id)` is huggingface_hub's; it uploads what `save_pretrained` writes.
    """

    def __init__(self, config: VideoCLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.folder: Path | None = None  # where frozen encoders and tokenizer are found when they are first needed
        self._frozen: dict[str, Any] = {}  # a dict, so that frozen modules are no part of the state
        words = config.vocabulary if config.text == "embeddings" else 2
        if config.transformer == "shared":
            self.mm_encoder = VideoTower(config, config.layers, words)
        else:
            self.video_encoder = VideoTower(config, config.video_layers, 2)
            self.text_encoder = Bert(config, config.layers, words)
        if config.text == "frozen" and config.transformer == "separate":
            self.text_encoder.embeddings.word_embeddings.requires_grad_(False)  # never looked at
        if config.text == "frozen" and config.text_dimension != config.width:
            self.text_projection = nn.Linear(config.text_dimension, config.width)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(config.temperature)), requires_grad=config.train_temperature
        )
        self.apply(_initialise)

    # --- Embedding ------------------------------------------------------------------------------------------------

    def embed_video(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Concatenated video tokens [sum of lengths, D] and lengths int64 [B] -> [B, H].

        Raises InputError if the tokens have another width, or a clip is empty or longer than `max_seconds`.
        """
        return self._features(*self._encode_video(tokens, lengths))

    def video_hidden(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The transformer's output for every token, concatenated like the input: [sum of lengths, H].

        A clip's embedding is the mean of these rows and of that of [SEP] (with mean pooling), scaled to unit length.
        Raises InputError as `embed_video` does.
        """
        x, packing = self._encode_video(tokens, lengths)
        wrapped = lengths.cpu() + 2
        inverse = torch.empty(len(x), dtype=torch.int64)
        inverse[packing.rows_of(wrapped)] = torch.arange(len(x))
        within = within_sequences(wrapped)
        inner = (within > 0) & (within < torch.repeat_interleave(wrapped - 1, wrapped))
        return x[inverse[inner].to(x.device)]

    def _encode_video(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Packing]:
        if tokens.ndim != 2 or tokens.shape[1] != self.config.video_dimension:
            raise InputError(
                f"video tokens are {tokens.shape[-1]} wide, but this model takes {self.config.video_dimension}; "
                "extract them with the encoder that it was trained on"
            )
        if not self.training and not torch.isfinite(tokens).all():
            raise InputError("video tokens hold values that are not finite; extract them again")
        lengths = lengths.cpu()
        if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= self.config.max_seconds:
            raise InputError(f"a video clip must have 1 to {self.config.max_seconds} tokens")
        tower = self._video_tower
        packing = Packing.of(lengths + 2)
        device = self.log_temperature.device
        # Lay out [CLS] tokens [SEP] in the original order, then bring it into the packed one.
        ends = torch.cumsum(lengths + 2, 0)
        inner = torch.ones(int(ends[-1]), dtype=torch.bool)
        inner[ends - 1] = inner[ends - lengths - 2] = False
        source = torch.empty(len(inner), dtype=torch.int64)
        source[inner] = torch.arange(len(tokens))
        source[ends - lengths - 2] = len(tokens) + CLS
        source[ends - 1] = len(tokens) + SEP
        source = source[packing.rows_of(lengths + 2)].to(device)
        special = self._special_words(tower)
        embedded = torch.cat([tower.videomlp(tokens.to(device, special.dtype)), special])[source]
        positions = packing.positions()
        positions[packing.starts + packing.lengths - 1] = self.config.max_seconds + 1  # [SEP], whatever the length
        return self._encode(tower.bert, embedded, positions, torch.zeros_like(positions), packing), packing

    def embed_text(self, word_ids: Tensor, lengths: Tensor) -> Tensor:
        """Concatenated word ids int [sum of lengths], each text `[CLS] … [SEP]`, and lengths int64 [B] -> [B, H].

        Raises InputError if an id is not in the vocabulary or a text is longer than `max_words`.
        """
        lengths = lengths.cpu()
        self._check_text(word_ids, lengths)
        device = self.log_temperature.device
        bert = self._text_bert
        packing = Packing.of(lengths)
        rows = packing.rows_of(lengths)
        word_ids = word_ids.to(device, torch.int64)
        if self.config.text == "frozen":
            hidden = self._frozen_text_encoder().encode_packed(word_ids, lengths)
            embedded = hidden[rows.to(device)]
            if hasattr(self, "text_projection"):
                embedded = self.text_projection(embedded)
        else:
            embedded = bert.embeddings.word_embeddings(word_ids[rows.to(device)])
        positions, types = packing.positions(), torch.zeros(len(rows), dtype=torch.int64)
        if self.config.transformer == "shared":
            is_word = positions > 0
            positions = torch.where(is_word, positions + self.config.first_text_position - 1, 0)
            types = is_word.long()
        return self._features(self._encode(bert, embedded, positions, types, packing), packing)

    def get_video_features(self, video_tokens: Tensor, video_mask: Tensor) -> Tensor:
        """Padded tokens [B, T, D] and their mask, bool [B, T] (True where there is a token) -> [B, H]."""
        return self.embed_video(video_tokens[video_mask], video_mask.sum(1))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Padded word ids int64 [B, L], `[CLS] … [SEP]` included, and their mask [B, L] -> [B, H]."""
        mask = attention_mask.bool()
        return self.embed_text(input_ids[mask], mask.sum(1))

    @property
    def temperature(self) -> Tensor:
        """Scalar that divides similarities; never below 0.01, as in CLIP."""
        return self.log_temperature.exp().clamp_min(0.01)

    def _encode(self, bert: Bert, embedded: Tensor, positions: Tensor, types: Tensor, packing: Packing) -> Tensor:
        x = bert.embeddings(embedded, positions.to(embedded.device), types.to(embedded.device))
        return bert.encoder(x, packing)

    def _features(self, x: Tensor, packing: Packing) -> Tensor:
        """Pool packed rows [N, H] to one vector a sequence, in the original order: [B, H]."""
        pooled = self._pool(x, packing)
        features = torch.empty_like(pooled)
        features[packing.order.to(pooled.device)] = pooled
        return F.normalize(features, dim=-1) if self.config.normalize else features

    def _pool(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, H] -> [B, H], in packed order. The mean leaves [CLS] out and counts [SEP], as the release does."""
        if self.config.pooling == "cls":
            return x[packing.starts.to(x.device)]
        pooled, row = [], 0
        for count, length in packing.runs:
            pooled.append(x[row : row + count * length].unflatten(0, (count, length))[:, 1:].mean(1))
            row += count * length
        return torch.cat(pooled)

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

    def _check_text(self, word_ids: Tensor, lengths: Tensor) -> None:
        if not len(lengths) or int(lengths.min()) < 2 or int(lengths.max()) > self.config.max_words + 2:
            raise InputError(f"a text must be [CLS], at most {self.config.max_words} words, [SEP]")
        if int(word_ids.min()) < 0 or int(word_ids.max()) >= self.config.vocabulary:
            raise InputError(
                f"word id {int(word_ids.max())} is outside the vocabulary of {self.config.vocabulary}; "
                "the text was cut by another tokenizer"
            )

    # --- Own videos and words -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode_video(self, path: Path | str, start: float = 0.0, end: float | None = None) -> Tensor:
        """Embed [start, end) seconds of a video file: decode, frozen encoder, tokens -> float32 [H].

        A clip longer than `max_seconds` is embedded in consecutive pieces whose embeddings are averaged.
        Raises InputError if the file cannot be decoded or the model's folder holds no video encoder.
        """
        tokens = self.frozen_video_encoder().encode_video(Path(path).expanduser(), start, end)
        return self.embed_long_video(torch.from_numpy(tokens))

    def embed_long_video(self, tokens: Tensor) -> Tensor:
        """Tokens [T, D] of any length -> [H]: the mean of the embeddings of pieces of at most `max_seconds`."""
        lengths = torch.tensor([len(piece) for piece in tokens.split(self.config.max_seconds)])
        mean = self.embed_video(tokens, lengths).float().mean(0)
        return F.normalize(mean, dim=0) if self.config.normalize else mean

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Embed texts -> float32 [N, H]. Words beyond `max_words` are left out."""
        tokenizer = self.tokenizer()
        features = []
        for first in range(0, len(texts), batch):
            ids, lengths = tokenizer.clip_ids(texts[first : first + batch], self.config.max_words)
            features.append(self.embed_text(torch.from_numpy(ids), torch.from_numpy(lengths)).float())
        return torch.cat(features)

    def tokenizer(self) -> Any:
        """The `WordTokenizer` of the model's folder."""
        from videoclip.data.words import WordTokenizer

        return self._frozen_part("tokenizer", WordTokenizer.load)

    def frozen_video_encoder(self) -> Any:
        """The `VideoEncoder` of the model's folder, checked to be the one that the model was trained on."""
        from videoclip.encoders.video_encoder import load_video_encoder

        encoder = self._frozen_part("video encoder", load_video_encoder)
        if self.config.video_encoder and encoder.fingerprint() != self.config.video_encoder:
            raise InputError(f"{self.folder}: its video encoder is not the one that this model was trained on")
        return encoder

    def _frozen_text_encoder(self) -> Any:
        from videoclip.encoders.text import FrozenTextEncoder

        def load(folder: Path) -> Any:
            return FrozenTextEncoder(self.config.text_encoder or str(folder / "text_encoder"))

        return self._frozen_part("text encoder", load).to(self.log_temperature.device)

    def _frozen_part(self, name: str, load: Any) -> Any:
        if name not in self._frozen:
            if self.folder is None:
                raise InputError(f"this model has no {name}: load it with from_pretrained, or use set_frozen")
            with torch.inference_mode(False):  # weights made inside it could never be told apart from changed ones
                self._frozen[name] = load(self.folder)
        return self._frozen[name]

    def set_frozen(self, name: str, part: Any) -> None:
        """Give the model its "tokenizer", "video encoder" or "text encoder" directly."""
        self._frozen[name] = part

    # --- Saving ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str, card: ModelCard | None = None, **_: Any) -> None:  # type: ignore[override]
        """Write `config.json`, `model.safetensors`, the tokenizer and frozen encoders that the model has, and a card.

        Other keywords are those that huggingface_hub's `push_to_hub` passes; nothing here depends on them.
        """
        self.save_weights(folder)
        write_text(Path(folder) / "README.md", (card or ModelCard()).render(self.config))
        for part in self._frozen.values():
            part.save(Path(folder))

    def save_weights(self, folder: Path | str) -> None:
        """Write `config.json` and `model.safetensors` alone."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_path(folder / WEIGHTS_FILE) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder_or_id: Path | str) -> VideoCLIP:  # type: ignore[override]
        """Read a model from a folder, or from a hub id.

        Raises InputError if it is neither, or if configuration and weights do not fit together.
        """
        from safetensors.torch import load_file

        folder = _find_folder(folder_or_id)
        values = read_json(folder / CONFIG_FILE)
        known = {item.name for item in fields(VideoCLIPConfig)}
        if not isinstance(values, dict) or set(values) - known:
            unknown = sorted(set(values) - known) if isinstance(values, dict) else "no object"
            raise InputError(f"{folder / CONFIG_FILE}: not a VideoCLIP configuration ({unknown})")
        model = cls(VideoCLIPConfig(**values))
        try:
            model.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except FileNotFoundError:
            raise InputError(f"{folder / WEIGHTS_FILE}: no such file") from None
        except Exception as error:  # safetensors and load_state_dict raise many kinds for a file that does not fit
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{folder / WEIGHTS_FILE}: does not fit {CONFIG_FILE}: {reason}") from None
        model.folder = folder
        return model.eval()


def _find_folder(folder_or_id: Path | str) -> Path:
    folder = Path(folder_or_id)
    if (folder / CONFIG_FILE).is_file():
        return folder
    if folder.exists() or str(folder_or_id).startswith((".", "/", "~")) or str(folder_or_id).count("/") != 1:
        raise InputError(f"{folder}: no model here (a model folder holds {CONFIG_FILE} and {WEIGHTS_FILE})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(str(folder_or_id), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder_or_id}: neither a model folder nor a model on the hub ({reason})") from None


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
