"""Training on several workers is training on one: the same updates, whoever holds which pairs."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from tests.small_recipes import NAMES, PAIRED, batch_of, make, write_clip
from videoclip.gather import gather, gather_with_gradient
from videoclip.recipes import RECIPES, recipe_named
from videoclip.training import step

STEPS, RATE, CLIP_NORM = 3, 0.05, 0.4  # a norm that does clip


def train(recipe_name: str, rank: int | None, folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Three updates through `step` itself; figures of each and the weights after them."""
    recipe = make(recipe_name, folder).train()
    module = recipe if rank is None else DistributedDataParallel(recipe)
    # Adam would scale up the rounding of gradients that are nearly zero.
    trained = [parameter for parameter in recipe.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE, momentum=0.9)
    torch.manual_seed(5 + (rank or 0))  # what is drawn follows from the first worker's
    figures = [step(module, optimizer, batch_of(recipe_name, n, rank), RATE, CLIP_NORM) for n in range(STEPS)]
    return figures, recipe.state_dict()


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = torch.full((1 + rank, 1), float(rank))
    for gathered in (gather(own), gather_with_gradient(own)):  # whose counts they ask the workers for themselves
        assert gathered.tolist() == [[0.0], [1.0], [1.0]]
    for name in PAIRED:
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
@pytest.mark.parametrize("recipe_name", PAIRED)
def test_two_workers_with_unequal_shares_update_as_one_does(recipe_name: str, of_workers: Path) -> None:
    """Negatives of all workers, exclusions, the learned temperature and clipping included; and, where a recipe has
    them, the negatives that matching draws, the words that are hidden, frames, crops, soft labels and the penalty."""
    figures, weights = train(recipe_name, None, of_workers)
    assert figures[0]["excluded"] > 0 and figures[0]["gradient_norm"] > CLIP_NORM
    if recipe_name in ("videoclip", "towers"):
        first = make(recipe_name, of_workers).state_dict()["log_temperature"]
        assert weights["log_temperature"] != first, "it is learned"
    for rank in range(2):
        of_worker, its_weights = torch.load(of_workers / f"{recipe_name}-{rank}.pt")
        for alone, together in zip(map(dict, figures), of_worker):
            if recipe_name == "towers":  # random towers embed all alike: which text is nearest is a matter of rounding
                for share in ("accuracy", "hard_negatives"):
                    del alone[share], together[share]
            assert together == pytest.approx(alone, abs=1e-5, rel=1e-5), "metrics are those of all workers"
        for name, value in weights.items():
            torch.testing.assert_close(its_weights[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_every_recipe_of_the_table_can_be_imported_and_keeps_the_seam() -> None:
    assert set(NAMES) == set(RECIPES), "a recipe without the tests that every recipe has to pass"
    for name in RECIPES:
        recipe = recipe_named(name)
        assert all(hasattr(recipe, part) for part in ("Options", "Recipe", "build")), name
