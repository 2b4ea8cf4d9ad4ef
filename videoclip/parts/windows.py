"""Windows of seconds that sentences belong to, inside packed stretches of video, and curves over them.

N seconds of P stretches end to end, S sentences of the same stretches, `sentences` int64 [P] saying how many each has.
A window is [begin, end) in seconds of its stretch, int64 [S, 2].
"""

from __future__ import annotations

import torch
from torch import Tensor

from videoclip.packed import Packed, to_device


def windows_said(said: Tensor, seconds: Tensor) -> Tensor:
    """Times float [S, 2] -> the windows of all seconds that they touch; `seconds` int64 [S], of each one's stretch."""
    begin = torch.minimum(said[:, 0].floor().long().clamp_min(0), seconds - 1)
    end = torch.minimum(torch.maximum(said[:, 1].ceil().long(), begin + 1), seconds)
    return torch.stack([begin, end], 1)


def inside(windows: Tensor, video: Packed, owners: Tensor) -> Tensor:
    """bool [N, S]: whether a second of `video` lies in a sentence's window; `owners` int64 [S]: their stretches."""
    position = to_device(video.positions, windows.device)[:, None]
    same = to_device(video.owners, windows.device)[:, None] == to_device(owners, windows.device)
    return same & (windows[:, 0] <= position) & (position < windows[:, 1])


def own_curves(similarity: Tensor, video: Packed, owners: Tensor) -> Tensor:
    """Similarities [N, S] -> [S, T]: of every sentence with the seconds of its own stretch, then -inf."""
    second = torch.arange(int(video.lengths.max()))
    known = second < video.lengths[owners][:, None]
    rows = (video.starts[owners][:, None] + second).clamp_max(len(similarity) - 1)  # (S, T)
    device = similarity.device
    curves = similarity.T.gather(1, to_device(rows, device))
    return curves.masked_fill(~to_device(known, device), float("-inf"))


def best_windows(curves: Tensor, seconds: Tensor) -> Tensor:
    """Of every curve [S, T], logits, the window of so many `seconds`, int64 [S], that has most of its softmax."""
    share = torch.nn.functional.pad(curves.double().softmax(1).cumsum(1), (1, 0))  # (S, T + 1)
    begin = torch.arange(curves.shape[1], device=curves.device).expand_as(curves)
    end = begin + seconds[:, None]
    fits = end <= curves.isfinite().sum(1, keepdim=True)
    mass = share.gather(1, end.clamp_max(curves.shape[1])) - share.gather(1, begin)
    first = mass.masked_fill(~fits, -1.0).argmax(1)
    return torch.stack([first, first + seconds], 1)


def agreed_windows(said: Tensor, one: Tensor, other: Tensor, agreement: float) -> tuple[Tensor, Tensor]:
    """Where `one` and `other` overlap by `agreement` or more (intersection over union) their union, else `said`.

    Windows int64 [S, 2] each; the second value, bool [S], says where they did.
    """
    shared = (torch.minimum(one[:, 1], other[:, 1]) - torch.maximum(one[:, 0], other[:, 0])).clamp_min(0)
    union = torch.stack([torch.minimum(one[:, 0], other[:, 0]), torch.maximum(one[:, 1], other[:, 1])], 1)
    agree = shared >= agreement * (union[:, 1] - union[:, 0])
    return torch.where(agree[:, None], union, said), agree
