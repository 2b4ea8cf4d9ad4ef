"""ALPRO: align, then prompt (Li, Li, Li, Niebles, Hoi: "Align and Prompt", CVPR 2022).

A few frames and a text pass through two towers; what they give is aligned by contrast (VTC), fused, matched (VTM), its
hidden words are guessed (MLM), and regions are named with the entities that a frozen prompter sees in them (PEM).
With `losses=("vtc",)` it is the prompter's own training; with ("vtc", "vtm") it is the paper's fine-tuning for
retrieval; with answers, `answer_loss` is its question answering.

Two things the release does otherwise are options: `discard` (which of the prompter's labels are sure enough) and
`always_mask`. Its contrastive targets count from the local rank and are wrong on several machines; ours are right.
Matching draws its negatives among the worker's own pairs, as the release does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.data.clips import ClipBatch
from videoclip.data.entities import read_entities
from videoclip.data.frames import FrameBatch
from videoclip.data.shards import Manifest
from videoclip.data.words import WordTokenizer
from videoclip.errors import InputError
from videoclip.frame_model import FrameModel
from videoclip.gather import gather_with_gradient, rank_offset, rows_per_rank
from videoclip.losses import contrastive_loss
from videoclip.packed import Packed
from videoclip.parts.frame_batches import as_frames, frame_batch, frame_size
from videoclip.parts.fusion import first_rows, from_even, fuse, last_rows
from videoclip.parts.masked_words import NOT_MASKED, MaskedWordHead, WordMask, mask_words, masked_word_loss
from videoclip.parts.matching import matching_loss, matching_negatives, matching_pairs
from videoclip.parts.pixels import inside, normalised, zeroed_outside
from videoclip.parts.prompter import KINDS, Prompter, entity_loss, kept_labels, prompts
from videoclip.parts.towers import Towers, TowersShape
from videoclip.parts.vision_transformer import VisionShape
from videoclip.transformer import TransformerShape

LOSSES = ("vtc", "vtm", "mlm", "pem")
NO_ANSWER = -100  # the right answer is none that the model knows


@dataclass(frozen=True)
class AlproConfig:
    """The shape of a model and what it is trained by. The defaults are the published ones."""

    shape: TowersShape = field(default_factory=TowersShape)
    losses: tuple[str, ...] = LOSSES
    entities: int = 1000
    """Entities that the prompter tells apart; 0 without `pem`."""
    entity_names: tuple[str, ...] = ()
    """Those entities in words, where they are known."""
    answers: int = 0
    """Answers to choose from, where questions are answered."""
    word_mask: WordMask = field(default_factory=lambda: WordMask(103, 30522, (0, 100, 101, 102, 103)))
    discard: str = "probability"
    threshold: float = 0.2
    tied_words: bool = True
    """Scores of words are taken with the word embeddings, as in BERT."""
    has_prompter: bool = False
    """Whether the weights hold the prompter as well."""
    sampler: str = "headtail"
    """How frames are chosen in training."""
    max_seconds: int = 32
    max_words: int = 30
    video_encoder: str = ""
    """Fingerprint of what made the frames in the shards."""
    normalize: bool = True

    def __post_init__(self) -> None:
        if unknown := set(self.losses) - set(LOSSES):
            raise InputError(f"losses must be some of {', '.join(LOSSES)}; not {', '.join(sorted(unknown))}")
        if not self.losses and not self.answers:
            raise InputError(f"a model needs losses ({', '.join(LOSSES)}), or answers to choose from")
        if ("pem" in self.losses) != bool(self.entities):
            raise InputError("pem needs entities, and entities need pem")

    @property
    def width(self) -> int:
        """Of an embedding."""
        return self.shape.projection


@dataclass(frozen=True)
class Options:
    """ALPRO-base's constants. `losses` of `vtc` alone train a prompter; all four need one (`--model.prompter`)."""

    patch: int = 16
    frames: int = 4
    width: int = 768
    heads: int = 12
    vision_layers: int = 12
    text_layers: int = 6
    fusion_layers: int = 6
    projection: int = 256
    temperature: float = 0.07
    dropout: float = 0.1
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
    max_seconds: int = 0
    """Longest video clip; 0: that of the training clips."""
    max_words: int = 0
    """Longest text; 0: that of the training clips."""


