"""Re-ranking: the towers find the best clips of a text, matching judges those few pairs and puts them in order.

What is asked of a model is `Judge`; any recipe that has these three methods can re-rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from videoclip.data.templates import PLAIN
from videoclip.data.words import WordTokenizer
from videoclip.errors import InputError
from videoclip.packed import Packed

SIDES_AT_ONCE = 256  # texts or clips
PAIRS_AT_ONCE = 512


@runtime_checkable
class Judge(Protocol):
    """A model that says whether a text and a clip belong together; each side is encoded once and not once a pair."""

    def text_states(self, word_ids: Packed) -> Packed:
        """Word ids of B texts, `[CLS] … [SEP]` -> what `matching_logits` reads of them."""
        ...

    def video_states(self, tokens: Packed) -> Packed:
        """Rows of shards of B clips -> what `matching_logits` reads of them."""
        ...

    def matching_logits(self, words: Packed, clips: Packed) -> Tensor:
        """States of B texts and B clips -> [B, 2]; column 1 says that they belong together."""
        ...

    def tokenizer(self) -> WordTokenizer:
        """What cuts texts into words."""
        ...


def judge_of(model: object) -> Judge:
    """The model, as one that judges pairs. Raises InputError if its recipe has no matching, or was trained without."""
    trained = getattr(getattr(model, "config", None), "losses", ("vtm",))
    if not isinstance(model, Judge) or "vtm" not in trained:
        name = getattr(model, "recipe", type(model).__name__)
        raise InputError(
            f"this model ({name}) was not trained to match, so it cannot re-rank; leave --rerank out, or train "
            "with --recipe fusion and vtm among its losses"
        )
    return model


@torch.inference_mode()
def matching_scores(
    model: Judge, sentences: Sequence[str], tokens: Packed, texts: np.ndarray, clips: np.ndarray, max_words: int
) -> np.ndarray:
    """float32 [N]: how surely text `texts[n]` and clip `clips[n]` belong together, the difference of the two logits.

    `sentences`: all texts; `tokens`: all clips; `texts`, `clips` int64 [N]: the pairs that are judged.
    """
    word_ids = model.tokenizer().clip_ids(sentences, max_words)
    words = _in_parts(model.text_states, word_ids)
    states = _in_parts(model.video_states, tokens)
    scores = np.empty(len(texts), np.float32)
    starts = range(0, len(texts), PAIRS_AT_ONCE)
    for first in tqdm(starts, desc="matching", unit="block", disable=len(starts) < 16):
        chosen = slice(first, first + PAIRS_AT_ONCE)
        pairs = words.take(torch.from_numpy(texts[chosen])), states.take(torch.from_numpy(clips[chosen]))
        logits = model.matching_logits(*pairs).float().cpu()
        scores[chosen] = (logits[:, 1] - logits[:, 0]).numpy()
    return scores


def _in_parts(encode: Encode, x: Packed) -> Packed:
    numbers = torch.arange(len(x)).split(SIDES_AT_ONCE)
    return Packed.together([encode(x.take(part)) for part in numbers])


class Encode(Protocol):
    """A side of a `Judge`."""

    def __call__(self, x: Packed, /) -> Packed: ...


def rerank(
    model: Judge,
    sentences: Sequence[str],
    tokens: Packed,
    found: Sequence[np.ndarray],
    max_words: int,
    templates: Sequence[str] = PLAIN,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The clips found for every text in the order of matching, and their scores in that order.

    `found`: for each text the rows of `tokens` to be judged. With several templates a text's scores are averaged.
    Where two are judged alike, the one that was found first stays first.
    """
    counts = [len(rows) for rows in found]
    texts, clips = np.repeat(np.arange(len(found)), counts), np.concatenate(found)
    scores = np.zeros(len(texts), np.float32)
    for template in templates:
        said = [template.replace("{}", sentence) for sentence in sentences]
        scores += matching_scores(model, said, tokens, texts, clips, max_words) / len(templates)
    judged = np.split(scores, np.cumsum(counts)[:-1])
    orders = [np.argsort(-of_text, kind="stable") for of_text in judged]
    return (
        [rows[order] for rows, order in zip(found, orders)],
        [of_text[order] for of_text, order in zip(judged, orders)],
    )


def reranked_ranks(
    ranks: np.ndarray, found: Sequence[np.ndarray], scores: Sequence[np.ndarray], positives: np.ndarray
) -> np.ndarray:
    """float64 [Q]: the places of the right clips after re-ranking; equal scores share the mean of their places.

    `ranks` float64 [Q]: before; they stay where the right clip was not among those judged, behind all of these.
    `found`, `scores` as `rerank` returns them; `positives` int64 [Q]: the right clips.
    """
    places = np.empty(len(ranks), np.float64)
    for query, (rows, of_text) in enumerate(zip(found, scores)):
        own = np.flatnonzero(rows == positives[query])
        if not len(own):
            places[query] = max(ranks[query], len(rows) + 1)
            continue
        better = int((of_text > of_text[own[0]]).sum())
        equal = int((of_text == of_text[own[0]]).sum())
        places[query] = better + (equal + 1) / 2
    return places
