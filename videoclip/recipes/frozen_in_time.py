"""Frozen in Time (Bain, Nagrani, Varol, Zisserman, ICCV 2021): two towers end to end from a few frames.

A clip is seen by a vision transformer that looks through time, then through space, in every block; a text by BERT.
Both [CLS] are projected to unit vectors and contrasted both ways at a fixed temperature. A picture is a video of one
frame, so pictures and videos train the same weights, and training begins with one frame and goes on with four.

Exact: the space-time block, its start at "no time", the losses, the curriculum. Approximate: the text tower is our
BERT (with the release's DistilBERT's 6 layers), whose files load through `convert.from_bert`'s names, not DistilBERT's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.data.clips import ClipBatch
from videoclip.data.frames import FrameBatch
from videoclip.data.shards import Manifest
from videoclip.data.words import WordTokenizer
from videoclip.errors import InputError
from videoclip.frame_model import FrameModel
from videoclip.gather import gather_with_gradient, rank_offset, rows_per_rank
from videoclip.losses import contrastive_loss
from videoclip.packed import Packed
from videoclip.parts.frame_batches import as_frames, frame_batch, frame_size
from videoclip.parts.fusion import first_rows, through
from videoclip.parts.pixels import normalised
from videoclip.parts.towers import embedded
from videoclip.parts.vision_transformer import VisionShape, VisionTransformer
from videoclip.transformer import Bert, TransformerShape, initialise_as_bert


@dataclass(frozen=True)
class FrozenInTimeConfig:
    """The shape of a model and its curriculum. The defaults are the published ones."""

    vision: VisionShape = field(default_factory=lambda: VisionShape(attention="frozen"))
    text: TransformerShape = field(default_factory=lambda: TransformerShape(layers=6))
    vocabulary: int = 30522
    projection: int = 256
    temperature: float = 0.05
    """Fixed."""
    curriculum: tuple[tuple[int, int], ...] = ((0, 1), (50000, 4))
    """(step, frames): from which step on clips have how many frames."""
    max_seconds: int = 32
    max_words: int = 30
    video_encoder: str = ""
    """Fingerprint of what made the frames in the shards."""
    normalize: bool = True

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.curriculum]
        if not steps or steps[0] != 0 or steps != sorted(steps):
            raise InputError(f"a curriculum begins at step 0 and goes on from there, not {self.curriculum}")
        if max(frames for _, frames in self.curriculum) > self.vision.frames:
            raise InputError(f"the curriculum asks for more than the model's {self.vision.frames} frames")

    @property
    def width(self) -> int:
        """Of an embedding."""
        return self.projection

    def frames_at(self, step: int) -> int:
        """How many frames clips have at this step of the training."""
        return [frames for first, frames in self.curriculum if first <= step][-1]


@dataclass(frozen=True)
class Options:
    """The published constants."""

    patch: int = 16
    frames: int = 4
    width: int = 768
    heads: int = 12
    vision_layers: int = 12
    text_layers: int = 6
    projection: int = 256
    temperature: float = 0.05
    dropout: float = 0.1
    single_frame_steps: int = 50000
    """Steps on one frame before all are shown."""
    max_seconds: int = 0
    """Longest video clip; 0: that of the training clips."""
    max_words: int = 0
    """Longest text; 0: that of the training clips."""


class Recipe(FrameModel):
    """Both towers, under the release's names."""

    recipe: ClassVar[str] = "frozen-in-time"
    config_class: ClassVar[type] = FrozenInTimeConfig
    steps_done: Tensor

    def __init__(self, config: FrozenInTimeConfig) -> None:
        super().__init__()
        self.config = config
        self.video_model = VisionTransformer(config.vision)
        self.text_model = Bert(config.text, config.vocabulary).apply(initialise_as_bert)
        self.vid_proj = nn.Sequential(nn.Linear(config.vision.width, config.projection))
        self.txt_proj = nn.Sequential(nn.ReLU(), nn.Linear(config.text.width, config.projection))
        self.register_buffer("steps_done", torch.tensor(0))  # where in its curriculum a resumed run is

    def forward(self, batch: ClipBatch | FrameBatch) -> dict[str, Tensor]:
        """The normalised softmax loss both ways, summed, over the pairs of all workers; `accuracy` as a share."""
        vision = self.config.vision
        frames = self.config.frames_at(int(self.steps_done))
        batch = frame_batch(batch, vision.size, frames, vision.grid, "segments")
        video = self.video_features(normalised(batch.frames))  # (P, H)
        text = self.embed_text(batch.words)
        counts = batch.rows_per_rank or rows_per_rank(len(video))
        gathered = gather_with_gradient(video, counts), gather_with_gradient(text, counts)
        first = rank_offset(counts)
        excluded = batch.excluded if len(counts) == 1 else None
        loss = contrastive_loss(video, text, self.temperature, gathered, first, excluded)
        own = first + torch.arange(len(video), device=video.device)
        accuracy = ((video @ gathered[1].T).argmax(1) == own).float().mean()
        return {"loss": loss, "accuracy": accuracy, "frames": torch.tensor(float(batch.frames.shape[1]))}

    def after_step(self) -> None:
        """One step further in the curriculum."""
        self.steps_done += 1

    @property
    def temperature(self) -> Tensor:
        """Divides cosines; never trained."""
        return torch.tensor(self.config.temperature)

    def video_features(self, frames: Tensor) -> Tensor:
        """Normalised frames [B, T, 3, S, S], T up to the model's -> unit vectors [B, projection]."""
        return F.normalize(self.vid_proj(self.video_model(frames).special[:, 0]), dim=-1)

    def embed_video(self, frames: Packed) -> Tensor:
        """Clips of any number of frames, uint8 [N, S, S, 3] or rows of shards -> unit vectors [B, projection]."""
        vision = self.config.vision
        clips = FrameBatch.even(as_frames(frames, vision.size), self.config.frames_at(int(self.steps_done)))
        return self.video_features(normalised(clips.to(self.steps_done.device)))

    def embed_text(self, word_ids: Packed) -> Tensor:
        """Word ids with [CLS] … [SEP] -> unit vectors [B, projection]."""
        words = word_ids.to(self.steps_done.device, torch.int64)
        states = through(self.text_model.encoder.layer, embedded(self.text_model, words))
        return F.normalize(self.txt_proj(first_rows(states)), dim=-1)


def build(options: Options, manifest: Manifest, tokenizer: WordTokenizer) -> Recipe:
    """A new model for shards of frames and texts cut by `tokenizer`. Raises InputError if the shards hold no frames."""
    width, heads = options.width, options.heads
    vision = VisionShape(
        frame_size(manifest),
        options.patch,
        frames=options.frames,
        width=width,
        layers=options.vision_layers,
        heads=heads,
        intermediate=4 * width,
        attention="frozen",
    )
    positions = max(64, options.max_words + 2)
    text = TransformerShape(width, heads, 4 * width, options.text_layers, options.dropout, positions)
    single = ((0, 1),) if options.single_frame_steps else ()
    config = FrozenInTimeConfig(
        vision,
        text,
        tokenizer.vocabulary,
        options.projection,
        options.temperature,
        (*single, (options.single_frame_steps, options.frames)),
        options.max_seconds,
        options.max_words,
        manifest.fingerprint,
    )
    model = Recipe(config)
    model.frozen.tokenizer = tokenizer
    return model