def two_layers(width: int, outputs: int) -> nn.Sequential:
    """A head of two layers, the inner one twice as wide."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, outputs))


class Recipe(FrameModel, Towers):
    """Towers, fusion (BERT's upper layers) and the heads, under the release's names."""

    recipe: ClassVar[str] = "alpro"
    config_class: ClassVar[type] = AlproConfig
    prompter: Prompter | None

    def __init__(self, config: AlproConfig) -> None:
        super().__init__(config.shape)
        self.config = config
        width = config.shape.text.width
        self.itm_head = nn.Linear(width, 2)
        if "mlm" in config.losses:
            self.text_encoder.cls = MaskedWordHead(width, config.shape.vocabulary, config.tied_words)
        if config.entities:
            self.mpm_head = two_layers(width, config.entities)
        if config.answers:
            self.classifier = two_layers(width, config.answers)
        self.prompter = None
        self._freeze_what_no_loss_reaches()

    def _freeze_what_no_loss_reaches(self) -> None:
        losses = self.config.losses
        if "vtc" not in losses:
            for part in (self.vision_proj, self.text_proj):
                part.requires_grad_(False)
            self.temp.requires_grad_(False)
        if "vtm" not in losses:
            self.itm_head.requires_grad_(False)
        if losses == ("vtc",):
            for layer in self.text_encoder.bert.encoder.layer[self.shape.text_layers :]:
                layer.requires_grad_(False)

    @classmethod
    def restore(cls, config: AlproConfig) -> Recipe:
        """With an empty prompter, where the weights hold one."""
        model = cls(config)
        if config.has_prompter:
            model.attach(Prompter(config.shape, config.entities, config.entity_names or None))
        return model

    def attach(self, prompter: Prompter) -> Recipe:
        """Take a frozen prompter.

        Raises InputError if it names other entities than the model predicts, or reads other frames.
        """
        known, theirs = self.config.entities, len(prompter.video_prompt_feat)
        if theirs != known:
            raise InputError(f"the prompter tells {theirs} entities apart, the model predicts {known}")
        names = self.config.entity_names
        if names and prompter.names and names != prompter.names:
            other = next(number for number, pair in enumerate(zip(names, prompter.names)) if pair[0] != pair[1])
            raise InputError(
                f"entity {other + 1} is {prompter.names[other]!r} to the prompter and {names[other]!r} to the model"
            )
        vision, own = prompter.shape.vision, self.shape.vision
        if (vision.size, vision.frames) != (own.size, own.frames):
            raise InputError(
                f"the prompter reads {vision.frames} frames of {vision.size} pixels, "
                f"the model {own.frames} of {own.size}"
            )
        self.prompter = prompter
        self.config = replace(self.config, has_prompter=True, entity_names=names or prompter.names or ())
        return self

    def forward(self, batch: ClipBatch | FrameBatch) -> dict[str, Tensor]:
        """The losses by name, their sum, and shares: `kept` and `right` of the entities, `matched` of the matching."""
        wanted, vision = self.config.losses, self.shape.vision
        batch = frame_batch(batch, vision.size, vision.frames, vision.grid, self.config.sampler)
        frames = normalised(batch.frames)
        video, words = self.video_tokens(frames), self.text_tokens(batch.words)
        if self.config.answers:
            return self.answered(video, words, batch.answers)
        video_features, text_features = self.projected_video(video), self.projected_text(words)
        losses: dict[str, Tensor] = {}
        figures: dict[str, Tensor] = {}
        if "vtc" in wanted:
            losses["vtc"] = self.contrast(video_features, text_features, batch.excluded)
        if "vtm" in wanted or "pem" in wanted:
            # Without contrast nothing makes likeness mean anything: its negatives are then drawn evenly.
            similarity = video_features @ text_features.T / self.temp if "vtc" in wanted else torch.zeros(1)
            similarity = similarity.expand(len(video), len(video))
            negatives = matching_negatives(similarity, batch.draws, batch.excluded)
            fused, logits, labels = self.matched(words, video, *negatives, judge="vtm" in wanted)
            if "vtm" in wanted:
                losses["vtm"] = matching_loss(logits, labels)
                figures["matched"] = (logits.argmax(1) == labels).float().mean()
            if "pem" in wanted:
                losses["pem"], more = self.entities(fused, batch)
                figures.update(more)
        if "mlm" in wanted:
            hidden, labels = mask_words(batch.words, self.config.word_mask, batch.draws)
            losses["mlm"] = self.hidden_words(hidden, labels, video)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses, **figures}

    def contrast(self, video: Tensor, text: Tensor, excluded: Tensor | None = None) -> Tensor:
        """VTC: half of both cross-entropies over the pairs of all workers. Unit vectors [P, H]."""
        counts = rows_per_rank(len(video))
        gathered = gather_with_gradient(video, counts), gather_with_gradient(text, counts)
        if excluded is not None and len(gathered[0]) > len(video):
            excluded = None  # known of the own pairs alone
        return contrastive_loss(video, text, self.temp, gathered, rank_offset(counts), excluded) / 2

    def matched(
        self, words: Packed, video: Tensor, videos_of_texts: Tensor, texts_of_videos: Tensor, judge: bool = True
    ) -> tuple[Packed, Tensor, Tensor]:
        """VTM: fused states of the P true pairs, logits [N, 2] of all pairs judged, and their labels [N]."""
        if not judge:
            return self.fused(words, from_even(video)), video.new_zeros(0, 2), video.new_zeros(0, dtype=torch.int64)
        texts, videos, labels = matching_pairs(words, from_even(video), videos_of_texts, texts_of_videos)
        fused = self.fused(texts, videos)
        return fused.take(torch.arange(len(words))), self.itm_head(first_rows(fused)), labels

    def hidden_words(self, hidden: Packed, labels: Tensor, video: Tensor) -> Tensor:
        """MLM: words ids with some hidden, the hidden ones' labels [N], and the same video tokens [B, 1 + K, W]."""
        asked = labels != NOT_MASKED
        return masked_word_loss(self.word_scores(hidden, video)[asked], labels[asked])

    def word_scores(self, words: Packed, video: Tensor) -> Tensor:
        """Scores [N, V] of every word of the vocabulary at every place of the text."""
        fused = self.fused(self.text_tokens(words), from_even(video))
        at_words = fused.rows[(fused.positions < words.lengths[fused.owners]).to(video.device)]
        return self.text_encoder.cls(at_words, self.text_encoder.bert.embeddings.word_embeddings.weight)

    def entities(self, fused: Packed, batch: FrameBatch) -> tuple[Tensor, dict[str, Tensor]]:
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
        return entity_loss(logits, q, kept), {"kept": kept.float().mean(), "right": right}

    def entity_logits(self, fused: Packed, crop: Tensor) -> Tensor:
        """Fused pairs and bool [B, grid, grid] -> [B, entities], from the mean of the patches inside."""
        patches = last_rows(fused, self.shape.vision.places)  # [B, K, W]
        share = crop.flatten(1).to(patches.dtype)
        region = (patches * share[..., None]).sum(1) / share.sum(1, keepdim=True).clamp(min=1)
        return self.mpm_head(region)

    def fused(self, words: Packed, video: Packed) -> Packed:
        """States of the text layers and video tokens -> fused states, words first, then [CLS] and the patches."""
        return fuse(self.text_encoder.bert.encoder.layer[self.shape.text_layers :], words, video)

    def matching_scores(self, frames: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Normalised frames [B, T, 3, S, S], word ids and mask [B, L] -> logits [B, 2]; column 1 says "matched"."""
        words = self.text_tokens(Packed.from_padded(ids, mask))
        return self.itm_head(first_rows(self.fused(words, from_even(self.video_tokens(frames)))))

    def answered(self, video: Tensor, questions: Packed, answers: Tensor | None) -> dict[str, Tensor]:
        """Cross-entropy of the right answers, int64 [B], NO_ANSWER where it is none known; `accuracy` as a share."""
        if answers is None:
            raise InputError("a model that answers questions is trained with answers in its batches")
        logits = self.classifier(first_rows(self.fused(questions, from_even(video)))).float()
        known = (answers >= 0).sum().clamp(min=1)
        loss = F.cross_entropy(logits, answers, reduction="sum", ignore_index=NO_ANSWER) / known
        return {"loss": loss, "accuracy": (logits.argmax(1) == answers).float().mean()}

    def answer_scores(self, frames: Tensor, questions: Packed) -> Tensor:
        """Normalised frames and word ids of questions -> logits [B, answers]."""
        if not self.config.answers:
            raise InputError("this model answers no questions: it has no classifier")
        fused = self.fused(self.text_tokens(questions), from_even(self.video_tokens(frames)))
        return self.classifier(first_rows(fused))

    def after_step(self) -> None:
        """Keep the temperature where the release clamps it."""
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)

    # What evaluation, clustering and search ask for.

    @property
    def temperature(self) -> Tensor:
        """Divides cosines."""
        return self.temp

    def embed_video(self, frames: Packed) -> Tensor:
        """Clips of any number of frames, uint8 [N, S, S, 3] or rows of shards -> unit vectors [B, projection]."""
        vision = self.shape.vision
        clips = FrameBatch.even(as_frames(frames, vision.size), vision.frames)
        return self.video_features(normalised(clips.to(self.temp.device)))

    def embed_text(self, word_ids: Packed) -> Tensor:
        """Word ids with [CLS] … [SEP] -> unit vectors [B, projection]."""
        return self.projected_text(self.text_tokens(word_ids.to(self.temp.device, torch.int64)))


def build(options: Options, manifest: Manifest, tokenizer: WordTokenizer) -> Recipe:
    """A new model for shards of frames and texts cut by `tokenizer`; starts from its prompter's towers if it has one.

    Raises InputError if the shards hold no frames, or the losses need a prompter or entities that are not given.
    """
    config = configuration(options, manifest, tokenizer)
    model = Recipe(config)
    model.frozen.tokenizer = tokenizer
    if "pem" in options.losses:
        if not options.prompter:
            raise InputError("pem needs --model.prompter, a model trained with --model.losses vtc, or leave pem out")
        towers = Recipe.from_pretrained(options.prompter)
        sentences = {
            kind: tokenizer.clip_ids([text for name in config.entity_names for text in prompts(name, kind)], 13)
            for kind in KINDS
        }
        sentences = {kind: ids.to("cpu", torch.int64) for kind, ids in sentences.items()}
        if towers.tokenizer().fingerprint() != tokenizer.fingerprint():
            raise InputError(f"{options.prompter}: the prompter was trained with another tokenizer")
        model.attach(Prompter.of(towers, config.entity_names, sentences))
    return model


def configuration(options: Options, manifest: Manifest, tokenizer: WordTokenizer) -> AlproConfig:
    """What the options leave open follows from the shards and the tokenizer."""
    names: tuple[str, ...] = ()
    if "pem" in options.losses:
        if not options.entities:
            raise InputError("pem needs --model.entities, a file of nouns, the most frequent first")
        names = read_entities(Path(options.entities), options.most_entities)
    size, positions = frame_size(manifest), max(64, options.max_words + 2)
    vision = VisionShape(
        size,
        options.patch,
        frames=options.frames,
        width=options.width,
        layers=options.vision_layers,
        heads=options.heads,
        intermediate=4 * options.width,
        drop_path=options.drop_path,
    )
    layers = options.text_layers + options.fusion_layers
    text = TransformerShape(options.width, options.heads, 4 * options.width, layers, options.dropout, positions)
    words = tokenizer.special_ids()
    shape = TowersShape(
        vision, text, options.text_layers, tokenizer.vocabulary, options.projection, options.temperature
    )
    return AlproConfig(
        shape,
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
