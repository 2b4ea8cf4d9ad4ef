"""Sentences compared with the seconds of their video, by the towers of a model or by one that reads both together."""

from __future__ import annotations

from typing import Literal, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor

from videoclip.embedding import TwoTowers, embed_seconds
from videoclip.errors import InputError
from videoclip.packed import Packed

Reading = Literal["towers", "together", "both"]
"""What compares a sentence with seconds: the towers, the encoder that reads both together, or the mean of the two."""
NEAR = 96.0  # seconds around where a sentence is expected that evaluation looks at


class ReadsTogether(TwoTowers, Protocol):
    """A model that also reads the seconds and sentences of a stretch together: the recipe `alignment`."""

    def read_together(self, video: Packed, text: Tensor, sentences: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Stretches and their sentences' embeddings -> seconds and sentences, unit rows, and alignability."""
        ...


def reads_together(model: object) -> TypeGuard[ReadsTogether]:
    """Whether a model does."""
    return hasattr(model, "read_together")


def sentence_curves(
    model: TwoTowers,
    tokens: np.ndarray,
    texts: np.ndarray,
    expected: np.ndarray,
    near: float | None = NEAR,
    seconds: np.ndarray | None = None,
    by: Reading = "towers",
) -> np.ndarray:
    """Similarity of sentences, embeddings [S, H], with every second of a video, tokens [T, D]: float32 [S, T].

    Seconds further than `near` from where a sentence is `expected` [S] are -inf, unless that were all; None looks at
    all. `seconds` are the embedded tokens, if known.
    Raises InputError if the model is to read them together and cannot.
    """
    if by != "towers" and not reads_together(model):
        raise InputError(f"a model of the recipe alignment reads sentences and seconds {by}; this one has towers alone")
    curves = np.zeros((len(texts), len(tokens)), np.float32)
    if by != "together":
        curves += texts @ (embed_seconds(model, tokens) if seconds is None else seconds).T
    if by != "towers" and reads_together(model):
        curves += _curves_read_together(model, model.config.max_seconds, tokens, texts, expected, near)
    if by == "both":
        curves /= 2
    if near is not None:
        away = np.abs(np.arange(len(tokens)) + 0.5 - expected[:, None]) > near
        away &= ~away.all(1, keepdims=True)  # a sentence beyond the video's end may be anywhere
        curves = np.where(away, np.float32(-np.inf), curves)
    return curves


@torch.inference_mode()
def _curves_read_together(
    model: ReadsTogether, longest: int, tokens: np.ndarray, texts: np.ndarray, expected: np.ndarray, near: float | None
) -> np.ndarray:
    """Mean similarity over stretches of the `longest` that a model reads, half of one apart; a stretch is read with the
    sentences that may belong to it. Zero where none was."""
    length = min(longest, len(tokens))
    total, times = np.zeros((len(texts), len(tokens)), np.float32), np.zeros((len(texts), len(tokens)), np.float32)
    starts = np.unique(np.append(np.arange(0, len(tokens) - length + 1, max(1, longest // 2)), len(tokens) - length))
    for a in starts.tolist():
        reach = np.inf if near is None else near
        read = np.flatnonzero((expected >= a - reach) & (expected < a + length + reach))
        if not len(read):
            continue
        video, sentences = Packed.of([torch.tensor(tokens[a : a + length])]), torch.from_numpy(texts[read])
        (shown, said), _ = model.read_together(video, sentences, torch.tensor([len(read)]))
        total[read, a : a + length] += (said @ shown.T).float().cpu().numpy()
        times[read, a : a + length] += 1
    return total / np.maximum(times, 1)
