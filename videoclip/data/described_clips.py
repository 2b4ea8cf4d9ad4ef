"""Clips that somebody has described: several frozen features of each, and several texts, each encoded in several ways.

A batch holds every clip once, with one of its texts drawn anew each time: two texts of one clip never meet, or one
would be pushed away from what it describes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.data.shards import Shards
from videoclip.data.words import WordTokenizer
from videoclip.errors import InputError
from videoclip.packed import Packed

Rows = np.ndarray | None  # of one clip's expert: float [D], [n, d], or missing


@dataclass(frozen=True)
class DescribedBatch:
    """B clips and one text of each: text i describes clip i.

    `experts` name -> float [B, D] or sequences of rows; `present` name -> bool [B]; `texts` encoder -> sequences of
    word vectors or ids. int64 [B]: `rows`, the clips' numbers, and `captions`, those of the texts among all texts.
    """

    experts: Mapping[str, Tensor | Packed]
    present: Mapping[str, Tensor]
    texts: Mapping[str, Packed]
    rows: Tensor
    captions: Tensor
    rows_per_rank: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.rows)


@dataclass(frozen=True)
class DescribedClips:
    """V clips with `counts` int64 [V] texts each. `texts` holds those of all clips, one clip after the other."""

    ids: tuple[str, ...]
    experts: Mapping[str, Tensor | Packed]
    present: Mapping[str, Tensor]
    texts: Mapping[str, Packed]
    counts: Tensor

    def __post_init__(self) -> None:
        lengths = {name: len(expert) for name, expert in {**self.experts, **self.present}.items()}
        lengths |= {"ids": len(self.ids), "counts": len(self.counts)}
        if set(lengths.values()) != {len(self.ids)}:
            raise ValueError(f"parts of different numbers of clips: {lengths}")
        texts = int(self.counts.sum())
        if any(len(encoded) != texts for encoded in self.texts.values()):
            raise ValueError(f"{texts} texts, but { ({name: len(x) for name, x in self.texts.items()}) } encoded")

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.ids)

    @cached_property
    def first(self) -> Tensor:
        """int64 [V]: the number, among all texts, of every clip's first."""
        return torch.cumsum(self.counts, 0) - self.counts

    @cached_property
    def owners(self) -> Tensor:
        """int64 [texts]: the clip that a text describes."""
        return torch.repeat_interleave(torch.arange(len(self)), self.counts)

    def experts_of(self, rows: Tensor, names: Sequence[str]) -> tuple[dict[str, Tensor | Packed], dict[str, Tensor]]:
        """Some experts of some clips, `rows` int64 [B], and which clips have them."""
        experts = {name: _taken(self.experts[name], rows) for name in names}
        return experts, {name: self.present[name][rows] for name in names if name in self.present}

    def batch(self, rows: Tensor, captions: Tensor) -> DescribedBatch:
        """Some clips, `rows` int64 [B], and texts, `captions` int64 [B], numbered among all texts."""
        return DescribedBatch(
            *self.experts_of(rows, tuple(self.experts)),
            {name: encoded.take(captions) for name, encoded in self.texts.items()},
            rows,
            captions,
        )


def _taken(x: Tensor | Packed, rows: Tensor) -> Tensor | Packed:
    """Some of the rows of a tensor, or of the sequences of a packed one."""
    return x.take(rows) if isinstance(x, Packed) else x[rows]


def described_clips(
    ids: Sequence[str],
    experts: Mapping[str, Mapping[str, Rows]],
    texts: Mapping[str, Mapping[str, Sequence[np.ndarray]]],
) -> tuple[DescribedClips, list[tuple[str, str]]]:
    """Bring the features of videos together: `experts` name -> video -> rows, `texts` encoder -> video -> a text each.

    Returns the clips, and (video, reason) of those that are left out: without any expert, which no model could place,
    or without a text. Raises InputError, naming video and expert, if widths differ, or encoders have other texts.
    """
    kept: list[str] = []
    rejected: list[tuple[str, str]] = []
    for video in ids:
        if all(features.get(video) is None for features in experts.values()):
            rejected.append((video, "has none of the experts " + ", ".join(sorted(experts))))
        elif lacking := [name for name, encoded in texts.items() if not len(encoded.get(video, ()))]:
            rejected.append((video, f"has no text encoded by {', '.join(lacking)}"))
        else:
            kept.append(video)
    if not kept:
        raise InputError(
            f"none of {len(ids)} videos can be used; the first: {rejected[0] if rejected else 'none given'}"
        )
    counts = _counts(kept, texts)
    packed = {name: _texts(name, kept, encoded) for name, encoded in texts.items()}
    columns = {name: _expert(name, [features.get(video) for video in kept], kept) for name, features in experts.items()}
    present = {
        name: torch.tensor([features.get(video) is not None for video in kept]) for name, features in experts.items()
    }
    return DescribedClips(tuple(kept), columns, present, packed, counts), rejected


def _counts(ids: Sequence[str], texts: Mapping[str, Mapping[str, Sequence[np.ndarray]]]) -> Tensor:
    (first, encoded), *others = texts.items()
    counts = [len(encoded[video]) for video in ids]
    for name, other in others:
        for video, count in zip(ids, counts):
            if len(other[video]) != count:
                raise InputError(
                    f"video {video!r}: {count} texts encoded by {first}, but {len(other[video])} by {name}"
                )
    return torch.tensor(counts)


