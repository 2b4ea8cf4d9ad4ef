"""Losses, as functions of similarities: what a recipe minimises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from videoclip.gather import mean_over_all

IGNORED = -100  # the label of what has no right answer
ALONE = (1,)  # the pairs of every worker, where there is one: how many does not matter


def contrastive_loss(
    video: Tensor,
    text: Tensor,
    temperature: Tensor | float = 1.0,
    gathered: tuple[Tensor, Tensor] | None = None,
    rank_offset: int = 0,
    excluded: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE (VideoCLIP, section 3.1).

    Cross-entropy(video -> text) + cross-entropy(text -> video), summed and not halved, as the release has it.

    `video`, `text`: float [P, H], row p of each being a positive pair; every other row is a negative. With several
    workers `gathered` holds the rows of all of them, [W * P, H] each, and this worker's start at row `rank_offset`.
    `excluded`, bool [P, W * P], marks pairs that are no negatives of each other and so are left out.
    Returns the mean over the P rows, a scalar.
    """
    all_video, all_text = gathered or (video, text)
    target = torch.arange(rank_offset, rank_offset + len(video), device=video.device)
    with torch.autocast(video.device.type, enabled=False):  # half precision is too coarse for cosines
        video_to_text = (video @ all_text.T / temperature).float()
        text_to_video = (text @ all_video.T / temperature).float()
    if excluded is not None:
        video_to_text = video_to_text.masked_fill(excluded, float("-inf"))
        text_to_video = text_to_video.masked_fill(excluded, float("-inf"))
    return F.cross_entropy(video_to_text, target) + F.cross_entropy(text_to_video, target)


def chance_of_contrastive_loss(excluded: Tensor) -> Tensor:
    """What `contrastive_loss` is for a model that tells nothing apart, a scalar: `excluded` is bool [P, W * P]."""
    return 2 * (~excluded).sum(1).log().mean()


def multiple_instance_losses(
    video: Tensor,
    text: Tensor,
    positive: Tensor,
    temperature: Tensor | float = 1.0,
    gathered: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """MIL-NCE over seconds and sentences, as TAN has it: of every own sentence, and of every second that has one.

    `video` [N, H], `text` [S, H], `positive` bool [N, S]: which seconds a sentence may belong to; -log of the share
    that these have of the sentence's softmax over all seconds, and the other way round. With several workers
    `gathered` holds the rows of all of them. Returns losses [<= S] and [<= N]: where nothing is positive there is none.
    """
    all_video, all_text = gathered or (video, text)
    with torch.autocast(video.device.type, enabled=False):
        own, to_text, to_video = (
            (a.float() @ b.float().T / temperature) for a, b in ((video, text), (video, all_text), (text, all_video))
        )
    masked = own.masked_fill(~positive, float("-inf"))
    of_text, of_video = positive.any(0), positive.any(1)
    return (
        to_video.logsumexp(1)[of_text] - masked.logsumexp(0)[of_text],
        to_text.logsumexp(1)[of_video] - masked.logsumexp(1)[of_video],
    )


def margin_ranking_loss(
    video_to_text: Tensor,
    text_to_video: Tensor,
    margin: float,
    rank_offset: int = 0,
    excluded: Tensor | None = None,
) -> Tensor:
    """max(0, margin + negative - positive): mean over a row's negatives, then over rows, summed over both directions.

    Similarities float [P, W * P] of own rows with all rows; own row p belongs to column `rank_offset` + p.
    `excluded` as in `contrastive_loss`.
    """
    rows = torch.arange(len(video_to_text), device=video_to_text.device)
    negatives = torch.ones_like(video_to_text, dtype=torch.bool) if excluded is None else ~excluded
    negatives[rows, rank_offset + rows] = False
    counts = negatives.sum(1).clamp_min(1)
    loss = video_to_text.new_zeros(())
    for similarity in (video_to_text, text_to_video):
        positive = similarity[rows, rank_offset + rows][:, None]
        violation = (margin + similarity - positive).clamp_min(0).masked_fill(~negatives, 0)
        loss = loss + (violation.sum(1) / counts).mean()
    return loss


def margin_loss(similarity: Tensor, margin: float, normalisation: str = "release") -> Tensor:
    """The ranking loss of collaborative experts and TeachText, over similarities float [n, n], rows texts: a scalar.

    R, the sum of the violations of both directions, is divided by their number 2n(n - 1) (`release`), by n (`paper`),
    or by 2n^2 after adding the 2n diagonal terms, each of them the margin (`diagonal`: the release's `fix_norm` off).
    """
    n = len(similarity)
    total = n * (n - 1) * margin_ranking_loss(similarity, similarity.T, margin)
    if normalisation == "release":
        return total / (2 * n * (n - 1))
    if normalisation == "diagonal":
        return (total + 2 * n * margin) / (2 * n * n)
    if normalisation == "paper":
        return total / n
    raise ValueError(f"normalisation {normalisation!r}")


def distillation_loss(student: Tensor, teachers: Tensor, normalisation: str = "release") -> Tensor:
    """Huber loss between a student's similarities float [n, n] and the mean of its teachers' [T, n, n]: a scalar.

    All pairs count, the diagonal too. `release`: the mean over all n^2 of them; `paper`: their sum over n. Gradients
    flow into the student alone.
    """
    if normalisation not in ("release", "paper"):
        raise ValueError(f"normalisation {normalisation!r}")
    loss = F.smooth_l1_loss(student, teachers.detach().mean(0))
    return loss if normalisation == "release" else loss * len(student)


def mean_cross_entropy(scores: Tensor, labels: Tensor, counts: Sequence[int] = ALONE) -> Tensor:
    """Cross-entropy of float [N, C] with int64 [N], mean over what is not IGNORED; 0 if nothing is left, not 0/0.

    With several workers, which bring `counts` pairs, the mean is over the elements of all of them.
    """
    total = F.cross_entropy(scores.float(), labels, reduction="sum", ignore_index=IGNORED)
    return mean_over_all(total, int((labels != IGNORED).sum()), counts)


def share_right(scores: Tensor, labels: Tensor, counts: Sequence[int] = ALONE) -> Tensor:
    """Of the same elements, the share whose highest score is the right one."""
    right = (scores.argmax(1) == labels).float().sum()
    return mean_over_all(right, int((labels != IGNORED).sum()), counts).detach()
