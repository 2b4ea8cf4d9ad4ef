"""Recipes on frames, ALPRO and Frozen in Time: what they alone have to be; `test_recipe_properties.py` has the rest."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.small_recipes import ENTITIES, SIZE, TEXT, VISION, alpro_config, make_alpro, make_frozen_in_time
from videoclip.data.captions import Captions
from videoclip.data.clips import ClipBatch, ClipConfig, ClipSampler
from videoclip.data.frames import FrameBatch
from videoclip.data.shards import Manifest, Shards, ShardWriter, VideoRecord
from videoclip.data.words import train_wordpiece
from videoclip.embedding import embed_clips, embed_texts
from videoclip.encoders.catalog import make_video_encoder
from videoclip.errors import InputError
from videoclip.losses import IGNORED
from videoclip.packed import Packed
from videoclip.parts.fusion import from_even
from videoclip.parts.pixels import normalised
from videoclip.parts.prompter import Prompter, prompts
from videoclip.recipes import alpro, frozen_in_time
from videoclip.training import OptimizerConfig, make_optimizer, step

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


def frames_of(number: int = 0, pairs: int = 6) -> FrameBatch:
    """Clips that differ in colour and texts that differ in words."""
    generator = torch.Generator().manual_seed(number)
    colour = torch.randint(0, 255, (pairs, 1, 1, 1, 3), generator=generator)
    frames = (colour + torch.randint(0, 30, (pairs, 2, SIZE, SIZE, 3), generator=generator)).clamp(max=255).byte()
    words = [
        torch.cat([torch.tensor([2]), torch.randint(5, 30, (3 + i % 4,), generator=generator), torch.tensor([3])])
        for i in range(pairs)
    ]
    crops = torch.tensor([[i % 2, 0, 1, 2] for i in range(pairs)])
    return FrameBatch(frames, Packed.of(words), torch.Generator().manual_seed(number), crops)


@pytest.mark.parametrize("losses", [("vtc",), ("vtc", "vtm"), ("vtm", "mlm"), ("vtc", "vtm", "mlm")])
def test_with_fewer_losses_what_none_reaches_is_frozen(losses: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = alpro.Recipe(alpro_config(losses=losses, entities=0)).train()
    optimizer = make_optimizer(model, OptimizerConfig())
    for number in range(2):
        step(model, optimizer, frames_of(number), 1e-3, 20.0)
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_frames_are_told_apart_by_their_order() -> None:
    """With time attention awake, a clip backwards is another clip."""
    for make in (make_alpro, make_frozen_in_time):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "time" in key or "temporal" in key:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
        frames = normalised(frames_of().frames)
        with torch.no_grad():
            forward, backward = model.video_features(frames), model.video_features(frames.flip(1))
        assert float((forward - backward).abs().max()) > 1e-4, make


def test_a_prompter_of_other_entities_is_refused() -> None:
    model = alpro.Recipe(alpro_config(entity_names=ENTITIES))
    shape = model.shape
    with pytest.raises(InputError, match="2 entities apart, the model predicts 3"):
        model.attach(Prompter(shape, 2))
    with pytest.raises(InputError, match="entity 2 is 'egg' to the prompter and 'carrot' to the model"):
        model.attach(Prompter(shape, 3, ("onion", "egg", "pan")))
    with pytest.raises(InputError, match="reads 4 frames"):
        model.attach(Prompter(replace(shape, vision=replace(VISION, frames=4)), 3, ENTITIES))
    with pytest.raises(InputError, match="needs a prompter"):
        model(frames_of())


def test_losses_and_curricula_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="not mvm"):
        alpro_config(losses=("vtc", "mvm"))
    with pytest.raises(InputError, match="pem needs entities"):
        alpro_config(entities=0)
    with pytest.raises(InputError, match="begins at step 0"):
        frozen_in_time.FrozenInTimeConfig(curriculum=((5, 1),))
    with pytest.raises(InputError, match="more than the model's 4 frames"):
        frozen_in_time.FrozenInTimeConfig(curriculum=((0, 8),))


def test_the_curriculum_goes_from_one_frame_to_all() -> None:
    vision = replace(VISION, attention="frozen")
    model = frozen_in_time.Recipe(frozen_in_time.FrozenInTimeConfig(vision, TEXT, 30, 16, 0.05, ((0, 1), (2, 2))))
    shown = []
    rows = torch.randint(0, 255, (18, SIZE * SIZE * 3)).half()
    batch = ClipBatch(Packed(rows, torch.full((6,), 3)), frames_of().words, torch.arange(6))
    optimizer = make_optimizer(model, OptimizerConfig())
    for _ in range(3):
        shown.append(step(model, optimizer, batch, 1e-3, 5.0)["frames"])
    assert shown == [1, 1, 2]


def test_frozen_in_time_begins_without_time() -> None:
    """Fresh time attention adds nothing, yet learns: its first gradient is not zero."""
    model = make_frozen_in_time()
    block = model.video_model.blocks[0]
    x = torch.randn(2, 1 + 2 * 4, 16)
    added = block.timeattn.in_groups(block.norm3(x), 1, (2, 4), True, None)
    assert not bool(added.any())
    added.sum().backward()
    assert bool(block.timeattn.qkv.weight.grad.any())


def test_later_words_are_not_only_looked_back_at() -> None:
    """Swapping the last word changes the fused state of the first, and of the video's tokens."""
    model, batch = make_alpro().eval(), frames_of(pairs=1)
    changed = batch.words.with_rows(batch.words.rows.clone())
    changed.rows[-2] = 5 if int(changed.rows[-2]) != 5 else 6
    with torch.no_grad():
        video = from_even(model.video_tokens(normalised(batch.frames)))
        one, other = (model.fused(model.text_tokens(words), video).rows for words in (batch.words, changed))
        texts = [model.embed_text(words) for words in (batch.words, changed)]
    assert float((one[0] - other[0]).abs().max()) > 1e-6 and float((one[-1] - other[-1]).abs().max()) > 1e-6
    assert not torch.equal(*texts)


