"""Recipes on frames, ALPRO and Frozen in Time: the properties whose absence nobody would hear."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from videoclip.checkpoints import TrainingState, load_checkpoint, save_checkpoint
from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.data.captions import NO_CAPTIONS, Captions
from videoclip.data.clips import ClipBatch, ClipConfig, ClipSampler
from videoclip.data.frame_shards import FrameShards, FramesRecord, encode_picture, write_frame_shards
from videoclip.data.frames import FrameBatch, same_texts
from videoclip.data.questions import OpenQuestion
from videoclip.data.shards import Manifest, Shards, ShardWriter, VideoRecord
from videoclip.data.words import WordTokenizer, train_wordpiece
from videoclip.embedding import embed_clips, embed_texts
from videoclip.encoders.catalog import make_video_encoder
from videoclip.errors import InputError
from videoclip.evaluation.frames import answer_open_questions, retrieval_by_matching
from videoclip.packed import Packed
from videoclip.parts.fusion import from_even
from videoclip.parts.masked_words import NOT_MASKED, WordMask, mask_words
from videoclip.parts.matching import NONE, matching_negatives, matching_pairs
from videoclip.parts.pixels import CLIP_MEAN, CLIP_STD, inside, normalised, zeroed_outside
from videoclip.parts.prompter import Prompter, entity_loss, kept_labels, prompts
from videoclip.parts.towers import TowersShape
from videoclip.parts.vision_transformer import VisionShape
from videoclip.recipes import alpro, frozen_in_time, recipe_named
from videoclip.training import OptimizerConfig, make_optimizer, step
from videoclip.transformer import TransformerShape

ENTITIES = ("onion", "carrot", "pan")
VISION = VisionShape(32, 8, 1, 2, 32, 2, 2, 64)
TEXT = TransformerShape(32, 2, 64, 2, 0.0, 16)
MASK = WordMask(4, 40, (0, 1, 2, 3, 4), share=0.4)
RECIPES = ("alpro", "frozen-in-time")


def alpro_config(**changes: object) -> alpro.AlproConfig:
    plain = alpro.AlproConfig(TowersShape(VISION, TEXT, 1, 40, 16), word_mask=MASK, entities=len(ENTITIES))
    return replace(plain, threshold=0.0, **changes)


def make(name: str) -> torch.nn.Module:
    """A tiny model; ALPRO with a prompter of other weights."""
    torch.manual_seed(0)
    if name == "frozen-in-time":
        vision = replace(VISION, attention="frozen")
        return frozen_in_time.Recipe(frozen_in_time.FrozenInTimeConfig(vision, TEXT, 40, 16, 0.05, ((0, 2),)))
    towers = alpro.Recipe(replace(alpro_config(), losses=("vtc",), entities=0))
    sentences = Packed.of([torch.tensor([2, 5 + i, 9 + k, 3]) for i in range(len(ENTITIES)) for k in range(12)])
    return alpro.Recipe(alpro_config()).attach(Prompter.of(towers, ENTITIES, {"video": sentences, "image": sentences}))


def batch_of(number: int = 0, pairs: int = 6) -> FrameBatch:
    """Clips that differ in colour and texts that differ in words."""
    generator = torch.Generator().manual_seed(number)
    colour = torch.randint(0, 255, (pairs, 1, 1, 1, 3), generator=generator)
    frames = (colour + torch.randint(0, 30, (pairs, 2, 32, 32, 3), generator=generator)).clamp(max=255).byte()
    words = [
        torch.cat([torch.tensor([2]), torch.randint(5, 40, (3 + i % 4,), generator=generator), torch.tensor([3])])
        for i in range(pairs)
    ]
    crops = torch.tensor([[i % 3, 1, 2, 2] for i in range(pairs)])
    return FrameBatch(frames, Packed.of(words), torch.Generator().manual_seed(number), crops)


def features(model: torch.nn.Module, batch: FrameBatch) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.video_features(normalised(batch.frames)), model.embed_text(batch.words)


@pytest.mark.parametrize("name", RECIPES)
def test_thirty_steps_lower_every_loss(name: str) -> None:
    model = make(name).train()
    optimizer = make_optimizer(model, OptimizerConfig(betas=(0.9, 0.98)))
    noted = [step(model, optimizer, batch_of(0), 3e-3, 20.0) for _ in range(30)]
    for loss in {"loss", "vtc", "vtm", "mlm", "pem"} & set(noted[0]):
        assert noted[-1][loss] < noted[0][loss], loss
    assert len({"vtc", "vtm", "mlm", "pem"} & set(noted[0])) == (4 if name == "alpro" else 0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_trained_parameter_has_a_gradient_and_no_frozen_one_moves(name: str) -> None:
    model = make(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.1))
    for number in range(2):  # time attention begins at zero and hides what is before it from the first step
        step(model, optimizer, batch_of(number), 1e-3, 20.0)
    without = [
        key
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not bool(parameter.grad.any()))
    ]
    assert without == [], "a part that no loss reaches"
    for key, value in model.state_dict().items():
        if key.startswith("prompter."):
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("losses", [("vtc",), ("vtc", "vtm"), ("vtm", "mlm"), ("vtc", "vtm", "mlm")])
def test_with_fewer_losses_what_none_reaches_is_frozen(losses: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = alpro.Recipe(replace(alpro_config(), losses=losses, entities=0)).train()
    optimizer = make_optimizer(model, OptimizerConfig())
    for number in range(2):
        step(model, optimizer, batch_of(number), 1e-3, 20.0)
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("name", RECIPES)
def test_padding_and_batch_composition_change_nothing(name: str) -> None:
    model, batch = make(name).eval(), batch_of()
    video, text = features(model, batch)
    order = torch.tensor([4, 1, 3])
    other_video, other_text = features(model, replace(batch, frames=batch.frames[order], words=batch.words.take(order)))
    torch.testing.assert_close(other_video, video[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_text, text[order], rtol=1e-5, atol=1e-6)
    if name == "alpro":
        ids, mask = batch.words.padded()
        longer = torch.cat([ids, torch.full_like(ids, 7)], 1), torch.cat([mask, torch.zeros_like(mask)], 1)
        frames = normalised(batch.frames)
        torch.testing.assert_close(model.matching_scores(frames, *longer), model.matching_scores(frames, ids, mask))
        torch.testing.assert_close(model.text_features(*longer), text, rtol=1e-5, atol=1e-6)


def test_later_words_are_not_only_looked_back_at() -> None:
    """Swapping the last word changes the fused state of the first, and of the video's tokens."""
    model, batch = make("alpro").eval(), batch_of(pairs=1)
    changed = batch.words.with_rows(batch.words.rows.clone())
    changed.rows[-2] = 5 if int(changed.rows[-2]) != 5 else 6
    with torch.no_grad():
        video = from_even(model.video_tokens(normalised(batch.frames)))
        one, other = (model.fused(model.text_tokens(words), video).rows for words in (batch.words, changed))
        texts = [model.embed_text(words) for words in (batch.words, changed)]
    assert float((one[0] - other[0]).abs().max()) > 1e-6 and float((one[-1] - other[-1]).abs().max()) > 1e-6
    assert not torch.equal(*texts)


