"""A tiny model of every recipe and batches for it: what the tests of all recipes are made of."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from videoclip.data.clips import ClipBatch
from videoclip.data.stretches import StretchBatch
from videoclip.data.words import WordTokenizer
from videoclip.encoders.image import ImageEncoder
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.packed import Packed
from videoclip.parts.masked_words import WordMask
from videoclip.parts.prompter import Prompter
from videoclip.parts.towers import TowersShape
from videoclip.parts.vision_transformer import VisionShape
from videoclip.recipes import alignment, alpro, frozen_in_time, margin, prompting, towers, videoclip
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
    options = towers.Options(hidden_width=16, layers=1, heads=2, penalty=0.5, max_seconds=8, temperature=0.02)
    return towers.around(clip_of(folder), options)


def clip_of(folder: Path) -> ImageEncoder:
    """Made once in a folder."""
    if not (folder / "clip").exists():
        write_clip(folder / "clip")
    return ImageEncoder.from_pretrained(str(folder / "clip"))


def write_clip(folder: Path) -> None:
    """A CLIP of 30 words whose pictures are embedded 8 wide, for the recipe towers, as the hub has models."""
    from tokenizers import Tokenizer, models, processors
    from transformers import CLIPConfig, CLIPModel

    ids = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, **{f"w{number}": number for number in range(4, 30)}}
    tokenizer = Tokenizer(models.WordLevel(ids, "[UNK]"))
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**size, "vocab_size": 30, "max_position_embeddings": 14, "bos_token_id": 2, "eos_token_id": 3}
    vision = {**size, "image_size": 16, "patch_size": 16}
    torch.manual_seed(1)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    WordTokenizer(tokenizer).save(folder)
    preparation = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))


def make_prompting(folder: Path | None = None, pooling: str = "mean") -> prompting.Recipe:
    """Prompts around a VideoCLIP of ours."""
    options = prompting.Options(prefix=2, postfix=2, frames=3, heads=2, symmetric=True)
    return prompting.prompted(options, VideoCLIP(replace(CONFIG, pooling=pooling)))


MAKERS: dict[str, Callable[[Path, str], nn.Module]] = {
    "videoclip": lambda _, pooling: videoclip.Recipe(replace(CONFIG, pooling=pooling)),
    "margin": lambda _, pooling: margin.Recipe(replace(CONFIG, pooling=pooling)),
    "fusion": lambda _, pooling: FusionRecipe(replace(FUSION, pooling=pooling)),
    "alignment": lambda _, pooling: alignment.Recipe(
        alignment.AlignmentConfig(**{**vars(CONFIG), "pooling": pooling}, joint_layers=1)
    ),
    "frozen-in-time": make_frozen_in_time,
    "alpro": make_alpro,
    "prompting": make_prompting,
    "towers": make_towers,
}
NAMES = tuple(MAKERS)
PAIRED = tuple(name for name in NAMES if name != "alignment")  # trained from pairs; it is trained from stretches
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


def batch_of(name: str, number: int = 0, rank: int | None = None) -> ClipBatch | StretchBatch:
    """The same pairs as each recipe has them in shards: rows of 8 numbers, or frames; as stretches of one sentence."""
    batch = global_batch(number)
    if name == "alignment":
        said = torch.stack([torch.zeros(10), (batch.video_tokens.lengths / 2).ceil()], 1)
        return StretchBatch(batch.video_tokens, batch.word_ids, (1,) * 10, said, batch.video)
    if name in FRAMES:
        generator = torch.Generator().manual_seed(number)
        rows = torch.randint(0, 256, (len(batch.video_tokens.rows), SIZE * SIZE * 3), generator=generator)
        batch = replace(batch, video_tokens=batch.video_tokens.with_rows(rows.half()))
    return share_of(batch, rank)


@torch.no_grad()
def embedded(model: nn.Module, batch: ClipBatch | StretchBatch) -> tuple[Tensor, Tensor]:
    """Both sides of a batch."""
    return model.embed_video(batch.video_tokens), model.embed_text(batch.word_ids)
