"""ALPRO's public release, in our model: the same numbers, and every published name."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from videoclip import convert
from videoclip.packed import Packed
from videoclip.parts.masked_words import NOT_MASKED
from videoclip.parts.matching import matching_loss
from videoclip.parts.prompter import entity_loss, kept_labels
from videoclip.recipes.alpro import Recipe


def weight_by_name(name: str, shape: tuple[int, ...]) -> Tensor:
    """Every reference tensor is made from its own name."""
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("bias"):
        z = 0.02 * z
    elif len(shape) == 0:
        z = np.float32(0.07)
    elif len(shape) == 1:
        z = 1 + 0.02 * z
    else:
        z = z / np.sqrt(shape[-1])
    return torch.as_tensor(z, dtype=torch.float32)


def published(reference: Path, name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    rows = [line.split("\t") for line in (reference / f"alpro_{name}_keys.tsv").read_text().splitlines()]
    return {n: (() if s == "scalar" else tuple(int(k) for k in s.split("x")), kind) for n, s, kind in rows}


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import REFERENCE

    if not REFERENCE.is_dir():
        pytest.skip(f"no reference data at {REFERENCE} (set VIDEOCLIP_REFERENCE)")
    path = tmp_path_factory.mktemp("alpro") / "alpro_pretrained_ckpt.pt"
    state = {}
    for name, (shape, kind) in published(REFERENCE, "tiny").items():
        state[name] = torch.zeros(shape, dtype=torch.int64) if kind == "int64" else weight_by_name(name, shape)
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def tiny(tiny_file: Path) -> Recipe:
    return convert.from_alpro(tiny_file, heads=3)


@pytest.fixture
def expected(reference: Path) -> dict[str, Tensor]:
    stored = np.load(reference / "alpro_tiny.npz")
    return {name: torch.from_numpy(stored[name]) for name in stored}


def same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@torch.inference_mode()
def test_tokens_and_features_are_the_releases(tiny: Recipe, expected: dict[str, Tensor]) -> None:
    frames, ids, mask = (expected[f"input_{n}"] for n in ("visual_inputs", "text_input_ids", "text_input_mask"))
    seen = tiny.visual_encoder.model(frames)
    patches = seen.patches.transpose(1, 2).flatten(1, 2)  # the release: patch by patch, its frames in turn
    same(torch.cat([seen.special, patches], 1), expected["all_video_tokens"])
    same(tiny.video_tokens(frames), expected["temporal_pooled_video"])
    words = tiny.text_tokens(Packed.from_padded(ids, mask))
    same(words.rows, expected["text_embeds"][mask.bool()])
    same(tiny.video_features(frames), expected["video_feat"])
    same(tiny.text_features(ids, mask), expected["text_feat"])


@torch.inference_mode()
def test_prompts_and_pseudo_labels_are_the_releases(tiny: Recipe, expected: dict[str, Tensor]) -> None:
    assert tiny.prompter is not None
    ids = expected["input_prompt_ids"].unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)  # theirs: by template
    tiny.prompter.set_prompts(Packed.from_padded(ids, torch.ones_like(ids)))
    same(tiny.prompter.video_prompt_feat, expected["prompt_feat"])
    norms = tiny.prompter.video_prompt_feat.norm(dim=1)
    assert bool((norms < 0.99).all()), "averaged templates are not made unit again"
    q = tiny.prompter.soft_labels(expected["input_crop_visual_inputs"])
    same(q, expected["pseudo_labels"])
    assert torch.equal(~kept_labels(q, "probability"), expected["intended_ignored"])
    assert torch.equal(~kept_labels(q, "release"), expected["release_ignored"])


@torch.inference_mode()
def test_all_four_losses_are_the_releases(tiny: Recipe, expected: dict[str, Tensor]) -> None:
    frames, ids, mask = (expected[f"input_{n}"] for n in ("visual_inputs", "text_input_ids", "text_input_mask"))
    video, words = tiny.video_tokens(frames), tiny.text_tokens(Packed.from_padded(ids, mask))
    same(tiny.contrast(tiny.projected_video(video), tiny.projected_text(words)), expected["itc_loss"].float())

    negatives = expected["negative_videos_of_texts"], expected["negative_texts_of_videos"]
    fused, logits, labels = tiny.matched(words, video, *negatives)
    # The release judges the negatives of videos before those of texts; the loss is a mean over all.
    theirs = expected["itm_scores"]
    assert min(float((logits[:, None] - theirs).abs().amax(2).amin(1).max()), 1.0) < 1e-5
    same(logits[:3], theirs[:3])
    same(matching_loss(logits, labels), expected["itm_loss"].float())

    hidden = Packed.from_padded(expected["input_mlm_text_input_ids"], mask)
    word_labels = expected["input_mlm_labels"][mask.bool()]
    assert bool((word_labels != NOT_MASKED).any())
    same(tiny.word_scores(hidden, video), expected["mlm_scores"][mask.bool()])
    same(tiny.hidden_words(hidden, word_labels, video), expected["mlm_loss"].float())

    entities = tiny.entity_logits(fused, expected["input_mpm_mask"] == 0)  # theirs is 1 outside the crop
    same(entities, expected["mpm_logits"])
    kept = torch.ones(3, dtype=torch.bool)
    same(entity_loss(entities, expected["pseudo_labels"], kept), expected["mpm_loss"].float())


@torch.inference_mode()
def test_matching_scores_judge_padded_pairs(tiny: Recipe, expected: dict[str, Tensor]) -> None:
    frames, ids, mask = (expected[f"input_{n}"] for n in ("visual_inputs", "text_input_ids", "text_input_mask"))
    same(tiny.matching_scores(frames, ids, mask), expected["itm_scores"][:3])
    scores = tiny.matching_scores(frames[1:2], ids[1:2], mask[1:2])
    same(scores, expected["itm_scores"][1:2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "retrieval", "qa"])
def test_every_published_name_is_loaded_or_known_to_be_unused(name: str, reference: Path, tmp_path: Path) -> None:
    """On tensors of the published shapes that hold one value each, so that the file is small."""
    shapes = published(reference, name)
    state = {}
    for number, (key, (shape, kind)) in enumerate(shapes.items()):
        state[key] = (
            torch.tensor(float(number) * 1e-4).expand(shape).to(torch.int64 if kind == "int64" else torch.float16)
        )
    if "text_encoder.cls.predictions.decoder.weight" in state:
        state["text_encoder.cls.predictions.decoder.weight"] = state[
            "text_encoder.bert.embeddings.word_embeddings.weight"
        ]
    torch.save(state, tmp_path / "model.pt")
    model = convert.from_alpro(tmp_path / "model.pt")
    loaded = {key.replace("predictions.bias", "predictions.decoder.bias") for key in model.state_dict()}
    bare = {key.replace("text_encoder.bert.", "text_encoder.") for key in loaded}
    left = set(shapes) - loaded - (bare if name == "qa" else set())
    assert all(
        key.endswith(("head.weight", "head.bias", "position_ids"))
        or "cls.predictions.bias" in key
        or "predictions.decoder.weight" in key  # the word embeddings themselves
        or key.startswith(("prompter.text_encoder.cls", "prompter.text_encoder.bert.encoder.layer"))
        for key in left
    ), sorted(left)
    vision = model.shape.vision
    assert (vision.size, vision.patch, vision.heads, model.shape.text_layers) == (224, 16, 12, 6)
    assert vision.frames == {"pretrain": 4, "retrieval": 8, "qa": 16}[name]
    assert sum(p.numel() for p in model.parameters()) > 2e8
