"""Training on several workers is training on one: the same updates, whoever holds which pairs."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from tests.small_recipes import CONFIG, NAMES, batch_of, make
from videoclip.gather import gather, gather_with_gradient
from videoclip.recipes import RECIPES, recipe_named
from videoclip.training import step

STEPS, RATE, CLIP_NORM = 3, 0.05, 0.4  # a norm that does clip


def train(name: str, folder: Path, rank: int | None) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Three updates through `step` itself; figures of each and the weights after them."""
    recipe = make(name, folder).train()
    module = recipe if rank is None else DistributedDataParallel(recipe)
    # Adam would scale up the rounding of gradients that are nearly zero.
    parameters = [parameter for parameter in recipe.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, RATE, momentum=0.9)
    torch.manual_seed(5 if rank is None else 5 + rank)  # what is drawn follows from the first worker's
    figures = [step(module, optimizer, batch_of(name, folder, n, rank), RATE, CLIP_NORM) for n in range(STEPS)]
    return figures, recipe.state_dict()


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = torch.full((1 + rank, 1), float(rank))
    for gathered in (gather(own), gather_with_gradient(own)):  # whose counts they ask the workers for themselves
        assert gathered.tolist() == [[0.0], [1.0], [1.0]]
    torch.save({name: train(name, Path(folder), rank) for name in NAMES}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_with_unequal_shares_update_as_one_does(tmp_path: Path) -> None:
    """Every recipe: negatives of all workers, exclusions, the learned temperature and clipping included; and, where a
    recipe has them, the negatives that matching draws, the words that are hidden, frames, crops and soft labels."""
    alone = {name: train(name, tmp_path, None) for name in NAMES}
    multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    together = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, (figures, weights) in alone.items():
        assert figures[0]["excluded"] > 0, name
        if name == "videoclip":
            assert figures[0]["gradient_norm"] > CLIP_NORM
            assert weights["log_temperature"] != torch.tensor(CONFIG.temperature).log(), "it is learned"
        for of_worker in together:
            its_figures, its_weights = of_worker[name]
            for one, other in zip(figures, its_figures):
                assert other == pytest.approx(one, abs=1e-5, rel=1e-4), f"{name}: metrics are those of all workers"
            for key, value in weights.items():
                torch.testing.assert_close(its_weights[key], value, rtol=1e-4, atol=2e-5, msg=f"{name}: {key}")


def test_every_recipe_of_the_table_can_be_imported_and_keeps_the_seam() -> None:
    assert set(NAMES) == set(RECIPES), "a recipe without the tests that every recipe has to pass"
    for name in RECIPES:
        recipe = recipe_named(name)
        assert all(hasattr(recipe, part) for part in ("Options", "Recipe", "build")), name
