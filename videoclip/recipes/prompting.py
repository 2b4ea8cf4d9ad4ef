"""Efficient-Prompt (Ju et al., ECCV 2022): a frozen dual encoder adapted by prompts and a temporal transformer.

Trained are the vectors around the words given to the frozen text side, and a small transformer over frozen features of
frames. Every task is "which text is nearest": class names for recognition, sentences for retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.data.action_clips import ActionBatch
from videoclip.data.clips import ClipBatch
from videoclip.data.shards import Manifest, check_encoder
from videoclip.data.words import WordTokenizer
from videoclip.errors import InputError
from videoclip.files import read_json
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.packed import Packed
from videoclip.parts.clip import Clip, ClipConfig
from videoclip.parts.clip_files import read_clip
from videoclip.parts.pairs import gather_pairs
from videoclip.parts.prompts import Position, Prompts, TemporalTransformer, TextSide, cut_words, pack_words
from videoclip.parts.saved import SavedTowers
from videoclip.pretrained import CONFIG_FILE, find_folder, load_weights, read_config
from videoclip.recipes import from_pretrained

LONGEST_CLIP = 8  # times the frames that are sampled: longer clips are cut by those who ask


@dataclass(frozen=True)
class Options:
    """Prompts around words, a transformer over frames. Defaults: the paper's 16+X+16, one temporal layer."""

    towers: str = ""
    """The frozen dual encoder: a model of ours, or a CLIP as Hugging Face (folder or hub id) or OpenAI (file) stores
    it. Shards must hold its own image embeddings, or, for a model of ours, the tokens that it was trained on."""
    prefix: int = 16
    """Vectors before a text's words."""
    postfix: int = 16
    """Vectors behind them."""
    position: Position = "relative"
    """`relative`: all texts share all vectors, as the paper says. `absolute`: a vector a position, as the release."""
    frames: int = 16
    """Rows of a clip that are looked at, evenly spaced."""
    layers: int = 1
    """Of the temporal transformer; 0: the mean of the frames."""
    heads: int = 0
    """Of the temporal transformer; 0: one for 64 columns, at least one."""
    temperature: float = 0.07
    """Fixed. Not the frozen model's own."""
    symmetric: bool = False
    """Retrieval: contrast texts with videos too, not videos with texts alone."""


@dataclass(frozen=True)
class Config(Options):
    """Options, and what is frozen: the sizes of a CLIP or the configuration of a model of ours."""

    clip: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    width: int = 512
    """Of an embedding."""
    max_seconds: int = 128
    max_words: int = 43
    normalize: bool = True
    video_encoder: str = ""
    """Fingerprint of the frozen encoder whose tokens this model was trained on; empty if unknown."""

    def describe(self) -> dict[str, str]:
        """What a model's card says of it."""
        kind = "a CLIP" if self.clip else "a VideoCLIP"
        return {
            "Prompts": f"{self.prefix}+X+{self.postfix}, {self.position}, around the words of {kind} that is frozen",
            "Video": f"{self.frames} frames, {self.layers} temporal layers",
        }


