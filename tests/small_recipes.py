"""A tiny model of every recipe and batches for it: what the tests of all recipes are made of."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tests.test_towers import clip_words, hub_folder
from videoclip.data.clips import ClipBatch
from videoclip.encoders.image import ImageEncoder
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.packed import Packed
from videoclip.parts.masked_words import WordMask
from videoclip.parts.prompter import Prompter
from videoclip.parts.towers import TowersShape
from videoclip.parts.vision_transformer import VisionShape
from videoclip.recipes import alpro, frozen_in_time, margin, prompting, towers, videoclip
from videoclip.recipes.fusion import FusionConfig
from videoclip.recipes.fusion import Recipe as FusionRecipe
from videoclip.retrieval.false_negatives import FalseNegativeConfig, pair_labels
from videoclip.transformer import TransformerShape

CONFIG = VideoCLIPConfig(
    video_dimension=8, width=16, layers=1, heads=2, intermediate=32, vocabulary=30, cls_id=2, sep_id=3, dropout=0.0
)
FUSION = FusionConfig(**vars(CONFIG), fusion_layers=1, mask_id=4, special_ids=(0, 1, 2, 3, 4), masked_share=0.4)
SHARES = (slice(0, 6), slice(6, 10))  # unequal
DUPLICATES = np.array([0, 0, 2, 3, 4])  # videos 0 and 1 are the same

SIZE = 16  # pixels of a frame
ENTITIES = ("onion", "carrot", "pan")
VISION = VisionShape(SIZE, 8, 1, 2, 16, 2, 2, 32)
TEXT = TransformerShape(16, 2, 32, 2, 0.0, 16)
MASK = WordMask(4, 30, (0, 1, 2, 3, 4), share=0.4)


def alpro_config(**changes: object) -> alpro.AlproConfig:
    """All four losses; every label of the prompter is kept."""
    plain = alpro.AlproConfig(TowersShape(VISION, TEXT, 1, 30, 16), word_mask=MASK, entities=len(ENTITIES))
    return replace(plain, threshold=0.0, **changes)


def make_alpro(folder: Path | None = None, pooling: str = "mean") -> alpro.Recipe:
    """With a prompter of other weights."""
    prompter = alpro.Recipe(replace(alpro_config(), losses=("vtc",), entities=0))
    sentences = Packed.of([torch.tensor([2, 5 + i, 9 + k, 3]) for i in range(len(ENTITIES)) for k in range(12)])
    words = {"video": sentences, "image": sentences}
    return alpro.Recipe(alpro_config()).attach(Prompter.of(prompter, ENTITIES, words))


def make_frozen_in_time(folder: Path | None = None, pooling: str = "mean") -> frozen_in_time.Recipe:
    """Two frames from the first step on."""
    vision = replace(VISION, attention="frozen")
    return frozen_in_time.Recipe(frozen_in_time.FrozenInTimeConfig(vision, TEXT, 30, 16, 0.05, ((0, 2),)))


def make_towers(folder: Path, pooling: str = "mean") -> towers.Recipe:
    """Around a CLIP with random weights, as the hub has them."""
    return towers.around(clip_of(folder), towers.Options(hidden_width=8, layers=1, heads=2, max_seconds=8, max_words=8))


def clip_of(folder: Path) -> ImageEncoder:
    """Made once in a folder."""
    if not (folder / "hub").exists():
        hub_folder(folder / "hub")
    return ImageEncoder.from_pretrained(str(folder / "hub"))


def make_prompting(folder: Path | None = None, pooling: str = "mean") -> prompting.Recipe:
    """Prompts around a VideoCLIP of ours."""
    return prompting.prompted(
        prompting.Options(prefix=2, postfix=2, frames=4),
        VideoCLIP(replace(CONFIG, pooling=pooling, positions=60, max_seconds=8, max_words=40)),
    )


MAKERS: dict[str, Callable[[Path, str], nn.Module]] = {
    "videoclip": lambda _, pooling: videoclip.Recipe(replace(CONFIG, pooling=pooling)),
    "margin": lambda _, pooling: margin.Recipe(replace(CONFIG, pooling=pooling)),
    "fusion": lambda _, pooling: FusionRecipe(replace(FUSION, pooling=pooling)),
    "frozen-in-time": make_frozen_in_time,
    "alpro": make_alpro,
    "prompting": make_prompting,
    "towers": make_towers,
}
NAMES = tuple(MAKERS)
FRAMES = ("frozen-in-time", "alpro")


def make(name: str, folder: Path, pooling: str = "mean") -> nn.Module:
    """A tiny model of a recipe; `folder` keeps the files that it is built around."""
    torch.manual_seed(0)
    return MAKERS[name](folder, pooling)


def global_batch(number: int) -> ClipBatch:
    """Ten pairs of five videos; two pairs say the same."""
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(1, 6, (10,), generator=generator)
    words = [torch.randint(5, 30, (n,), generator=generator) for n in (4, *range(1, 9))]
    texts = [torch.cat([torch.tensor([2]), text, torch.tensor([3])]) for text in (*words, words[0])]
    tokens = torch.randn(int(lengths.sum()), 8, generator=generator)
    return ClipBatch(Packed(tokens, lengths), Packed.of(texts), torch.arange(5).repeat_interleave(2))


def share_of(batch: ClipBatch, rank: int | None) -> ClipBatch:
    """One worker's pairs, or all of them, labelled as in training."""
    rows = slice(0, 10) if rank is None else SHARES[rank]
    order = torch.arange(10)[rows]
    share = ClipBatch(batch.video_tokens.take(order), batch.word_ids.take(order), batch.video[rows])
    counts = (10,) if rank is None else tuple(s.stop - s.start for s in SHARES)
    labels = pair_labels(share, FalseNegativeConfig(), DUPLICATES, 0 if rank is None else SHARES[rank].start)
    return replace(share, labels=labels, rows_per_rank=counts)


def batch_of(name: str, folder: Path, number: int = 0, rank: int | None = None) -> ClipBatch:
    """The same pairs as each recipe has them in shards: tokens, embeddings of a CLIP, or frames."""
    batch = global_batch(number)
    generator = torch.Generator().manual_seed(number)
    if name in FRAMES:
        rows = torch.randint(0, 256, (len(batch.video_tokens.rows), SIZE * SIZE * 3), generator=generator)
        batch = replace(batch, video_tokens=batch.video_tokens.with_rows(rows.half()))
    if name == "towers":
        rows = torch.randn(len(batch.video_tokens.rows), 12, generator=generator)
        batch = replace(batch, video_tokens=batch.video_tokens.with_rows(rows), word_ids=as_clips_words(batch.word_ids))
    return share_of(batch, rank)


def as_clips_words(words: Packed) -> Packed:
    """Ids between the first and the last word of CLIP's tokenizer."""
    known = clip_words()
    ids = words.rows % (known.vocabulary - 3)
    ids = torch.where(words.rows == 2, torch.full_like(ids, known.cls_id), ids)
    return words.with_rows(torch.where(words.rows == 3, torch.full_like(ids, known.sep_id), ids))


@torch.no_grad()
def embedded(model: nn.Module, batch: ClipBatch) -> tuple[Tensor, Tensor]:
    """Both sides of a batch."""
    return model.embed_video(batch.video_tokens), model.embed_text(batch.word_ids)
