"""What every recipe must be, and whose absence nobody would hear. Two workers that equal one: `test_workers.py`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.small_recipes import NAMES, batch_of, clip_of, embedded, make
from videoclip.checkpoints import TrainingState, load_checkpoint, save_checkpoint
from videoclip.errors import InputError
from videoclip.evaluation.reranking import Judge, judge_of
from videoclip.recipes import from_pretrained, recipe_named
from videoclip.training import OptimizerConfig, make_optimizer, step

every_recipe = pytest.mark.parametrize("name", NAMES)
LOSSES = {"fusion": {"vtc", "vtm", "mlm"}, "alpro": {"vtc", "vtm", "mlm", "pem"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, name: str, folder: Path, number: int
) -> dict[str, float]:
    torch.manual_seed(number)  # masks, negatives and crops, dropout where there is any
    return step(model.train(), optimizer, batch_of(name, number), 3e-3, 20.0)


@every_recipe
def test_thirty_steps_lower_every_loss(name: str, folder: Path) -> None:
    model = make(name, folder)
    optimizer = make_optimizer(model, OptimizerConfig())
    noted = [update(model, optimizer, name, folder, 0) for _ in range(30)]
    for loss in {"loss"} | LOSSES.get(name, set()):
        assert noted[-1][loss] < noted[0][loss], loss
    if name in LOSSES:
        assert noted[0]["loss"] == pytest.approx(sum(noted[0][loss] for loss in LOSSES[name]), rel=1e-5)


@every_recipe
def test_every_trained_parameter_has_a_gradient_and_no_frozen_one_moves(name: str, folder: Path) -> None:
    model = make(name, folder)
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.1))
    moved = {key: torch.zeros(()) for key in trained}
    for number in range(2):  # what begins at zero hides what is before it from the first step
        update(model, optimizer, name, folder, number)
        for key, parameter in trained.items():
            moved[key] += 0 if parameter.grad is None else parameter.grad.abs().sum()
    # Softmax does not feel the biases of keys; the margin knows no temperature.
    unfelt = ("key.bias", "temperature") if name == "margin" else ("key.bias",)
    assert [key for key, total in moved.items() if not total and not key.endswith(unfelt)] == []
    for key, value in model.state_dict().items():
        if key not in trained and key not in ("steps_done", "steps"):
            assert torch.equal(value, before[key]), key


@every_recipe
def test_batch_composition_changes_nothing(name: str, folder: Path) -> None:
    """Nor does padding: sequences are packed, and a neighbour's length is all that could be padded to."""
    model, batch = make(name, folder).eval(), batch_of(name)
    order = torch.tensor([4, 9, 1])
    fewer = replace(batch, video_tokens=batch.video_tokens.take(order), word_ids=batch.word_ids.take(order))
    for few, all_of_them in zip(embedded(model, fewer), embedded(model, batch)):
        torch.testing.assert_close(few, all_of_them[order], rtol=1e-5, atol=1e-6)
    if isinstance(model, Judge):
        torch.testing.assert_close(judged(model, fewer), judged(model, batch)[order], rtol=1e-5, atol=1e-6)


@every_recipe
def test_every_word_and_every_frame_is_looked_at_from_both_sides(name: str, folder: Path) -> None:
    """No accidental causality: [CLS], the first of all, feels the last word and the last row of a clip.

    (The text sides of CLIPs are causal, and are read at their end.)
    """
    model, batch = make(name, folder, pooling="cls").eval(), batch_of(name)
    text, clip = batch.word_ids.take(torch.tensor([5])), batch.video_tokens.take(torch.tensor([3]))
    clip = clip.with_rows(clip.rows)
    clip = type(clip)(clip.rows[:1].repeat(2, 1), torch.tensor([2]))
    with torch.no_grad():
        plain, plain_clip = model.embed_text(text), model.embed_video(clip)
        for place in range(1, int(text.lengths[0]) - 1):
            ids = text.rows.clone()
            ids[place] = 6 if int(ids[place]) != 6 else 7
            assert float((model.embed_text(text.with_rows(ids)) - plain).abs().max()) > 1e-6, place
        for place in range(2):
            rows = clip.rows.clone()
            rows[place] = 255 - rows[place]
            assert float((model.embed_video(clip.with_rows(rows)) - plain_clip).abs().max()) > 1e-6, place


@every_recipe
def test_a_resumed_run_goes_on_as_if_nothing_had_been(name: str, folder: Path, tmp_path: Path) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> float:
        return [update(model, optimizer, name, folder, number)["loss"] for number in numbers][-1]

    straight = make(name, folder)
    expected = run(straight, make_optimizer(straight, OptimizerConfig()), range(4))
    first = make(name, folder)
    optimizer = make_optimizer(first, OptimizerConfig())
    run(first, optimizer, range(2))
    save_checkpoint(tmp_path, first, optimizer, TrainingState(0, 2), {})
    second = make(name, folder)
    optimizer = make_optimizer(second, OptimizerConfig())
    load_checkpoint(tmp_path, second, optimizer, {})
    assert run(second, optimizer, range(2, 4)) == expected


@every_recipe
def test_a_saved_model_is_the_same_when_its_folder_is_read(name: str, folder: Path, tmp_path: Path) -> None:
    model, batch = make(name, folder).eval(), batch_of(name)
    if name == "towers":
        model.frozen.video_encoder = clip_of(folder)
    model.save_pretrained(tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    assert type(loaded) is recipe_named(name).Recipe and loaded.config == model.config
    for ours, theirs in zip(embedded(loaded, batch), embedded(model, batch)):
        assert torch.equal(ours, theirs)
    if isinstance(model, Judge):
        assert torch.equal(judged(loaded, batch), judged(model, batch))
    else:
        with pytest.raises(InputError, match="was not trained to match"):
            judge_of(loaded)


@torch.no_grad()
def judged(model: nn.Module, batch: object) -> Tensor:
    """Logits of a batch's own pairs."""
    states = model.text_states(batch.word_ids), model.video_states(batch.video_tokens)
    return model.matching_logits(*states)