class Recipe(SavedTowers):
    """The frozen dual encoder `towers`, with `prompts` for its words and `temporal` over its frames."""

    recipe: ClassVar[str] = "prompting"

    def __init__(self, config: Config, towers: Clip | VideoCLIP) -> None:
        super().__init__()
        self.config = config
        self.towers = towers
        text_side: TextSide = towers
        self.prompts = Prompts(
            text_side.word_width, config.prefix, config.postfix, config.position, text_side.word_positions
        )
        heads = config.heads or max(1, config.width // 64)
        self.temporal = TemporalTransformer(config.width, config.frames, config.layers, heads)
        self.towers.requires_grad_(False)
        self.prompts.requires_grad_(config.prefix + config.postfix > 0)
        self.temporal.requires_grad_(config.layers > 0)
        self.train(False)

    def train(self, mode: bool = True) -> Recipe:
        """The frozen towers stay in evaluation mode."""
        super().train(mode)
        self.towers.train(False)
        return self

    # --- Features as the release has them, not of unit length -------------------------------------------------------

    def video_features(self, frames: Tensor) -> Tensor:
        """Frozen features of B clips of equally many frames [B, T, H] -> [B, H]."""
        count, length = frames.shape[:2]
        return self.clip_features(Packed(frames.flatten(0, 1), torch.full((count,), length)))

    def clip_features(self, frames: Packed) -> Tensor:
        """The same for clips of different lengths, rows [N, H] -> [B, H]. Raises InputError for another width."""
        if frames.rows.ndim != 2 or frames.rows.shape[1] != self.config.width:
            raise InputError(f"frame features are {frames.rows.shape[-1]} wide; these towers give {self.config.width}")
        return self.temporal(frames.to(self._device, torch.float32))

    def class_features(self, word_ids: Sequence[Sequence[int]]) -> Tensor:
        """Word ids of C names, start and end ids included -> [C, H]. Raises InputError if a name does not fit."""
        return self.text_features(pack_words(word_ids))

    def text_features(self, word_ids: Packed) -> Tensor:
        """The same for names laid end to end, rows int [N]; with gradient through the frozen text side."""
        side: TextSide = self.towers
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.prompts.embedding.weight.requires_grad):
            return side.embed_word_vectors(self.prompts(side.word_vectors(word_ids)))

    # --- Losses -----------------------------------------------------------------------------------------------------

    def forward(self, batch: ActionBatch | ClipBatch) -> dict[str, Tensor]:
        """Cross-entropy over the classes of a batch, or over the sentences of all workers.

        Names must fit beside the prompts; sentences are cut, and "cut" is the share of those.
        """
        if isinstance(batch, ActionBatch):
            logits = self.class_logits(batch.frames, batch.classes)
            labels = batch.labels.to(logits.device)
            accuracy = (logits.argmax(1) == labels).float().mean()
            return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy}
        words, cut = cut_words(batch.word_ids, self.prompts.room)
        pairs = gather_pairs(self.embed_video(batch.video_tokens), self.embed_text(words), batch)
        target = torch.arange(len(batch), device=pairs.video.device) + pairs.rank_offset
        ways = [(pairs.video, pairs.all_text), (pairs.text, pairs.all_video)][: 2 if self.config.symmetric else 1]
        loss = pairs.video.new_zeros(())
        for own, others in ways:
            logits = (own @ others.T / self.config.temperature).masked_fill(pairs.excluded, float("-inf"))
            loss = loss + F.cross_entropy(logits, target)
        return {"loss": loss, **pairs.figures(), "cut": loss.new_tensor(cut / len(batch))}

    def class_logits(self, frames: Packed, classes: Packed) -> Tensor:
        """Clips of features, rows [N, H], against names, rows int [M]: [B, C], cosines over the temperature."""
        video, text = self.clip_features(frames), self.text_features(classes)
        return F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).T / self.config.temperature

    # --- Two towers -------------------------------------------------------------------------------------------------

    def embed_video(self, tokens: Packed) -> Tensor:
        """Tokens of shards, rows [N, D] of B clips -> [B, H] of unit length: evenly spaced rows of each clip."""
        return F.normalize(self.clip_features(self.frame_features(evenly_spaced(tokens, self.config.frames))), dim=-1)

    def embed_text(self, word_ids: Packed) -> Tensor:
        """Word ids of B texts, rows int [N], start and end word included -> [B, H] of unit length."""
        return F.normalize(self.text_features(word_ids), dim=-1)

    @torch.no_grad()
    def frame_features(self, tokens: Packed) -> Packed:
        """Tokens of shards -> frozen features of the towers' space, rows [N, H]: each row as a clip of its own."""
        if isinstance(self.towers, Clip):
            return tokens  # a CLIP's shards hold its image embeddings
        singles = Packed(tokens.rows, torch.ones(len(tokens.rows), dtype=torch.int64))
        return tokens.with_rows(self.towers.embed_video(singles))

    @property
    def temperature(self) -> Tensor:
        """Scalar that divides similarities."""
        return torch.tensor(self.config.temperature)

    @property
    def _device(self) -> torch.device:
        return self.prompts.embedding.weight.device

    @classmethod
    def from_pretrained(cls, folder_or_id: Path | str) -> Recipe:
        """Read a model from a folder or a hub id. Raises InputError if there is none, or its parts do not fit."""
        folder = find_folder(folder_or_id)
        config = read_config(folder, Config)
        if config.clip:
            towers: Clip | VideoCLIP = Clip(ClipConfig(**config.clip))
        else:
            towers = VideoCLIP(VideoCLIPConfig(**config.model))
        model = cls(config, towers)
        load_weights(folder, model)
        model.frozen.folder = folder
        return model