def _texts(name: str, ids: Sequence[str], encoded: Mapping[str, Sequence[np.ndarray]]) -> Packed:
    width = encoded[ids[0]][0].shape[-1]
    rows = []
    for video in ids:
        for text in encoded[video]:
            if text.ndim != 2 or not len(text) or text.shape[1] != width:
                raise InputError(f"video {video!r}: a text of shape {text.shape} by {name}, expected [words, {width}]")
            rows.append(torch.from_numpy(np.asarray(text, np.float32)))
    return Packed.of(rows)


def _expert(name: str, rows: Sequence[Rows], ids: Sequence[str]) -> Tensor | Packed:
    """One expert of all clips: float32 [V, D], or sequences, empty where it is missing."""
    some = next((row for row in rows if row is not None), None)
    if some is None:
        raise InputError(f"expert {name}: none of {len(ids)} videos has it; leave it out")
    width = some.shape[-1]
    for video, row in zip(ids, rows):
        if row is not None and (row.ndim != some.ndim or row.shape[-1] != width):
            wanted = f"[{width}]" if some.ndim == 1 else f"[rows, {width}]"
            raise InputError(f"video {video!r}: expert {name} of shape {row.shape}, expected {wanted}")
    shape = (width,) if some.ndim == 1 else (0, width)
    filled = [torch.from_numpy(np.zeros(shape, np.float32) if row is None else row.astype(np.float32)) for row in rows]
    return torch.stack(filled) if some.ndim == 1 else Packed.of(filled)


def shard_expert(shards: Shards, clips: Sequence[AnnotatedClip], sequence: bool = False) -> dict[str, Rows]:
    """An expert of clips from a folder of shards: `clip_id` -> mean of its tokens [D] or the tokens [T, D], float32.

    None where the video is not in the shards, or the clip starts behind its end.
    """
    rows = shards.rows_by_id()
    experts: dict[str, Rows] = {}
    for clip in clips:
        row = rows.get(clip.video_id)
        tokens = np.zeros((0, 1)) if row is None else clip.seconds(shards.tokens(row)).astype(np.float32)
        experts[clip_id(clip)] = None if not len(tokens) else tokens if sequence else tokens.mean(0)
    return experts


def clip_id(clip: AnnotatedClip) -> str:
    """A name for a clip, which its video's id alone is not: there may be many in a video."""
    return f"{clip.video_id} {clip.start:g}-{'' if clip.end is None else format(clip.end, 'g')}"


def clips_and_words(
    shards: Shards, clips: Sequence[AnnotatedClip], tokenizer: WordTokenizer, max_seconds: int, max_words: int
) -> tuple[DescribedClips, list[tuple[str, str]]]:
    """Clips for models with two towers: expert "tokens", sequences float16 [T, D], and texts "words", word ids.

    Returns them with (clip, reason) of those that are left out: not in the shards, or behind the end of a video.
    Raises InputError if none is left.
    """
    rows = shards.rows_by_id()
    pieces = {}
    for clip in clips:
        if clip.video_id in rows:
            pieces[clip_id(clip)] = clip.seconds(shards.tokens(rows[clip.video_id]))[:max_seconds]
    kept = {name: clip for clip in clips if len(pieces.get(name := clip_id(clip), ()))}
    rejected = [(name, "is not in the shards") for clip in clips if (name := clip_id(clip)) not in kept]
    if not kept:
        raise InputError(f"none of the {len(clips)} annotated clips belongs to a video in {shards.folder}")
    words = tokenizer.clip_ids([sentence for clip in kept.values() for sentence in clip.sentences], max_words)
    tokens = Packed.of([torch.from_numpy(pieces[name].copy()) for name in kept])
    counts = torch.tensor([len(clip.sentences) for clip in kept.values()])
    return DescribedClips(tuple(kept), {"tokens": tokens}, {}, {"words": words}, counts), rejected


def epoch_batches(
    clips: DescribedClips, size: int, generator: np.random.Generator, mask: np.ndarray | None = None
) -> Iterator[DescribedBatch]:
    """Every clip once, in random order, with one of its texts: an epoch. The last batch may be short.

    `mask`, bool [texts], says which texts may be drawn; clips without any are left out. A last batch of one clip, which
    has nothing to be told from, joins the one before.
    Raises InputError if fewer than two clips are left, or the mask is of other texts.
    """
    for rows, captions in draw_epoch(clips.counts.numpy(), size, generator, mask):
        yield clips.batch(torch.from_numpy(rows), torch.from_numpy(captions))


def draw_epoch(
    counts: np.ndarray, size: int, generator: np.random.Generator, mask: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The numbers of clips and texts of `epoch_batches`: pairs of int64 [B]."""
    first = np.cumsum(counts) - counts
    if mask is not None and len(mask) != counts.sum():
        raise InputError(f"a mask of {len(mask)} texts where there are {counts.sum()}")
    choices = [np.arange(start, start + count) for start, count in zip(first, counts)]
    if mask is not None:
        choices = [texts[mask[texts].astype(bool)] for texts in choices]
    usable = np.array([clip for clip, texts in enumerate(choices) if len(texts)], np.int64)
    if len(usable) < 2 or size < 2:
        raise InputError(f"{len(usable)} clips with texts in batches of {size}: at least two have to meet")
    order = generator.permutation(usable)
    drawn = np.array([generator.choice(choices[clip]) for clip in order], np.int64)
    bounds = list(range(0, len(order), size))
    if len(order) - bounds[-1] == 1 and len(bounds) > 1:
        bounds.pop()
    ends = [*bounds[1:], len(order)]
    return [(order[start:end], drawn[start:end]) for start, end in zip(bounds, ends)]
