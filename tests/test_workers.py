"""Training on several workers is training on one: the same updates, whoever holds which pairs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from videoclip.data.clips import ClipBatch
from videoclip.gather import gather, gather_with_gradient
from videoclip.model import VideoCLIPConfig
from videoclip.packed import Packed
from videoclip.recipes import RECIPES, recipe_named
from videoclip.recipes.fusion import FusionConfig
from videoclip.retrieval.false_negatives import FalseNegativeConfig, pair_labels
from videoclip.training import step

CONFIG = VideoCLIPConfig(
    video_dimension=8, width=16, layers=1, heads=2, intermediate=32, vocabulary=30, cls_id=2, sep_id=3, dropout=0.0
)
FUSION = FusionConfig(**vars(CONFIG), fusion_layers=1, mask_id=4, special_ids=(0, 1, 2, 3, 4), masked_share=0.4)
SHARES = (slice(0, 6), slice(6, 10))  # unequal
DUPLICATES = np.array([0, 0, 2, 3, 4])  # videos 0 and 1 are the same
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


def train(recipe_name: str, rank: int | None) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Three updates through `step` itself; figures of each and the weights after them."""
    torch.manual_seed(0)
    recipe = recipe_named(recipe_name).Recipe(FUSION if recipe_name == "fusion" else CONFIG).train()
    module = recipe if rank is None else DistributedDataParallel(recipe)
    # Adam would scale up the rounding of gradients that are nearly zero.
    optimizer = torch.optim.SGD(recipe.parameters(), RATE, momentum=0.9)
    figures = [step(module, optimizer, share_of(global_batch(n), rank), RATE, CLIP_NORM) for n in range(STEPS)]
    return figures, recipe.state_dict()


def _worker(rank: int, folder: str, recipe_name: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = torch.full((1 + rank, 1), float(rank))
    for gathered in (gather(own), gather_with_gradient(own)):  # whose counts they ask the workers for themselves
        assert gathered.tolist() == [[0.0], [1.0], [1.0]]
    torch.save(train(recipe_name, rank), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("recipe_name", ["videoclip", "margin", "fusion"])
def test_two_workers_with_unequal_shares_update_as_one_does(recipe_name: str, tmp_path: Path) -> None:
    """Negatives of all workers, exclusions, the learned temperature and clipping included; and, where a recipe has
    them, the negatives that matching draws and the words that are hidden."""
    multiprocessing.spawn(_worker, (str(tmp_path), recipe_name), nprocs=2)
    figures, weights = train(recipe_name, None)
    assert figures[0]["excluded"] > 0 and figures[0]["gradient_norm"] > CLIP_NORM
    if recipe_name == "videoclip":
        assert weights["log_temperature"] != torch.tensor(CONFIG.temperature).log(), "it is learned"
    for rank in range(2):
        of_worker, its_weights = torch.load(tmp_path / f"{rank}.pt")
        for alone, together in zip(figures, of_worker):
            assert together == pytest.approx(alone, abs=1e-5, rel=1e-5), "metrics are those of all workers"
        for name, value in weights.items():
            torch.testing.assert_close(its_weights[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_every_recipe_of_the_table_can_be_imported_and_keeps_the_seam() -> None:
    for name in RECIPES:
        recipe = recipe_named(name)
        assert all(hasattr(recipe, part) for part in ("Options", "Recipe", "build")), name