def evenly_spaced(clips: Packed, count: int) -> Packed:
    """At most `count` rows of every clip, the middles of as many equal stretches."""
    kept = []
    for start, length in zip(clips.starts.tolist(), clips.lengths.tolist()):
        few = min(length, count)
        kept.append(start + ((torch.arange(few) + 0.5) * length / few).long())
    places = torch.cat(kept).to(clips.rows.device)
    return Packed(clips.rows[places], clips.lengths.clamp(max=count))


def prompted(options: Options, towers: Clip | VideoCLIP, video_encoder: str = "") -> Recipe:
    """New prompts and a new temporal transformer around frozen towers."""
    if isinstance(towers, Clip):
        frozen: dict[str, Any] = {"clip": asdict(towers.config)}
        width = towers.dimension
    else:
        if towers.config.text == "frozen":
            raise InputError("prompts need a text side with words of its own, not hidden states of a frozen encoder")
        frozen, width = {"model": asdict(towers.config)}, towers.config.width
    config = Config(
        **asdict(options),
        **frozen,
        width=width,
        max_seconds=LONGEST_CLIP * options.frames,
        max_words=towers.word_positions - options.prefix - options.postfix - 2,
        video_encoder=video_encoder,
    )
    return Recipe(config, towers)


def build(options: Options, manifest: Manifest, tokenizer: WordTokenizer) -> Recipe:
    """A new model for shards of the towers' own tokens and texts cut by their tokenizer.

    Raises InputError if no towers are named, or they and the shards or the tokenizer do not belong together.
    """
    towers, own_tokenizer = load_towers(options.towers)
    if own_tokenizer.fingerprint() != tokenizer.fingerprint():
        raise InputError(f"{options.towers}: its words are cut by another tokenizer; give --tokenizer {options.towers}")
    if isinstance(towers, VideoCLIP) and towers.config.video_encoder:
        check_encoder(manifest, towers.config.video_encoder, "the encoder of the frozen towers", options.towers)
    width = towers.dimension if isinstance(towers, Clip) else towers.config.video_dimension
    if manifest.dimension != width:
        raise InputError(f"{options.towers}: takes tokens {width} wide, but the shards' are {manifest.dimension}")
    model = prompted(options, towers, manifest.fingerprint)
    model.frozen.tokenizer = tokenizer
    return model


def tokenizer_of(options: Options) -> WordTokenizer:
    """What cuts texts for the towers. Raises InputError as `load_towers`."""
    return load_towers(options.towers)[1]


def load_towers(path_or_id: str) -> tuple[Clip | VideoCLIP, WordTokenizer]:
    """A frozen dual encoder and its tokenizer: a model of ours, or a CLIP. Raises InputError if it is neither."""
    if not path_or_id:
        raise InputError("name the frozen dual encoder: --model.towers FOLDER, a hub id, or OpenAI's file")
    if Path(path_or_id).is_file():
        folder = Path(path_or_id).parent
        return read_clip(path_or_id), WordTokenizer.load(folder)
    folder = find_folder(path_or_id)
    if read_json(folder / CONFIG_FILE).get("model_type") == "clip":
        return read_clip(folder), WordTokenizer.load(folder)
    model = cast(nn.Module, from_pretrained(folder))
    if not isinstance(model, VideoCLIP):
        raise InputError(f"{path_or_id}: a {type(model).__module__}, whose text side cannot be taken apart")
    return model, model.tokenizer()
