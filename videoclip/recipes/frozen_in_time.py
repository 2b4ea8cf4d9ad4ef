"""Frozen in Time (Bain, Nagrani, Varol, Zisserman, ICCV 2021): two towers end to end from a few frames.

A clip is seen by a vision transformer that looks through time, then through space, in every block; a text by BERT.
Both [CLS] are projected to unit vectors and contrasted both ways at a fixed temperature. A picture is a video of one
frame; training begins with one frame and goes on with four. The text tower is a BERT of six layers, not DistilBERT's.
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
from videoclip.packed import Packed
from videoclip.parts.frame_batches import as_frames, frame_batch
from videoclip.parts.frame_options import FrameOptions
from videoclip.parts.fusion import first_rows, through
from videoclip.parts.pairs import gather_pairs
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
class Options(FrameOptions):
    """The published constants."""

    temperature: float = 0.05
    single_frame_steps: int = 50000
    """Steps on one frame before all are shown."""


class Recipe(FrameModel):
    """Both towers, under the release's names."""

    recipe: ClassVar[str] = "frozen-in-time"
    config_class: ClassVar[type] = FrozenInTimeConfig
    repeats_pictures: ClassVar[bool] = False  # a picture is a clip of one frame
    training_sampler: ClassVar[str] = "segments"
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
        """The normalised softmax loss both ways, summed, over all workers' pairs; figures of `Pairs`, and `frames`."""
        batch = frame_batch(batch, self.config.vision, self.frames, self.training_sampler)
        video, text = self.video_features(normalised(batch.frames)), self.embed_text(batch.words)  # (P, H) each
        pairs = gather_pairs(video, text, batch)
        frames = torch.tensor(float(batch.frames.shape[1]))
        return {"loss": pairs.contrast(self.temperature), **pairs.figures(), "frames": frames}

    def after_step(self) -> None:
        """One step further in the curriculum."""
        self.steps_done += 1

    @property
    def vision(self) -> VisionShape:
        """The shape of what looks at frames."""
        return self.config.vision

    @property
    def frames(self) -> int:
        """How many frames clips have at present."""
        return self.config.frames_at(int(self.steps_done))

    @property
    def temperature(self) -> Tensor:
        """Divides cosines; never trained."""
        return torch.tensor(self.config.temperature)

    def video_features(self, frames: Tensor) -> Tensor:
        """Normalised frames [B, T, 3, S, S], T up to the model's -> unit vectors [B, projection]."""
        return F.normalize(self.vid_proj(self.video_model(frames).special[:, 0]), dim=-1)

    def embed_video(self, frames: Packed) -> Tensor:
        """Clips of any number of frames, uint8 [N, S, S, 3] or rows of shards -> unit vectors [B, projection]."""
        clips = FrameBatch.even(as_frames(frames, self.config.vision.size), self.frames)
        return self.video_features(normalised(clips.to(self.steps_done.device)))

    def embed_text(self, word_ids: Packed) -> Tensor:
        """Word ids with [CLS] … [SEP] -> unit vectors [B, projection]."""
        words = word_ids.to(self.steps_done.device, torch.int64)
        states = through(self.text_model.encoder.layer, embedded(self.text_model, words))
        return F.normalize(self.txt_proj(first_rows(states)), dim=-1)


def build(options: Options, manifest: Manifest, tokenizer: WordTokenizer) -> Recipe:
    """A new model for shards of frames and texts cut by `tokenizer`. Raises InputError if the shards hold no frames."""
    curriculum = (*(((0, 1),) if options.single_frame_steps else ()), (options.single_frame_steps, options.frames))
    config = FrozenInTimeConfig(
        options.vision(manifest, "frozen"),
        options.text(options.text_layers),
        tokenizer.vocabulary,
        options.projection,
        options.temperature,
        curriculum,
        options.max_seconds,
        options.max_words,
        manifest.fingerprint,
    )
    model = Recipe(config)
    model.frozen.tokenizer = tokenizer
    return model