def test_frames_are_told_apart_by_their_order() -> None:
    """With time attention awake, a clip backwards is another clip."""
    for name in RECIPES:
        model = make(name).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "time" in key or "temporal" in key:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
        frames = normalised(batch_of().frames)
        with torch.no_grad():
            forward, backward = model.video_features(frames), model.video_features(frames.flip(1))
        assert float((forward - backward).abs().max()) > 1e-4, name


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_goes_on_as_if_nothing_had_been(name: str, tmp_path: Path) -> None:
    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> float:
        return [step(model.train(), optimizer, batch_of(n), 1e-3, 20.0)["loss"] for n in numbers][-1]

    straight = make(name)
    expected = steps(straight, make_optimizer(straight, OptimizerConfig()), range(4))
    first = make(name)
    optimizer = make_optimizer(first, OptimizerConfig())
    steps(first, optimizer, range(2))
    save_checkpoint(tmp_path, first, optimizer, TrainingState(0, 2), {})
    second = make(name)
    optimizer = make_optimizer(second, OptimizerConfig())
    load_checkpoint(tmp_path, second, optimizer, {})
    assert steps(second, optimizer, range(2, 4)) == expected


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_model_is_the_same_when_it_is_loaded(name: str, tmp_path: Path) -> None:
    model = make(name).eval()
    model.save_pretrained(tmp_path)
    loaded = recipe_named(name).Recipe.from_pretrained(tmp_path)
    assert loaded.config == model.config
    for ours, theirs in zip(features(loaded, batch_of()), features(model, batch_of())):
        assert torch.equal(ours, theirs)
    if name == "alpro":
        assert loaded.prompter is not None and loaded.prompter.names == ENTITIES
    with pytest.raises(InputError, match="not a model of the recipe"):
        recipe_named(RECIPES[1 - RECIPES.index(name)]).Recipe.from_pretrained(tmp_path)


