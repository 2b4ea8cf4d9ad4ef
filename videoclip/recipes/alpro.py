"""ALPRO: align, then prompt (Li, Li, Li, Niebles, Hoi: "Align and Prompt", CVPR 2022).

A few frames and a text pass through two towers; what they give is aligned by contrast (VTC), fused, matched (VTM), its
hidden words are guessed (MLM), and regions are named with the entities that a frozen prompter sees in them (PEM).
With `losses=("vtc",)` it is the prompter's own training; with ("vtc", "vtm") it is the paper's fine-tuning for
retrieval; with answers it is its question answering.

Two things the release does otherwise are options: `discard` (which labels of the prompter are sure enough) and
`always_mask`. It contrasts by the local rank and draws negatives among own pairs; here all workers' pairs count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from videoclip.data.clips import ClipBatch
from videoclip.data.entities import read_entities
from videoclip.data.frames import FrameBatch
from videoclip.data.shards import Manifest
from videoclip.data.words import WordTokenizer
from videoclip.errors import InputError
from videoclip.losses import mean_cross_entropy, share_right
from videoclip.packed import Packed
from videoclip.parts.frame_batches import frame_batch
from videoclip.parts.frame_options import FrameOptions
from videoclip.parts.fused_towers import LOSSES, AlproConfig, FusedTowers
from videoclip.parts.fusion import first_rows, from_even
from videoclip.parts.masked_words import NOT_MASKED, WordMask, draw_hidden
from videoclip.parts.matching import pairs_to_judge
from videoclip.parts.pairs import gather_pairs
from videoclip.parts.pixels import inside, normalised, zeroed_outside
from videoclip.parts.prompter import entity_loss, kept_labels, prompter_from
from videoclip.parts.towers import TowersShape


@dataclass(frozen=True)
class Options(FrameOptions):
    """ALPRO-base's constants. `losses` of `vtc` alone train a prompter; all four need one (`--model.prompter`)."""

    fusion_layers: int = 6
    drop_path: float = 0.1
    losses: tuple[str, ...] = LOSSES
    prompter: str = ""
    """Folder of a model trained with `vtc` alone; it is frozen and says what crops show."""
    entities: str = ""
    """File of entities, one a line ("noun" or "noun count"), the most frequent first: what the prompter tells apart."""
    most_entities: int = 1000
    discard: str = "probability"
    """"probability": labels whose best entity has at least 0.2 are kept, as the paper says; "release": as its code."""
    always_mask: bool = False
    """Hidden words are always [MASK], as the paper says; else now and then another word, as its code does."""
    sampler: str = "headtail"


