"""CE and MoEE are the public release's, number by number, and its files are read whole."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from videoclip.convert import from_collaborative_experts
from videoclip.convert.collaborative_experts import _config
from videoclip.errors import InputError
from videoclip.packed import Packed
from videoclip.recipes.experts import Experts, ExpertsConfig

FIXED = {"imagenet.resnext101_32x48d.0": "input_imagenet", "r2p1d.r2p1d-ig65m.0": "input_r2p1d"}


def by_name(name: str, shape: tuple[int, ...]) -> Tensor:
    """The release's weights, made from their names as the reference's README says."""
    if not shape:
        return torch.tensor(0)
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        z = 1 + 0.02 * np.abs(z)
    elif name.endswith(("running_mean", "bias")):
        z = 0.02 * z
    elif name.endswith("weight") and len(shape) == 1:
        z = 1 + 0.02 * z
    else:
        z = z / np.sqrt(shape[-1])
    return torch.from_numpy(z.astype(np.float32))


def names_and_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return {name: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for name, shape, _ in rows}


def saved(path: Path, state: Mapping[str, Tensor]) -> Path:
    """As the release saves: the old format, with things of its own beside the tensors."""
    torch.save(
        {"arch": "CENet", "epoch": 9, "state_dict": dict(state), "config": Path("a/config.json")},
        path,
        _use_new_zipfile_serialization=False,
    )
    return path


def clips(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    experts = {name: torch.from_numpy(arrays[key]) for name, key in FIXED.items()}
    experts["audio"] = torch.from_numpy(arrays["input_audio"])
    present = {name: torch.ones(4, dtype=torch.bool) for name in FIXED}
    present["audio"] = torch.from_numpy(arrays["input_audio_present"])
    return experts, present, torch.from_numpy(arrays["input_text"][:, 0])


@pytest.mark.parametrize("kind", ["ce", "moee"])
def test_similarities_are_the_releases(reference: Path, tmp_path: Path, kind: str) -> None:
    shapes = names_and_shapes(reference / f"teachtext_{kind}_tiny_keys.tsv")
    path = saved(tmp_path / "trained_model.pth", {name: by_name(name, shape) for name, shape in shapes.items()})
    arrays = np.load(reference / "teachtext_cenet_tiny.npz")
    for mode in ("eval", "train"):
        model = from_collaborative_experts(path).train(mode == "train")
        expected = torch.from_numpy(arrays[f"{kind}_{mode}_sims"])
        found = model.similarities(*clips(arrays)).detach()
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_published_sizes_have_the_published_names(reference: Path) -> None:
    shapes = names_and_shapes(reference / "teachtext_ceplus_msrvtt_keys.tsv")
    widths = {"audio": 128, "imagenet.a": 2048, "imagenet.b": 2048, "r2p1d.a": 512, "r2p1d.b": 512, "scene": 2208}
    config = ExpertsConfig.of({**widths, "speech": 300}, 1600, {"audio": 8, "speech": 19})
    with torch.device("meta"):
        model = Experts(config)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == 262_731_071
    read = _config(Path("x"), {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    with torch.device("meta"):  # what the file alone says of itself makes the same names
        assert {name: tuple(tensor.shape) for name, tensor in Experts(read).state_dict().items()} == shapes


def random_checkpoint(path: Path, collaborative: bool) -> tuple[Path, Experts]:
    config = ExpertsConfig.of(
        {"face": 6, "ocr": 5, "rgb": 7, "speech": 4}, 9, {"ocr": 3, "speech": 2}, 8, 4, 0, collaborative
    )
    torch.manual_seed(3)
    model = Experts(config).eval()
    return saved(path, model.state_dict()), model


@pytest.mark.parametrize("collaborative", [True, False])
def test_other_sizes_are_read_off_the_tensors(tmp_path: Path, collaborative: bool) -> None:
    path, model = random_checkpoint(tmp_path / "model.pth", collaborative)
    read = from_collaborative_experts(path)
    experts = {"face": torch.randn(3, 6), "rgb": torch.randn(3, 7)}
    experts |= {"ocr": torch.randn(3, 6, 5), "speech": torch.randn(3, 2, 4)}
    text = torch.randn(5, 7, 9)
    found = read.similarities(experts, {}, text)
    assert found.shape == (5, 3) and torch.equal(found, model.similarities(experts, {}, text))


def test_what_stands_in_the_place_of_a_missing_expert_is_not_looked_at(tmp_path: Path) -> None:
    _, model = random_checkpoint(tmp_path / "model.pth", True)
    experts = {"face": torch.randn(3, 6), "rgb": torch.randn(3, 7)}
    experts |= {"ocr": torch.randn(3, 6, 5), "speech": torch.randn(3, 2, 4)}
    present = {"face": torch.tensor([1.0, 0.0, 1.0]), "ocr": torch.tensor([True, False, True])}
    expected = model.similarities(experts, present, torch.ones(1, 2, 9))
    experts["face"][1], experts["ocr"][1] = float("nan"), 7.0
    assert torch.equal(model.similarities(experts, present, torch.ones(1, 2, 9)), expected)


def test_a_model_with_masks_does_not_see_padding_and_the_released_one_does() -> None:
    torch.manual_seed(0)
    config = ExpertsConfig.of({"audio": 5, "rgb": 7}, 9, {"audio": 3}, 8, 4, 1)
    model = Experts(config).eval()
    audio, words = torch.randn(2, 4, 5), torch.randn(3, 6, 9)
    audio[0, 2:], words[1, 3:] = 0, 0
    rgb = torch.randn(2, 7)
    packed = {"audio": Packed.of([audio[0, :2], audio[1]]), "rgb": rgb}
    text = Packed.of([words[0], words[1, :3], words[2]])
    with_zeros = model.similarities({"audio": audio, "rgb": rgb}, {}, words)
    without = model.similarities(packed, {}, text)
    assert (with_zeros - without).abs().max() > 1e-3
    assert torch.allclose(with_zeros[[0, 2]][:, 1], without[[0, 2]][:, 1], atol=1e-6)  # where nothing was padded
    missing = {"audio": torch.tensor([True, False])}
    nothing = {"audio": Packed(audio[0, :2], torch.tensor([2, 0])), "rgb": rgb}
    assert torch.equal(model.similarities(packed, missing, text), model.similarities(nothing, missing, text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ocr": torch.ones(3, 6, 4)}, "expert ocr: rows of shape .* rows 5 wide"),
        ({"rgb": torch.ones(3, 8)}, "expert rgb: 8 wide, but this model takes 7"),
        ({"rgb": torch.full((3, 7), float("nan"))}, "expert rgb: holds values that are not finite"),
        ({"more": torch.ones(3, 8)}, "takes the experts face, ocr, rgb, speech, not"),
        ({"rgb": None}, "takes the experts face, ocr, rgb, speech, not face, ocr, speech"),
    ],
)
def test_experts_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    _, model = random_checkpoint(tmp_path / "model.pth", True)
    experts = {"face": torch.ones(3, 6), "rgb": torch.ones(3, 7)}
    experts |= {"ocr": torch.ones(3, 6, 5), "speech": torch.ones(3, 2, 4)}
    changed = {name: value for name, value in {**experts, **change}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        model.similarities(changed, {}, torch.ones(1, 2, 9))
    with pytest.raises(InputError, match="video 1 of these 3 has no expert at all"):
        model.similarities(experts, {name: torch.tensor([1, 0, 1]) for name in experts}, torch.ones(1, 2, 9))


def test_wrong_files_are_refused_and_what_is_wrong_is_listed(tmp_path: Path) -> None:
    path, model = random_checkpoint(tmp_path / "model.pth", True)
    state = model.state_dict()
    extra = {**state, "ce.video_GU.0.cg.extra": torch.ones(1), "ce.moe_cg.fc.weight": torch.ones(2)}
    with pytest.raises(InputError, match=r"model.pth: .*1 unknown: ce.video_GU.0.cg.extra"):
        from_collaborative_experts(saved(path, extra))
    with pytest.raises(InputError, match=r"1 missing: ce.g_reason_1.bias"):
        from_collaborative_experts(saved(path, {k: v for k, v in state.items() if k != "ce.g_reason_1.bias"}))
    with pytest.raises(InputError, match=r"1 of another shape: ce.g_reason_1.weight"):
        from_collaborative_experts(saved(path, {**state, "ce.g_reason_1.weight": torch.ones(8, 8)}))
    with pytest.raises(InputError, match=r"missing 'ce.moe_fc.weight'"):
        from_collaborative_experts(saved(path, {k: v for k, v in state.items() if "moe" not in k}))
    with pytest.raises(InputError, match="tensors by name"):
        from_collaborative_experts(saved(path, {}))
