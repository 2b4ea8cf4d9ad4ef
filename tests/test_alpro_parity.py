"""ALPRO's public release, in our model: the same numbers, and every published name."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.cli import main
from videoclip import convert
from videoclip.data.words import WordTokenizer
from videoclip.errors import InputError
from videoclip.losses import contrastive_loss, mean_cross_entropy
from videoclip.packed import Packed
from videoclip.parts.fusion import first_rows, from_even
from videoclip.parts.masked_words import NOT_MASKED
from videoclip.parts.matching import matching_pairs
from videoclip.parts.prompter import entity_loss, kept_labels
from videoclip.recipes import from_pretrained
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
    similar = tiny.projected_video(video), tiny.projected_text(words)
    same(contrastive_loss(*similar, tiny.temp) / 2, expected["itc_loss"].float())

    negatives = expected["negative_videos_of_texts"], expected["negative_texts_of_videos"]
    texts, videos, labels = matching_pairs(words, from_even(video), *negatives)
    fused = tiny.fused(texts, videos)
    logits = tiny.itm_head(first_rows(fused))
    # The release judges the negatives of videos before those of texts; the loss is a mean over all.
    theirs = expected["itm_scores"]
    assert min(float((logits[:, None] - theirs).abs().amax(2).amin(1).max()), 1.0) < 1e-5
    same(logits[:3], theirs[:3])
    same(mean_cross_entropy(logits, labels), expected["itm_loss"].float())

    hidden = Packed.from_padded(expected["input_mlm_text_input_ids"], mask)
    word_labels = expected["input_mlm_labels"][mask.bool()]
    assert bool((word_labels != NOT_MASKED).any())
    scores = tiny.word_scores(hidden, from_even(video))
    same(scores, expected["mlm_scores"][mask.bool()])
    same(mean_cross_entropy(scores, word_labels), expected["mlm_loss"].float())

    entities = tiny.entity_logits(
        fused.take(torch.arange(3)), expected["input_mpm_mask"] == 0
    )  # theirs is 1 outside the crop
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


# --- Other tasks and other files --------------------------------------------------------------------------------------


def test_pretraining_starts_retrieval_and_answering_as_the_release_does(tiny_file: Path, tiny: Recipe) -> None:
    longer = convert.from_alpro(tiny_file, heads=3, task="retrieval", frames=4)
    times = longer.visual_encoder.model.time_embed[0]
    assert torch.equal(times, tiny.visual_encoder.model.time_embed[0].repeat_interleave(2, 0)), "each twice"
    assert longer.prompter is None and longer.config.losses == ("vtc", "vtm", "mlm")
    larger = convert.from_alpro(tiny_file, heads=3, task="retrieval", size=64)
    places = larger.visual_encoder.model.pos_embed[0]
    assert torch.equal(places[1:], tiny.visual_encoder.model.pos_embed[0, 1:].repeat_interleave(4, 0))
    answering = convert.from_alpro(tiny_file, heads=3, task="answering", answers=7, frames=4)
    questions = Packed.of([torch.tensor([1, 5, 2])])
    assert answering.answer_scores(torch.randn(1, 4, 3, 32, 32), questions).shape == (1, 7)
    with pytest.raises(InputError, match="say how many answers"):
        convert.from_alpro(tiny_file, heads=3, task="answering")


def test_files_of_another_task_or_of_something_else_are_refused(tiny_file: Path, tmp_path: Path) -> None:
    state = torch.load(tiny_file)
    kept = {k: v for k, v in state.items() if not k.startswith(("prompter.", "mpm_head"))}
    torch.save(kept, tmp_path / "retrieval.pt")
    assert convert.from_alpro(tmp_path / "retrieval.pt", heads=3).config.losses == ("vtc", "vtm", "mlm")
    with pytest.raises(InputError, match="a checkpoint of retrieval, not of pretraining"):
        convert.from_alpro(tmp_path / "retrieval.pt", heads=3, task="pretraining")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not an ALPRO checkpoint"):
        convert.from_alpro(tmp_path / "other.pt")
    del kept["visual_encoder.model.blocks.1.temporal_fc.bias"]
    kept["extra"] = torch.zeros(1)
    torch.save(kept, tmp_path / "broken.pt")
    with pytest.raises(InputError, match=r"1 missing: .*temporal_fc.bias; 1 unknown: extra"):
        convert.from_alpro(tmp_path / "broken.pt", heads=3)
    with pytest.raises(InputError, match="no such weights file"):
        convert.from_alpro(tmp_path / "nothing.pt")


def test_half_precision_restore_points_are_read(tiny_file: Path, tiny: Recipe, tmp_path: Path) -> None:
    halves = {k: v.half() if v.is_floating_point() else v for k, v in torch.load(tiny_file).items()}
    torch.save({"global_step": 3, "model_state_dict": halves, "optim_state_dict": {}}, tmp_path / "restore.pt")
    restored = convert.from_alpro(tmp_path / "restore.pt", heads=3)
    assert restored.vision_proj.weight.dtype == torch.float32
    torch.testing.assert_close(restored.vision_proj.weight, tiny.vision_proj.weight, rtol=1e-3, atol=1e-4)


def test_frames_that_the_model_does_not_read_are_refused(tiny: Recipe) -> None:
    with pytest.raises(InputError, match="64 x 64 pixels; this model reads 32 x 32"):
        tiny.video_features(torch.zeros(1, 2, 3, 64, 64))
    with pytest.raises(InputError, match="3 frames; this model has time embeddings for 2"):
        tiny.video_features(torch.zeros(1, 3, 3, 32, 32))


def test_a_checkpoint_becomes_a_model_folder_from_the_command_line(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for words in (60, 50):
        ids = {word: number for number, word in enumerate([*special, *(f"w{n}" for n in range(words - 5))])}
        WordTokenizer(Tokenizer(models.WordLevel(ids, "[UNK]"))).save(tmp_path / str(words))
    command = ["convert", "alpro", str(tiny_file), str(tmp_path / "model"), "--heads", "3", "--tokenizer"]
    assert main([*command, str(tmp_path / "50")]) == 2
    assert "knows 50 words but the checkpoint 60" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "60")]) == 0
    assert "2 frames of 32 x 32; vtc, vtm, mlm, pem" in capsys.readouterr().out
    loaded, read = from_pretrained(tmp_path / "model"), convert.from_alpro(tiny_file, heads=3)
    assert isinstance(loaded, Recipe) and loaded.prompter is not None and read.prompter is not None
    frames = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded.video_features(frames), read.video_features(frames))
        assert torch.equal(loaded.prompter.soft_labels(frames), read.prompter.soft_labels(frames))
