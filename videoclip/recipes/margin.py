"""The max-margin ranking loss of HowTo100M's first model (Miech et al., ICCV 2019), on VideoCLIP's towers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from videoclip.data.clips import ClipBatch
from videoclip.data.shards import Manifest
from videoclip.data.words import WordTokenizer
from videoclip.losses import margin_ranking_loss
from videoclip.parts.pairs import Pairs, gather_pairs
from videoclip.recipes import videoclip
from videoclip.recipes.videoclip import Options

MARGIN = 0.1  # section 4 of the paper

__all__ = ["MARGIN", "Options", "Recipe", "build"]


class Recipe(videoclip.Recipe):
    """VideoCLIP's model; a positive should be nearer than every negative by a margin."""

    recipe: ClassVar[str] = "margin"

    def forward(self, batch: ClipBatch) -> dict[str, Tensor]:
        """The ranking loss in both directions, and figures as `Pairs.figures` names them."""
        pairs = gather_pairs(self.embed_video(batch.video_tokens), self.embed_text(batch.word_ids), batch)
        loss = pairs.mean(_loss_of)
        # The temperature has no part in this loss; times zero, every worker has a gradient for it.
        return {"loss": loss + 0 * self.log_temperature, **pairs.figures()}


def _loss_of(pairs: Pairs) -> Tensor:
    to_text, to_video = pairs.video @ pairs.all_text.T, pairs.text @ pairs.all_video.T  # (P, W * P) each
    return margin_ranking_loss(to_text, to_video, MARGIN, pairs.rank_offset, pairs.excluded)


def build(options: Options, manifest: Manifest, tokenizer: WordTokenizer) -> videoclip.Recipe:
    """A new model for shards of `manifest`'s encoder and texts cut by `tokenizer`."""
    return videoclip.build(options, manifest, tokenizer, Recipe)
