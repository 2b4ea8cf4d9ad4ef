"""ALPRO's prompter: frozen towers that say which of many entities a crop of a video shows.

Every entity is put into twelve sentences; the mean of their unit vectors is the entity's prompt. It is not made unit
again: averaged vectors are shorter than one, and so the distribution over entities is softer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from videoclip.data.entities import check_entities
from videoclip.data.words import WordTokenizer
from videoclip.errors import InputError
from videoclip.gather import mean_over_all
from videoclip.losses import ALONE
from videoclip.packed import Packed
from videoclip.parts.towers import Towers, TowersShape
from videoclip.parts.vision_transformer import VisionShape

ARTICLES = ("a", "the", "one")
SHOWS = {
    "video": ("A footage of", "A video of", "A portrait of", "A video footage of"),
    "image": ("A photo of", "A picture of", "A good photo of", "A good picture of"),
}
KINDS = tuple(SHOWS)
LONGEST_PROMPT = 13  # words; the release pads prompts to 15 ids


def prompts(entity: str, kind: str = "video") -> list[str]:
    """The twelve sentences of one entity, `kind` "video" or "image"."""
    return [f"{shows} {article} {entity}." for shows in SHOWS[kind] for article in ARTICLES]


class Prompter(Towers):
    """Towers that are never trained here, and a vector for every entity."""

    video_prompt_feat: Tensor
    image_prompt_feat: Tensor

    def __init__(self, shape: TowersShape, entities: int, names: Sequence[str] | None = None) -> None:
        """`names`: the entities in words, where they are known; a published checkpoint does not hold them."""
        super().__init__(shape, shape.text_layers)
        self.names = None if names is None else check_entities(names, "the prompter's entities")
        if self.names is not None and len(self.names) != entities:
            raise InputError(f"{len(self.names)} names for a prompter of {entities} entities")
        for kind in KINDS:
            self.register_buffer(f"{kind}_prompt_feat", torch.zeros(entities, shape.projection))
        self.requires_grad_(False).eval()

    @classmethod
    def of(cls, towers: Towers, names: Sequence[str], words: dict[str, Packed]) -> Prompter:
        """A frozen copy of trained towers. `words[kind]`: ids of `prompts(name, kind)` for every name in turn."""
        prompter = cls(towers.shape, len(names), names)
        own = prompter.state_dict()
        theirs = towers.state_dict()
        prompter.load_state_dict({name: theirs.get(name, own[name]) for name in own})
        for kind, ids in words.items():
            prompter.set_prompts(ids, kind)
        return prompter

    def check_fits(self, entities: int, names: Sequence[str], vision: VisionShape) -> None:
        """Raises InputError if it tells other entities apart than a model predicts, or reads other frames."""
        theirs, own = len(self.video_prompt_feat), self.shape.vision
        if theirs != entities:
            raise InputError(f"the prompter tells {theirs} entities apart, the model predicts {entities}")
        if names and self.names and tuple(names) != self.names:
            other = next(number for number, pair in enumerate(zip(names, self.names)) if pair[0] != pair[1])
            raise InputError(
                f"entity {other + 1} is {self.names[other]!r} to the prompter and {names[other]!r} to the model"
            )
        if (own.size, own.frames) != (vision.size, vision.frames):
            raise InputError(
                f"the prompter reads {own.frames} frames of {own.size} pixels, "
                f"the model {vision.frames} of {vision.size}"
            )

    def train(self, mode: bool = True) -> Prompter:
        """A prompter stays in evaluation mode, whatever its owner does."""
        return super().train(False)

    @torch.no_grad()
    def set_prompts(self, words: Packed, kind: str = "video") -> None:
        """Make the entities' vectors anew from the ids of their sentences, entity after entity, as many of each."""
        features = getattr(self, f"{kind}_prompt_feat")
        if not len(words) or len(words) % len(features):
            raise InputError(f"{len(words)} sentences cannot be shared evenly by {len(features)} entities")
        made = [self.projected_text(self.text_tokens(part)) for part in _chunks(words, 512)]
        features.copy_(torch.cat(made).unflatten(0, (len(features), -1)).mean(1))

    @torch.no_grad()
    def soft_labels(self, crops: Tensor, kind: str = "video") -> Tensor:
        """Normalised frames [B, T, 3, S, S], black outside their crop -> q [B, entities], rows summing to one."""
        features = getattr(self, f"{kind}_prompt_feat")
        return (self.video_features(crops) @ features.T / self.temp).float().softmax(1)


def prompter_from(
    towers: Towers, own: WordTokenizer, names: Sequence[str], tokenizer: WordTokenizer, where: str
) -> Prompter:
    """A prompter of trained towers, which have their `own` tokenizer, and entities in words.

    Raises InputError if `tokenizer` cuts words otherwise.
    """
    if own.fingerprint() != tokenizer.fingerprint():
        raise InputError(f"{where}: the prompter was trained with another tokenizer")
    sentences = {}
    for kind in KINDS:
        ids = tokenizer.clip_ids([text for name in names for text in prompts(name, kind)], LONGEST_PROMPT)
        sentences[kind] = ids.to("cpu", torch.int64)
    return Prompter.of(towers, names, sentences)


def _chunks(words: Packed, size: int) -> Iterator[Packed]:
    for first in range(0, len(words), size):
        yield words.take(torch.arange(first, min(first + size, len(words))))


def kept_labels(q: Tensor, discard: str, threshold: float = 0.2) -> Tensor:
    """bool [B]: which samples' labels are sure enough.

    "probability", the paper's rule: the best entity has at least `threshold`. "release": the release compares the
    best entity's *number* with the threshold, so it drops those whose best is entity 0, the most frequent noun, and
    keeps all others.
    """
    if discard == "release":
        return q.argmax(1) >= threshold
    if discard != "probability":
        raise InputError(f"discard must be probability or release, not {discard!r}")
    return q.max(1).values >= threshold


def entity_loss(logits: Tensor, q: Tensor, kept: Tensor, counts: Sequence[int] = ALONE) -> Tensor:
    """-Σ_m q_m log p_m, mean over the kept samples of all workers: `logits`, `q` [B, entities]; 0 if none is kept."""
    of_sample = -(q * logits.float().log_softmax(1)).sum(1)
    return mean_over_all((of_sample * kept).sum(), int(kept.sum()), counts)
