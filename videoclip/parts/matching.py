"""Video-text matching: does this text belong to this video? Negatives are drawn by contrastive similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from videoclip.packed import Packed

MATCHED = 1  # the column of the two logits, and the label, that say "these belong together"
NONE = -1  # where there is no negative to draw


def matching_negatives(
    similarity: Tensor, generator: torch.Generator, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For every text a video and for every video a text that do not belong together, the more alike the likelier.

    `similarity` [P, P] are logits (divided by the temperature), rows videos, columns texts; of this worker's own
    pairs. Drawn, not the hardest: from the softmax of each row (column) without its own pair and without those that
    `excluded`, bool [P, P], marks as no negatives of each other.
    Returns videos of texts and texts of videos, int64 [P] each; NONE where nothing is left to draw.
    """
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    barred = own if excluded is None else own | excluded
    masked = similarity.detach().float().masked_fill(barred, float("-inf"))
    return _draw(masked.T, generator), _draw(masked, generator)


def _draw(scores: Tensor, generator: torch.Generator) -> Tensor:
    possible = scores.isfinite().any(1)
    weights = torch.where(possible[:, None], scores, torch.zeros_like(scores)).softmax(1)
    drawn = torch.multinomial(weights.to(generator.device), 1, generator=generator)[:, 0].to(scores.device)
    return drawn.masked_fill(~possible, NONE)


def draw_negatives(similarity: Tensor, barred: Tensor, chance: Tensor) -> Tensor:
    """int64 [P]: a column for each row of `similarity` [P, N] (logits), the more alike the likelier, none of `barred`.

    As `matching_negatives` draws, but of all workers' pairs. `chance`: float64 [P], even in [0, 1), decides: the same
    numbers draw the same columns, whichever worker holds a row. NONE where all columns are barred.
    """
    masked = similarity.detach().double().masked_fill(barred, float("-inf"))
    possible = masked.isfinite().any(1)
    weights = torch.where(possible[:, None], masked, torch.zeros_like(masked)).softmax(1)
    reached = weights.cumsum(1)
    drawn = (reached > (chance.to(reached.device) * reached[:, -1])[:, None]).int().argmax(1)
    return drawn.masked_fill(~possible, NONE)


def matching_pairs(
    words: Packed, video: Packed, videos_of_texts: Tensor, texts_of_videos: Tensor, own: Tensor | None = None
) -> tuple[Packed, Packed, Tensor]:
    """Words and video tokens of all pairs to be judged, and their labels int64 [up to 3 P].

    First the P pairs that belong together, then text i with video `videos_of_texts[i]`, then video i with text
    `texts_of_videos[i]`; pairs without a negative are left out. With `own`, int64 [P], texts and videos are those of
    all workers and the P pairs are these of them.
    """
    own = torch.arange(len(words)) if own is None else own.cpu()
    videos_of_texts, texts_of_videos = videos_of_texts.cpu(), texts_of_videos.cpu()
    texts = torch.cat([own, own[videos_of_texts != NONE], texts_of_videos[texts_of_videos != NONE]])
    videos = torch.cat([own, videos_of_texts[videos_of_texts != NONE], own[texts_of_videos != NONE]])
    labels = (torch.arange(len(texts)) < len(own)).long()
    return words.take(texts), video.take(videos), labels.to(words.rows.device)


def matching_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the pairs judged: `logits` [N, 2], `labels` int64 [N], MATCHED or not."""
    return F.cross_entropy(logits.float(), labels)
