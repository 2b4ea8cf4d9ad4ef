"""A model over many texts, clips, seconds and videos: everything that is embedded in bulk is embedded here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.templates import PLAIN, check_templates
from videoclip.data.words import WordTokenizer
from videoclip.packed import Packed
from videoclip.retrieval.index import unit

TEXTS_AT_ONCE = 256
VIDEOS_AT_ONCE = 32
CONTEXT_STRIDE = 8  # seconds between the starts of two contexts that seconds are embedded in
SECONDS_AROUND = 3  # what a second is embedded with, by models that have no outputs for single seconds


class TwoTowersConfig(Protocol):
    """What bulk embedding reads of a model's configuration: limits of a clip, width, and whether rows are unit."""

    @property
    def max_seconds(self) -> int: ...
    @property
    def max_words(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def normalize(self) -> bool: ...
    @property
    def video_encoder(self) -> str: ...


class TwoTowers(Protocol):
    """What evaluation, clustering and search ask of a model, whichever recipe made it."""

    training: bool

    @property
    def config(self) -> TwoTowersConfig: ...
    @property
    def temperature(self) -> Tensor: ...
    def embed_video(self, tokens: Packed) -> Tensor:
        """Rows [N, D] of B clips -> [B, H]."""
        ...

    def embed_text(self, word_ids: Packed) -> Tensor:
        """Rows int [N] of B texts, `[CLS] … [SEP]` -> [B, H]."""
        ...

    def tokenizer(self) -> WordTokenizer:
        """What cuts texts into words for `embed_text`."""
        ...

    def train(self, mode: bool = True) -> object:
        """Switch dropout on or off."""
        ...


@torch.inference_mode()
def embed_texts(model: TwoTowers, texts: Sequence[str], templates: Sequence[str] = PLAIN) -> np.ndarray:
    """float32 [N, H]: each text in every template ("a video of {}"), averaged; unit length if the model's are.

    Words beyond the model's `max_words` are left out. Raises InputError if a template does not say where the text goes.
    """
    check_templates(templates)
    tokenizer = model.tokenizer()
    features = np.zeros((len(texts), model.config.width), np.float32)
    few = len(texts) * len(templates) <= 4 * TEXTS_AT_ONCE  # a second or two
    for first in tqdm(range(0, len(texts), TEXTS_AT_ONCE), desc="texts", unit="block", disable=few):
        block = texts[first : first + TEXTS_AT_ONCE]
        for template in templates:
            ids = tokenizer.clip_ids([template.replace("{}", text) for text in block], model.config.max_words)
            features[first : first + len(block)] += model.embed_text(ids).float().cpu().numpy() / len(templates)
    return unit(features) if model.config.normalize else features


@torch.inference_mode()
def embed_clips(model: TwoTowers, tokens: np.ndarray, windows: np.ndarray, batch: int = 512) -> np.ndarray:
    """Embed every window [W, 2], first and last row + 1, of tokens [T, D] as a clip of its own: float32 [W, H].

    Of a window longer than the model's longest clip, the beginning.
    """
    windows = np.column_stack([windows[:, 0], np.minimum(windows[:, 1], windows[:, 0] + model.config.max_seconds)])
    features = []
    starts = range(0, len(windows), batch)
    for first in tqdm(starts, desc="clips", unit="block", disable=len(starts) < 3):
        chosen = windows[first : first + batch]
        rows = np.concatenate([tokens[start:end] for start, end in chosen])
        clips = Packed(torch.from_numpy(rows), torch.from_numpy(chosen[:, 1] - chosen[:, 0]))
        features.append(model.embed_video(clips).float().cpu().numpy())
    return np.concatenate(features)


@torch.inference_mode()
def embed_seconds(
    model: TwoTowers, tokens: np.ndarray, stride: int = CONTEXT_STRIDE, contexts_at_once: int = 32
) -> np.ndarray:
    """One vector a second of a video's tokens [T, D]: float32 [T, H], of unit length where the model's embeddings are.

    The video transformer's outputs over contexts of the longest clip, `stride` seconds apart; a second's outputs in
    several contexts are averaged. Models without such outputs embed each second with its neighbours as a clip.
    """
    hidden_of = getattr(model, "video_hidden", None)
    if hidden_of is None:
        starts = np.clip(np.arange(len(tokens)) - SECONDS_AROUND // 2, 0, max(0, len(tokens) - SECONDS_AROUND))
        return embed_clips(model, tokens, np.column_stack([starts, np.minimum(starts + SECONDS_AROUND, len(tokens))]))
    context = min(model.config.max_seconds, len(tokens))
    starts = np.unique(np.append(np.arange(0, len(tokens) - context + 1, stride), len(tokens) - context))
    total = np.zeros((len(tokens), model.config.width), np.float32)
    times = np.bincount((starts[:, None] + np.arange(context)).ravel(), minlength=len(tokens))
    for first in range(0, len(starts), contexts_at_once):
        rows = starts[first : first + contexts_at_once, None] + np.arange(context)  # (contexts, context)
        clips = Packed(torch.from_numpy(tokens[rows.ravel()]), torch.full((len(rows),), context))
        np.add.at(total, rows.ravel(), hidden_of(clips).rows.float().cpu().numpy())
    return unit(total) if model.config.normalize else total / times[:, None].astype(np.float32)


def clips_of(model: TwoTowers, clips_per_video: int) -> ClipConfig:
    """Clips as a finished model takes them."""
    return ClipConfig(
        clips_per_video=clips_per_video,
        max_seconds=model.config.max_seconds,
        max_words=model.config.max_words,
        min_words=min(8, model.config.max_words),
        min_seconds=min(3, model.config.max_seconds),
    )


@torch.inference_mode()
def embed_videos(model: TwoTowers, sampler: ClipSampler, rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """One vector a video for retrieval: the mean over its sampled clips of (video + text) / 2, as published.

    `rows` int64 [V] -> float32 [V, H]. Clips are drawn for blocks of VIDEOS_AT_ONCE rows, and a draw depends on seed,
    epoch and the block's first row alone: the result is the same for shares of whole blocks (`shares_of_blocks`).
    """
    was_training = model.training
    model.train(False)
    features = [np.zeros((0, model.config.width), np.float32)]
    for first in range(0, len(rows), VIDEOS_AT_ONCE):
        chosen = rows[first : first + VIDEOS_AT_ONCE]
        batch = sampler.batch(chosen, np.random.default_rng([seed, epoch, int(chosen[0]), 1]))
        embedded = (model.embed_video(batch.video_tokens) + model.embed_text(batch.word_ids)) / 2
        clips = embedded.unflatten(0, (len(chosen), -1))  # (V, clips, H)
        features.append(clips.mean(1).float().cpu().numpy())
    model.train(was_training)
    return np.concatenate(features)


def shares_of_blocks(rows: np.ndarray, workers: int) -> list[np.ndarray]:
    """`rows` int64 [V] in one share for each worker, cut where `embed_videos` begins a new block."""
    blocks = np.array_split(np.arange(0, len(rows), VIDEOS_AT_ONCE), workers)
    cuts = [int(share[0]) if len(share) else len(rows) for share in blocks[1:]]
    return np.split(rows, cuts)
