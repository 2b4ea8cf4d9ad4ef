"""Frozen in Time (Bain, Nagrani, Varol, Zisserman, ICCV 2021): two towers end to end from a few frames.

A clip is seen by a vision transformer that looks through time, then through space, in every block; a text by BERT.
Both [CLS] are projected to unit vectors and contrasted both ways at a fixed temperature. A picture is a video of one
frame, so pictures and videos train the same weights, and training begins with one frame and goes on with four.

Exact: the space-time block, its start at "no time", the losses, the curriculum. Approximate: the text tower is our
BERT (with the release's DistilBERT's 6 layers), whose files load through `convert.from_bert`'s names, not DistilBERT's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.data.frames import FrameBatch
from videoclip.errors import InputError
from videoclip.gather import gather_with_gradient, rank_offset, rows_per_rank
from videoclip.losses import contrastive_loss
from videoclip.packed import Packed
from videoclip.parts.fusion import first_rows
from videoclip.parts.pixels import normalised
from videoclip.parts.towers import embedded
from videoclip.parts.vision_transformer import VisionShape, VisionTransformer
from videoclip.transformer import Bert, TransformerShape, initialise_as_bert


@dataclass(frozen=True)
class Options:
    """The published constants."""

    vision: VisionShape = field(default_factory=lambda: VisionShape(attention="frozen"))
    text: TransformerShape = field(default_factory=lambda: TransformerShape(layers=6))
    vocabulary: int = 30522
    projection: int = 256
    temperature: float = 0.05
    """Fixed."""
    curriculum: tuple[tuple[float, int], ...] = ((0.0, 1), (0.5, 4))
    """From which share of the training on clips have how many frames."""

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.curriculum]
        if not starts or starts[0] != 0 or starts != sorted(starts):
            raise InputError(f"a curriculum begins at 0 and goes on from there, not {self.curriculum}")
        if max(frames for _, frames in self.curriculum) > self.vision.frames:
            raise InputError(f"the curriculum asks for more than the model's {self.vision.frames} frames")

    def frames_at(self, share: float) -> int:
        """How many frames clips have when this share of the training, 0 to 1, is done."""
        return [frames for start, frames in self.curriculum if start <= share][-1]


class Recipe(nn.Module):
    """Both towers, under the release's names."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.video_model = VisionTransformer(options.vision)
        self.text_model = Bert(options.text, options.vocabulary).apply(initialise_as_bert)
        self.vid_proj = nn.Sequential(nn.Linear(options.vision.width, options.projection))
        self.txt_proj = nn.Sequential(nn.ReLU(), nn.Linear(options.text.width, options.projection))

    def forward(self, batch: FrameBatch) -> dict[str, Tensor]:
        """The normalised softmax loss both ways, summed, over the pairs of all workers; `accuracy` as a share."""
        video = self.video_features(normalised(batch.frames))  # (P, H)
        text = self.embed_text(batch.words)
        counts = rows_per_rank(len(video))
        gathered = gather_with_gradient(video, counts), gather_with_gradient(text, counts)
        first = rank_offset(counts)
        excluded = batch.excluded if len(counts) == 1 else None
        loss = contrastive_loss(video, text, self.temperature, gathered, first, excluded)
        nearest = (video @ gathered[1].T).argmax(1).cpu() == first + torch.arange(len(video))
        return {"loss": loss, "accuracy": nearest.float().mean()}

    @property
    def temperature(self) -> Tensor:
        """Divides cosines; never trained."""
        return torch.tensor(self.options.temperature)

    def video_features(self, frames: Tensor) -> Tensor:
        """Normalised frames [B, T, 3, S, S], T up to the model's -> unit vectors [B, projection]."""
        return F.normalize(self.vid_proj(self.video_model(frames).special[:, 0]), dim=-1)

    def embed_video(self, frames: Packed) -> Tensor:
        """Clips of any number of frames, uint8 [N, S, S, 3] end to end -> unit vectors [B, projection]."""
        return self.video_features(normalised(FrameBatch.even(frames, self.options.vision.frames)))

    def embed_text(self, word_ids: Packed) -> Tensor:
        """Word ids with [CLS] … [SEP] -> unit vectors [B, projection]."""
        words, order = word_ids.by_length()
        states = self.text_model.encoder(embedded(self.text_model, words)).take(torch.argsort(order))
        return F.normalize(self.txt_proj(first_rows(states)), dim=-1)