def _share(rank: int | None, pairs: int = 6) -> FrameBatch:
    batch = batch_of(pairs=pairs)
    rows = torch.arange(pairs) if rank is None else (torch.arange(4) if rank == 0 else torch.arange(4, pairs))
    counts = (pairs,) if rank is None else (4, pairs - 4)
    assert batch.crops is not None
    return replace(
        batch, frames=batch.frames[rows], words=batch.words.take(rows), crops=batch.crops[rows], rows_per_rank=counts
    )


def _contrast_alone(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return make(name) if name != "alpro" else alpro.Recipe(replace(alpro_config(), losses=("vtc",), entities=0))


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name in RECIPES:
        model = _contrast_alone(name).train()
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)  # Adam would scale rounding up
        figures = [step(DistributedDataParallel(model), optimizer, _share(rank), 1e-2, 1.0) for _ in range(2)]
        results[name] = figures[-1]["loss"], model.state_dict()
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_equal_one_where_losses_compare_all_pairs(tmp_path: Path) -> None:
    """Contrast, with unequal shares. Matching draws among a worker's own pairs, so it has no single-worker twin."""
    multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    for name in RECIPES:
        model = _contrast_alone(name).train()
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        loss = [step(model, optimizer, _share(None), 1e-2, 1.0)["loss"] for _ in range(2)][-1]
        for rank in range(2):
            theirs, weights = torch.load(tmp_path / f"{rank}.pt")[name]
            assert theirs == pytest.approx(loss, rel=1e-4)
            for key, value in model.state_dict().items():
                if not key.endswith(("key.bias", "qkv.bias")):  # softmax does not feel keys' biases
                    torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=2e-4, msg=key)


# --- Parts ------------------------------------------------------------------------------------------------------------


def test_negatives_are_drawn_by_likeness_and_never_the_own_or_an_excluded_pair() -> None:
    similarity = torch.zeros(4, 4)
    similarity[0, 1] = 9.0  # video 0 is much like text 1
    excluded = torch.zeros(4, 4, dtype=torch.bool)
    excluded[2, 3] = excluded[3, 2] = True
    generator = torch.Generator().manual_seed(0)
    videos, texts = zip(*(matching_negatives(similarity, generator, excluded) for _ in range(200)))
    of_texts, of_videos = torch.stack(videos), torch.stack(texts)
    own = torch.arange(4)
    assert bool((of_texts != own).all() and (of_videos != own).all())
    assert bool((of_texts[:, 2] != 3).all() and (of_videos[:, 3] != 2).all())
    assert float((of_videos[:, 0] == 1).float().mean()) > 0.95 and float((of_texts[:, 1] == 0).float().mean()) > 0.95
    assert len(of_videos[:, 1].unique()) == 3, "drawn, not the hardest"


def test_where_everything_is_excluded_there_is_no_negative() -> None:
    excluded = torch.ones(3, 3, dtype=torch.bool)
    drawn = matching_negatives(torch.zeros(3, 3), torch.Generator().manual_seed(0), excluded)
    assert all(bool((numbers == NONE).all()) for numbers in drawn)
    words = Packed.of([torch.ones(2, 4)] * 3)
    texts, _, labels = matching_pairs(words, words, *drawn)
    assert len(texts) == 3 and labels.tolist() == [1, 1, 1]