class Recipe(FusedTowers):
    """The losses by name."""

    recipe: ClassVar[str] = "alpro"

    def forward(self, batch: ClipBatch | FrameBatch) -> dict[str, Tensor]:
        """The losses and their sum; shares `matched`, `guessed`, `right` and `kept` (entities); `Pairs.figures`."""
        losses = self.config.losses
        batch = frame_batch(batch, self.shape.vision, self.frames, self.config.sampler)
        assert batch.draws is not None and batch.rows_per_rank is not None
        counts, draws = batch.rows_per_rank, batch.draws
        video, words = self.video_tokens(normalised(batch.frames)), self.text_tokens(batch.words)
        if self.config.answers:
            return self.answered(video, words, batch, counts)
        pairs = gather_pairs(self.projected_video(video), self.projected_text(words), batch)  # (P, 256) each
        made, figures, tokens = dict[str, Tensor](), dict[str, Tensor](), from_even(video)
        if "vtc" in losses:
            made["vtc"], figures = pairs.contrast(self.temp) / 2, pairs.figures()
        if "vtm" in losses:
            temperature = self.temp.detach() if "vtc" in losses else math.inf
            judged = pairs_to_judge(words, tokens, pairs, temperature, draws, counts)
            fused = self.fused(*judged[:2])  # the own pairs, then negatives
            logits, labels = self.itm_head(first_rows(fused)), judged[2]
            made["vtm"], figures["matched"] = (f(logits, labels, counts) for f in (mean_cross_entropy, share_right))
        if "pem" in losses:
            own = fused.take(torch.arange(len(batch))) if "vtm" in losses else self.fused(words, tokens)
            made["pem"], regions = self.entities(own, batch, counts)
            figures |= regions
        if "mlm" in losses:
            mask, longest = self.config.word_mask, self.shape.text.positions
            hidden, labels = draw_hidden(batch.words, mask, longest, pairs.rank_offset, draws, counts)
            asked = labels != NOT_MASKED
            scores, labels = self.word_scores(hidden, tokens)[asked], labels[asked]
            made["mlm"], figures["guessed"] = (f(scores, labels, counts) for f in (mean_cross_entropy, share_right))
        return {"loss": torch.stack(list(made.values())).sum(), **made, **figures}

    def entities(self, fused: Packed, batch: FrameBatch, counts: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """PEM: from the fused patches inside a crop to the prompter's distribution over entities for that crop."""
        if self.prompter is None or batch.crops is None:
            raise InputError("pem needs a prompter (attach one) and a crop for every clip")
        crops = zeroed_outside(batch.frames, batch.crops, self.shape.vision.patch)
        q = self.prompter.soft_labels(normalised(crops), batch.kind)
        if batch.relabel is not None:  # a control: the labels of other clips
            q = q[batch.relabel]
        logits = self.entity_logits(fused, inside(batch.crops, self.shape.vision.grid))
        kept = kept_labels(q, self.config.discard, self.config.threshold)
        right = (logits.argmax(1) == q.argmax(1)).float().mean()
        return entity_loss(logits, q, kept, counts), {"kept": kept.float().mean(), "right": right}

    def answered(self, video: Tensor, questions: Packed, batch: FrameBatch, counts: Sequence[int]) -> dict[str, Tensor]:
        """Question answering: cross-entropy of the right answers; `accuracy` as a share of those that are known."""
        if batch.answers is None:
            raise InputError("a model that answers questions is trained with answers in its batches")
        logits = self.classifier(first_rows(self.fused(questions, from_even(video))))
        loss, right = (f(logits, batch.answers, counts) for f in (mean_cross_entropy, share_right))
        return {"loss": loss, "accuracy": right}


def build(options: Options, manifest: Manifest, tokenizer: WordTokenizer) -> Recipe:
    """A new model for shards of frames and texts cut by `tokenizer`.

    Raises InputError if the shards hold no frames, or the losses need a prompter or entities that are not given.
    """
    names: tuple[str, ...] = ()
    if "pem" in options.losses:
        if not (options.prompter and options.entities):
            raise InputError(
                "pem needs --model.prompter (trained with --model.losses vtc) and --model.entities (nouns)"
            )
        names = read_entities(Path(options.entities), options.most_entities)
    layers, words = options.text_layers + options.fusion_layers, tokenizer.special_ids()
    towers_of = options.vision(manifest, "divided", options.drop_path), options.text(layers), options.text_layers
    config = AlproConfig(
        TowersShape(*towers_of, tokenizer.vocabulary, options.projection, options.temperature),
        options.losses,
        len(names),
        names,
        word_mask=WordMask(words["[MASK]"], tokenizer.vocabulary, tuple(words.values()), always=options.always_mask),
        discard=options.discard,
        sampler=options.sampler,
        max_seconds=options.max_seconds,
        max_words=options.max_words,
        video_encoder=manifest.fingerprint,
    )
    model = Recipe(config)
    model.frozen.tokenizer = tokenizer
    if names:
        towers = Recipe.from_pretrained(options.prompter)
        model.attach(prompter_from(towers, towers.tokenizer(), names, tokenizer, options.prompter))
    return model
