"""Training on several workers is training on one: the same updates, whoever holds which pairs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from videoclip.data.clips import ClipBatch
from videoclip.data.words import WordTokenizer
from videoclip.encoders.image import ImageEncoder
from videoclip.gather import gather, gather_with_gradient
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.packed import Packed
from videoclip.recipes import RECIPES, recipe_named, towers
from videoclip.recipes.fusion import FusionConfig
from videoclip.recipes.prompting import Options, prompted
from videoclip.retrieval.false_negatives import FalseNegativeConfig, pair_labels
from videoclip.training import step

CONFIG = VideoCLIPConfig(
    video_dimension=8, width=16, layers=1, heads=2, intermediate=32, vocabulary=30, cls_id=2, sep_id=3, dropout=0.0
)
FUSION = FusionConfig(**vars(CONFIG), fusion_layers=1, mask_id=4, special_ids=(0, 1, 2, 3, 4), masked_share=0.4)
SHARES = (slice(0, 6), slice(6, 10))  # unequal
DUPLICATES = np.array([0, 0, 2, 3, 4])  # videos 0 and 1 are the same
TRAINED = ("videoclip", "margin", "fusion", "prompting", "towers")
STEPS, RATE, CLIP_NORM = 3, 0.05, 0.4  # a norm that does clip


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


def make_recipe(name: str, folder: Path) -> nn.Module:
    """A small new recipe, with the same first weights everywhere."""
    torch.manual_seed(0)
    if name == "prompting":
        return prompted(Options(prefix=2, postfix=2, frames=3, heads=2, symmetric=True), VideoCLIP(CONFIG))
    if name == "towers":
        encoder = ImageEncoder.from_pretrained(str(folder / "clip"))
        options = towers.Options(hidden_width=16, layers=1, heads=2, penalty=0.5, max_seconds=8, temperature=0.02)
        return towers.around(encoder, options)
    return recipe_named(name).Recipe(FUSION if name == "fusion" else CONFIG)


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


def train(recipe_name: str, rank: int | None, folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Three updates through `step` itself; figures of each and the weights after them."""
    recipe = make_recipe(recipe_name, folder).train()
    module = recipe if rank is None else DistributedDataParallel(recipe)
    # Adam would scale up the rounding of gradients that are nearly zero.
    trained = [parameter for parameter in recipe.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE, momentum=0.9)
    torch.manual_seed(0)  # what matching and hiding draw
    figures = [step(module, optimizer, share_of(global_batch(n), rank), RATE, CLIP_NORM) for n in range(STEPS)]
    return figures, recipe.state_dict()


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = torch.full((1 + rank, 1), float(rank))
    for gathered in (gather(own), gather_with_gradient(own)):  # whose counts they ask the workers for themselves
        assert gathered.tolist() == [[0.0], [1.0], [1.0]]
    for name in TRAINED:
        torch.save(train(name, rank, Path(folder)), f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers made of every recipe, in files NAME-RANK.pt."""
    folder = tmp_path_factory.mktemp("workers")
    write_clip(folder / "clip")
    multiprocessing.spawn(_worker, (str(folder),), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe_name", TRAINED)
def test_two_workers_with_unequal_shares_update_as_one_does(recipe_name: str, of_workers: Path) -> None:
    """Negatives of all workers, exclusions, the learned temperature and clipping included; and, where a recipe has
    them, the negatives that matching draws, the words that are hidden and the penalty."""
    figures, weights = train(recipe_name, None, of_workers)
    assert figures[0]["excluded"] > 0 and figures[0]["gradient_norm"] > CLIP_NORM
    if recipe_name in ("videoclip", "towers"):
        first = make_recipe(recipe_name, of_workers).state_dict()["log_temperature"]
        assert weights["log_temperature"] != first, "it is learned"
    for rank in range(2):
        of_worker, its_weights = torch.load(of_workers / f"{recipe_name}-{rank}.pt")
        for alone, together in zip(figures, of_worker):
            assert together == pytest.approx(alone, abs=1e-5, rel=1e-5), "metrics are those of all workers"
        for name, value in weights.items():
            torch.testing.assert_close(its_weights[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_every_recipe_of_the_table_can_be_imported_and_keeps_the_seam() -> None:
    for name in RECIPES:
        recipe = recipe_named(name)
        assert all(hasattr(recipe, part) for part in ("Options", "Recipe", "build")), name
