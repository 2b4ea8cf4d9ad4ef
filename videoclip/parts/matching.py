"""Video-text matching: does this text belong to this video? Negatives are drawn by contrastive similarity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from videoclip.gather import gather_packed
from videoclip.packed import Packed
from videoclip.parts.pairs import Pairs

MATCHED = 1  # the column of the two logits, and the label, that say "these belong together"
NONE = -1  # where there is no negative to draw


def matching_negatives(pairs: Pairs, temperature: Tensor | float, chance: Tensor) -> tuple[Tensor, Tensor]:
    """For every own text a video and for every own video a text that do not belong together, of all workers' pairs.

    Drawn, not the hardest: the more alike the likelier, never an own pair nor one excluded as a false negative.
    `chance`: float64 [W * P, 2], even in [0, 1), the same on all workers, decides. An infinite `temperature` draws
    evenly, where no contrast makes likeness mean anything.
    Returns videos of texts and texts of videos, int64 [P] each; NONE where nothing is left to draw.
    """
    own = torch.arange(len(pairs)) + pairs.rank_offset
    barred = pairs.excluded.clone()
    barred[torch.arange(len(own)), own] = True
    texts = draw_negatives(pairs.video @ pairs.all_text.T / temperature, barred, chance[own, 0])
    videos = draw_negatives(pairs.text @ pairs.all_video.T / temperature, barred, chance[own, 1])
    return videos, texts


def draw_negatives(similarity: Tensor, barred: Tensor, chance: Tensor) -> Tensor:
    """int64 [P]: a column for each row of `similarity` [P, N] (logits), the more alike the likelier, none of `barred`.

    `chance`: float64 [P], even in [0, 1), decides: the same numbers draw the same columns, whichever worker holds a
    row. NONE where all columns are barred.
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


def pairs_to_judge(
    words: Packed,
    video: Packed,
    pairs: Pairs,
    temperature: Tensor | float,
    draws: torch.Generator,
    counts: Sequence[int],
) -> tuple[Packed, Packed, Tensor]:
    """`matching_pairs` of own pairs with negatives drawn by `draws`: own states in, those of all workers travel."""
    chance = torch.rand(sum(counts), 2, generator=draws, dtype=torch.float64)
    negatives = matching_negatives(pairs, temperature, chance)
    own = torch.arange(len(words)) + pairs.rank_offset
    return matching_pairs(gather_packed(words, counts), gather_packed(video, counts), *negatives, own)