def test_words_are_hidden_as_bert_hides_them_and_special_ones_never() -> None:
    how = WordMask(4, 1000, (0, 1, 2, 3, 4))
    words = Packed(
        torch.cat([torch.tensor([2]), torch.randint(5, 1000, (60000,)), torch.tensor([3])]), torch.tensor([60002])
    )
    hidden, labels = mask_words(words, how, torch.Generator().manual_seed(0))
    asked = labels != NOT_MASKED
    assert float(asked.float().mean()) == pytest.approx(0.15, abs=0.01)
    assert not bool(asked[[0, -1]].any()) and torch.equal(labels[asked], words.rows[asked])
    shares = [(hidden.rows == 4)[asked], (hidden.rows == words.rows)[asked]]
    assert [round(float(share.float().mean()), 1) for share in shares] == [0.8, 0.1]
    assert torch.equal(hidden.rows[~asked], words.rows[~asked])
    always, labels = mask_words(words, replace(how, always=True), torch.Generator().manual_seed(0))
    assert bool((always.rows[labels != NOT_MASKED] == 4).all())


def test_outside_a_crop_is_black_before_normalisation_and_the_crop_stays_where_it_was() -> None:
    batch = batch_of()
    assert batch.crops is not None
    crops = normalised(zeroed_outside(batch.frames, batch.crops, 8))
    mask = inside(batch.crops, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
    everything = normalised(batch.frames)
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    for clip in range(len(batch)):
        assert torch.equal(crops[clip][..., mask[clip]], everything[clip][..., mask[clip]])
        torch.testing.assert_close(crops[clip, 0][:, ~mask[clip]], black[:, None].expand(-1, int((~mask[clip]).sum())))


def test_a_batch_in_which_no_label_is_sure_gives_no_loss_and_no_nan() -> None:
    q = torch.full((4, 8), 1 / 8)
    kept = kept_labels(q, "probability")
    logits = torch.randn(4, 8, requires_grad=True)
    loss = entity_loss(logits, q, kept)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not bool(logits.grad.any())
    assert kept_labels(torch.eye(8)[:4], "release").tolist() == [False, True, True, True]
    with pytest.raises(InputError, match="discard"):
        kept_labels(q, "always")


def test_prompts_are_the_papers() -> None:
    assert len(prompts("dog")) == 12 and "A video of a dog." in prompts("dog")
    assert prompts("dog", "image")[0] == "A photo of a dog." and len(set(prompts("dog", "image"))) == 12


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
        model(batch_of())


def test_losses_and_curricula_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="not mvm"):
        alpro_config(losses=("vtc", "mvm"))
    with pytest.raises(InputError, match="pem needs entities"):
        replace(alpro_config(), entities=0)
    with pytest.raises(InputError, match="begins at step 0"):
        frozen_in_time.FrozenInTimeConfig(curriculum=((5, 1),))
    with pytest.raises(InputError, match="more than the model's 4 frames"):
        frozen_in_time.FrozenInTimeConfig(curriculum=((0, 8),))


def test_the_curriculum_goes_from_one_frame_to_all() -> None:
    vision = replace(VISION, attention="frozen")
    model = frozen_in_time.Recipe(frozen_in_time.FrozenInTimeConfig(vision, TEXT, 40, 16, 0.05, ((0, 1), (2, 2))))
    shown = []
    rows = torch.randint(0, 255, (18, 32 * 32 * 3)).half()
    batch = ClipBatch(Packed(rows, torch.full((6,), 3)), batch_of().words, torch.arange(6))
    optimizer = make_optimizer(model, OptimizerConfig())
    for _ in range(3):
        shown.append(step(model, optimizer, batch, 1e-3, 5.0)["frames"])
    assert shown == [1, 1, 2]


def test_frozen_in_time_begins_without_time() -> None:
    """Fresh time attention adds nothing, yet learns: its first gradient is not zero."""
    model = make("frozen-in-time")
    block = model.video_model.blocks[0]
    x = torch.randn(2, 1 + 2 * 16, 32)
    added = block.timeattn.in_groups(block.norm3(x), 1, (2, 16), True, None)
    assert not bool(added.any())
    added.sum().backward()
    assert bool(block.timeattn.qkv.weight.grad.any())


def test_same_texts_are_no_negatives() -> None:
    same = same_texts(["a", "b", "a"])
    assert same.tolist() == [[False, False, True], [False, False, False], [True, False, False]]
    model = make("alpro")
    batch = replace(batch_of(pairs=3), excluded=torch.from_numpy(same))
    assert np.isfinite(model(batch)["loss"].item())


# --- Retrieval and questions on shards of frames ----------------------------------------------------------------------


COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