def test_a_batch_without_known_answers_gives_no_nan() -> None:
    model = alpro.Recipe(alpro_config(losses=(), entities=0, answers=3))
    loss = model(replace(frames_of(), answers=torch.full((6,), IGNORED)))["loss"]
    assert loss.item() == 0


# --- Through the shards that every recipe is trained from -------------------------------------------------------------


@pytest.fixture
def pixel_shards(tmp_path: Path) -> Shards:
    """Four videos of ten seconds, one frame of 32 x 32 a second, as the encoder `pixels-32` leaves them."""
    encoder = make_video_encoder("pixels-32")
    writer = ShardWriter(tmp_path / "shards", Manifest(encoder.name, encoder.fingerprint(), encoder.dimension))
    for number, name in enumerate((*COLOURS, "grey")):
        frames = np.full((10, 1, 32, 32, 3), COLOURS.get(name, (99, 99, 99)), np.uint8)
        start = np.array([1.0, 5.0], np.float32)
        captions = Captions(start, start + 3, [f"{name} onion", f"a {name} carrot"])
        writer.add(VideoRecord(f"v{number}", 10.0, encoder.encode_clips(frames).astype(np.float16), captions))
    writer.close()
    return Shards(tmp_path / "shards")


def test_recipes_on_frames_are_built_and_trained_from_shards_like_any_other(
    pixel_shards: Shards, tmp_path: Path
) -> None:
    tokenizer = train_wordpiece(["red green blue grey onion a carrot", *prompts("onion"), *prompts("carrot")], 200)
    sampler = ClipSampler(pixel_shards, tokenizer, ClipConfig(clips_per_video=2, max_words=12), tmp_path / "cache")
    batch = sampler.batch(np.arange(4), np.random.default_rng(0))
    small = {"patch": 8, "frames": 2, "width": 32, "heads": 2, "vision_layers": 1, "text_layers": 1, "projection": 16}
    small |= {"max_seconds": 32, "max_words": 12, "dropout": 0.0}
    (tmp_path / "entities.txt").write_text("onion 8\ncarrot 4\n")
    first = alpro.Options(**small, fusion_layers=1, losses=("vtc",))
    towers = alpro.build(first, pixel_shards.manifest, tokenizer)
    towers.save_pretrained(tmp_path / "prompter")
    given = {"prompter": str(tmp_path / "prompter"), "entities": str(tmp_path / "entities.txt")}
    whole = alpro.build(replace(first, losses=alpro.LOSSES, **given), pixel_shards.manifest, tokenizer)
    frozen = frozen_in_time.build(frozen_in_time.Options(**small), pixel_shards.manifest, tokenizer)
    for model in (towers, whole, frozen):
        figures = [step(model.train(), make_optimizer(model, OptimizerConfig()), batch, 1e-3, 5.0) for _ in range(2)]
        assert all(np.isfinite(value) for row in figures for value in row.values())
        assert embed_texts(model.eval(), ["onion"]).shape == (1, 16)
        assert embed_clips(model, pixel_shards.tokens(0), np.array([[0, 1], [2, 9]])).shape == (2, 16)
    torch.manual_seed(3)
    one = whole.eval()(batch)
    torch.manual_seed(3)
    assert torch.equal(one["loss"], whole(batch)["loss"]), "frames, masks, crops and negatives follow from the seed"
    assert whole.prompter is not None and whole.prompter.names == ("onion", "carrot")
    with pytest.raises(InputError, match="pem needs"):
        alpro.build(replace(first, losses=alpro.LOSSES, entities=given["entities"]), pixel_shards.manifest, tokenizer)
    with pytest.raises(InputError, match="this recipe is trained from frames"):
        frozen_in_time.build(frozen_in_time.Options(**small), Manifest("x3d-s", "f" * 64, 16), tokenizer)