@pytest.fixture
def coloured(tmp_path: Path) -> FrameShards:
    """Three videos, each of one colour."""
    records = [
        FramesRecord(name, 2.0, [encode_picture(np.full((32, 32, 3), colour, np.uint8))] * 6, NO_CAPTIONS)
        for name, colour in COLOURS.items()
    ]
    write_frame_shards(tmp_path / "frames", records, 32)
    return FrameShards(tmp_path / "frames")


def trained(shards: FrameShards, tokenizer: WordTokenizer, **changes: object) -> alpro.Recipe:
    """Thirty steps on three coloured videos."""
    torch.manual_seed(0)
    special = tokenizer.special_ids()
    shape = TowersShape(VISION, TEXT, 1, tokenizer.vocabulary, 16)
    mask = WordMask(special["[MASK]"], tokenizer.vocabulary, tuple(special.values()))
    model = alpro.Recipe(alpro.AlproConfig(shape, entities=0, word_mask=mask, **changes))
    model.frozen.tokenizer = tokenizer
    texts = ["what is it" if model.config.answers else name for name in COLOURS]
    ids = tokenizer.clip_ids(texts, 8)
    batch = FrameBatch(
        torch.from_numpy(np.stack([shards.clip(row, 2) for row in range(3)])),
        Packed(ids.rows.long(), ids.lengths),
        torch.Generator().manual_seed(0),
        answers=torch.arange(3),
    )
    optimizer = make_optimizer(model.train(), OptimizerConfig())
    for _ in range(80):
        step(model, optimizer, batch, 3e-3, 20.0)
    return model.eval()


def test_retrieval_by_matching_finds_what_was_learned(coloured: FrameShards) -> None:
    tokenizer = train_wordpiece([*COLOURS, "what is it"], 60)
    model = trained(coloured, tokenizer, losses=("vtc", "vtm"))
    clips = [AnnotatedClip(name, 0.0, None, (name,)) for name in COLOURS]
    found = retrieval_by_matching(model, coloured, [*clips, AnnotatedClip("absent", 0.0, None, ("x",))])
    assert found["text_to_video"]["R@1"] == found["video_to_text"]["R@1"] == 100
    assert found["text_to_video"]["dropped"] == 1 and found["text_to_video"]["queries"] == 3
    assert retrieval_by_matching(model, coloured, clips, best=2)["text_to_video"]["R@1"] == 100
    twice = [*clips, AnnotatedClip("red", 0.0, 2.0, ("red", "red"))]
    assert "video_to_text" not in retrieval_by_matching(model, coloured, twice)
    with pytest.raises(InputError, match="none of the 1 annotated clips"):
        retrieval_by_matching(model, coloured, [AnnotatedClip("absent", 0.0, None, ("x",))])


def test_questions_are_answered_from_frames(coloured: FrameShards) -> None:
    tokenizer = train_wordpiece([*COLOURS, "what is it"], 60)
    model = trained(coloured, tokenizer, losses=(), answers=3)
    answers = {name: number for number, name in enumerate(COLOURS)}
    questions = [OpenQuestion(name, "what is it", name, "what") for name in COLOURS]
    metrics, given = answer_open_questions(model, coloured, questions, answers)
    assert metrics["accuracy"] == metrics["accuracy_what"] == 100 and given[1]["answer"] == "green"
    with pytest.raises(InputError, match="2 answers are given, the model chooses from 3"):
        answer_open_questions(model, coloured, questions, {"red": 0, "green": 1})
    with pytest.raises(InputError, match="trained with answers"):
        model(batch_of(pairs=2))


def test_a_batch_without_known_answers_gives_no_nan() -> None:
    model = alpro.Recipe(replace(alpro_config(), losses=(), entities=0, answers=3))
    loss = model(replace(batch_of(), answers=torch.full((6,), alpro.NO_ANSWER)))["loss"]
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
    torch.manual_seed(4)
    assert torch.equal(one["loss"], whole(batch)["loss"]), "masks, crops and negatives follow from the batch"
    assert whole.prompter is not None and whole.prompter.names == ("onion", "carrot")
    with pytest.raises(InputError, match="pem needs"):
        alpro.build(replace(first, losses=alpro.LOSSES, entities=given["entities"]), pixel_shards.manifest, tokenizer)
    with pytest.raises(InputError, match="this recipe is trained from frames"):
        frozen_in_time.build(frozen_in_time.Options(**small), Manifest("x3d-s", "f" * 64, 16), tokenizer)
