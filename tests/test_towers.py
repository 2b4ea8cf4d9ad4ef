"""Frozen towers: a two-tower model of pictures is searched with no training, and narration adds to what it knows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipelines.cli import main
from videoclip.data.captions import Captions
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.shards import Manifest, Shards, ShardWriter, VideoRecord
from videoclip.data.words import WordTokenizer, train_wordpiece
from videoclip.embedding import embed_texts
from videoclip.encoders.catalog import load_video_encoder, make_video_encoder
from videoclip.encoders.image import ImageEncoder
from videoclip.errors import InputError
from videoclip.evaluation.inputs import load_model_and_shards
from videoclip.files import read_json
from videoclip.packed import Packed
from videoclip.recipes import from_pretrained, towers
from videoclip.training import OptimizerConfig, make_optimizer, step

WORDS = ["chop the onion", "stir the soup slowly", "pour oil into the pan"]
PREPARATION = {"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def clip_words() -> WordTokenizer:
    """A word-level tokenizer with CLIP's first and last word, which has the largest id."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = sorted({word for text in WORDS for word in text.split()} | {"a", "<unk>"})
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(name, vocabulary[name]) for name in ("<|startoftext|>", "<|endoftext|>")]
    tokenizer.post_processor = processors.TemplateProcessing("<|startoftext|> $A <|endoftext|>", None, special)
    return WordTokenizer(tokenizer)


def siglip_words() -> WordTokenizer:
    """The same with SigLIP's end word only."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = sorted({word for text in WORDS for word in text.split()} | {"a", "<unk>"})
    vocabulary = {word: number for number, word in enumerate([*words, "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", vocabulary["</s>"])])
    return WordTokenizer(tokenizer)


def hub_folder(folder: Path, kind: str = "clip", vocabulary: int = 0) -> nn.Module:
    """A two-tower model with random weights as the hub has them; returns transformers' own."""
    import transformers

    words = clip_words() if kind == "clip" else siglip_words()
    text = {
        "vocab_size": vocabulary or words.vocabulary, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 12,
        "bos_token_id": words.cls_id, "eos_token_id": words.sep_id, "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    network: nn.Module
    if kind == "clip":
        network = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        )
    elif kind == "siglip":
        network = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    else:
        del vision["image_size"]
        vision["num_patches"] = 4
        network = transformers.Siglip2Model(
            transformers.Siglip2Config(text_config={**text, "projection_size": 16}, vision_config=vision)
        )
    network.eval().save_pretrained(folder)
    words.save(folder)
    preparation = {**PREPARATION, **({"size": None} if kind == "siglip2" else {})}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return network


def pooled(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Shards of a CLIP's embeddings with narration, the encoder beside them, as `videoclip extract` leaves them."""
    folder = tmp_path_factory.mktemp("towers")
    hub_folder(folder / "hub")
    encoder = ImageEncoder.from_pretrained(str(folder / "hub"))
    encoder.save(folder / "shards")
    writer = ShardWriter(folder / "shards", Manifest(encoder.name, encoder.fingerprint(), encoder.dimension))
    generator = np.random.default_rng(0)
    for number in range(6):
        clips = generator.integers(0, 255, (8, 2, 32, 32, 3), dtype=np.uint8)
        said = Captions(
            np.array([0, 3], np.float32), np.array([3, 7], np.float32), [WORDS[number % 3], WORDS[number % 2]]
        )
        writer.add(VideoRecord(f"v{number}", 8.0, encoder.encode_clips(clips).astype(np.float16), said))
    writer.close()
    return Shards(folder / "shards")


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
@torch.no_grad()
def test_texts_get_transformers_own_embeddings_whatever_their_neighbours(tmp_path: Path, kind: str) -> None:
    theirs = hub_folder(tmp_path / "hub", kind)
    encoder = ImageEncoder.from_pretrained(str(tmp_path / "hub"))
    words = encoder.words
    assert words is not None
    tower = encoder.text_tower()
    embeddings, states = tower.encode(words.clip_ids(WORDS, tower.max_words))
    for place, text in enumerate(WORDS):
        ids = torch.tensor([words.tokenizer.encode(text).ids])  # as the model's own tokenizer wraps it
        plain = ids
        if kind != "clip":
            ids = F.pad(ids, (0, 12 - ids.shape[1]), value=1)
        expected = pooled(theirs.get_text_features(input_ids=ids))  # type: ignore[operator]
        torch.testing.assert_close(embeddings[place], expected[0], atol=1e-5, rtol=1e-4)
        assert states.split()[place].shape == (plain.shape[1], 32)
    known = words.word_ids(["chop"])[0][0]  # a word's state begins with what it is looked up as
    table = theirs.text_model.embeddings.token_embedding.weight[known]  # type: ignore[union-attr, index, operator]
    word = states.split()[0][0 if tower.without_start else 1]
    torch.testing.assert_close(word[:16], F.layer_norm(table, (16,)), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="at most"):
        tower.encode(words.clip_ids(["chop " * 20], 20))


@torch.no_grad()
def test_siglip_2_gets_its_patches_as_its_own_preprocessing_cuts_them(tmp_path: Path) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    from videoclip.encoders.image import _as_patches

    picture = torch.randn(3, 32, 64)
    try:
        theirs = convert_image_to_patches(picture.permute(1, 2, 0).numpy(), 16)
    except (ValueError, IndexError):
        theirs = convert_image_to_patches(picture.numpy(), 16)
    np.testing.assert_allclose(_as_patches(picture[None], 16)["pixel_values"][0].numpy(), theirs)


def test_hidden_states_are_kept_where_asked_and_the_fingerprint_covers_both_towers(tmp_path: Path) -> None:
    hub_folder(tmp_path / "hub")
    plain = make_video_encoder(str(tmp_path / "hub"))
    wide = make_video_encoder(f"{tmp_path / 'hub'}+hidden")
    assert isinstance(plain, ImageEncoder) and isinstance(wide, ImageEncoder)
    assert (plain.dimension, wide.dimension, wide.projected, wide.name) == (12, 28, 12, "hub+hidden")
    clips = np.random.default_rng(0).integers(0, 255, (2, 2, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_allclose(wide.encode_clips(clips)[:, :12], plain.encode_clips(clips), atol=1e-6)
    before = {plain.fingerprint(), wide.fingerprint()}
    assert len(before) == 2
    wide.save(tmp_path / "saved")
    assert load_video_encoder(tmp_path / "saved").fingerprint() == wide.fingerprint()
    with torch.no_grad():
        next(plain.network.text_model.parameters()).add_(1)
    assert plain.fingerprint() not in before
    train_wordpiece(WORDS).save(tmp_path / "saved")
    with pytest.raises(InputError, match="not the tokenizer of the encoder"):
        load_video_encoder(tmp_path / "saved")


def test_towers_that_do_not_belong_together_are_refused(tmp_path: Path, shards: Shards) -> None:
    hub_folder(tmp_path / "few", vocabulary=5)
    with pytest.raises(InputError, match="they do not belong together"):
        ImageEncoder.from_pretrained(str(tmp_path / "few"))
    hub_folder(tmp_path / "hub")
    (tmp_path / "hub" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"came without tokenizer\.json"):
        ImageEncoder.from_pretrained(str(tmp_path / "hub")).text_tower()
    options = towers.Options(encoder=str(shards.folder), max_seconds=4, max_words=8)
    with pytest.raises(InputError, match="another tokenizer"):
        towers.build(options, shards.manifest, train_wordpiece(WORDS))
    other = Manifest("other", "0" * 64, 12)
    with pytest.raises(InputError, match="tokens of the encoder other"):
        towers.build(options, other, clip_words())
    make_video_encoder("x3d-tiny").save(tmp_path / "x3d")
    with pytest.raises(InputError, match="has no text side; extract with a two-tower model"):
        towers.read_towers(towers.Options(encoder=str(tmp_path / "x3d")))


def batch_of(shards: Shards, folder: Path) -> tuple[ClipSampler, WordTokenizer]:
    words = towers.tokenizer_of(towers.Options(encoder=str(shards.folder)))
    clips = ClipConfig(clips_per_video=2, min_words=2, max_words=8, min_seconds=1, max_seconds=4)
    return ClipSampler(shards, words, clips, folder), words


@torch.no_grad()
def test_step_zero_is_the_frozen_model_to_the_bit(shards: Shards, tmp_path: Path) -> None:
    sampler, words = batch_of(shards, tmp_path)
    options = towers.Options(encoder=str(shards.folder), hidden_width=16, layers=1, heads=2, max_seconds=4, max_words=8)
    model = towers.build(options, shards.manifest, words)
    frozen = towers.frozen_towers(shards.folder)
    batch = sampler.batch(np.arange(6), np.random.default_rng(0))
    assert torch.equal(model.embed_video(batch.video_tokens), frozen.embed_video(batch.video_tokens))
    assert torch.equal(model.embed_text(batch.word_ids), frozen.embed_text(batch.word_ids))
    by_hand = F.normalize(batch.video_tokens.split()[0].float().mean(0), dim=0)
    torch.testing.assert_close(frozen.embed_video(batch.video_tokens)[0], by_hand)
    assert float(model(batch)["moved"]) == 0.0


def test_additions_learn_a_penalty_holds_them_and_the_towers_stay(shards: Shards, tmp_path: Path) -> None:
    sampler, words = batch_of(shards, tmp_path)
    moved = {}
    for penalty in (0.0, 50.0):
        options = towers.Options(
            encoder=str(shards.folder), hidden_width=16, layers=1, heads=2, penalty=penalty, max_seconds=4, max_words=8
        )
        torch.manual_seed(0)
        model = towers.build(options, shards.manifest, words).train()
        before = {name: value.clone() for name, value in model.text_tower().network.state_dict().items()}
        optimizer = make_optimizer(model, OptimizerConfig())
        batch = sampler.batch(np.arange(6), np.random.default_rng(0))
        figures = [step(model, optimizer, batch, 3e-3, 2.0) for _ in range(40)]
        assert figures[-1]["contrast"] < figures[0]["contrast"]
        moved[penalty] = figures[-1]["moved"]
        for name, value in model.text_tower().network.state_dict().items():
            assert torch.equal(value, before[name]), name
    assert moved[50.0] < 0.2 * moved[0.0]
    model.save_pretrained(tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(embed_texts(again, WORDS), embed_texts(model.eval(), WORDS))


def test_with_additions_to_texts_alone_videos_stay_where_they_are(shards: Shards, tmp_path: Path) -> None:
    """An index of the frozen model's videos is one of this model's, too."""
    sampler, words = batch_of(shards, tmp_path)
    options = towers.Options(
        encoder=str(shards.folder), hidden_width=16, layers=1, heads=2, sides="text", max_seconds=4, max_words=8
    )
    model = towers.build(options, shards.manifest, words).train()
    batch = sampler.batch(np.arange(6), np.random.default_rng(0))
    before = model.embed_video(batch.video_tokens), model.embed_text(batch.word_ids)
    optimizer = make_optimizer(model, OptimizerConfig())
    for _ in range(3):
        step(model, optimizer, batch, 3e-3, 2.0)
    assert torch.equal(model.embed_video(batch.video_tokens), before[0])
    assert not torch.allclose(model.embed_text(batch.word_ids), before[1], atol=1e-3)
    assert not hasattr(model, "video_addition") and "on the text side" in model.config.describe()["Additions"]


def test_a_folder_of_shards_is_evaluated_with_no_training(shards: Shards) -> None:
    model, opened = load_model_and_shards(Path("frozen"), shards.folder)
    texts = embed_texts(model, WORDS)
    assert texts.shape == (3, 12) and len(opened) == 6
    tokens = torch.from_numpy(np.array(opened.tokens(0)))
    assert model.embed_video(Packed(tokens, torch.tensor([8]))).shape == (1, 12)
    video = model.config.max_seconds
    assert video >= 128


@pytest.mark.slow
def test_three_commands_search_videos_with_no_training_and_a_fourth_adds_narration(
    ray: None, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_folder(tmp_path / "hub")
    videos, tokens, index = corpus / "test" / "videos", tmp_path / "tokens", tmp_path / "index"
    assert main(["extract", "--videos", str(videos), "--encoder", str(tmp_path / "hub"), "--output", str(tokens)]) == 0
    truth = str(corpus / "youcookii_annotations_trainval.json")
    evaluate = (
        f"evaluate youcook2 --model frozen --shards {tokens} --annotations {truth} --output {tmp_path / 'm.json'}"
    )
    assert main(evaluate.split()) == 0
    assert read_json(tmp_path / "m.json")["queries"] > 5
    assert main(f"index --model frozen --shards {tokens} --output {index}".split()) == 0
    capsys.readouterr()
    assert main(["search", "chop the onion", "--model", "frozen", "--index", str(index), "--count", "3"]) == 0
    assert capsys.readouterr().out.count("test_0") == 3
    train = f"extract --videos {corpus / 'train' / 'videos'} --captions {corpus / 'train' / 'raw_caption.json'}"
    train += f" --encoder-from {tokens} --output {tmp_path / 'narrated'}"
    assert main(train.split()) == 0
    pretrain = f"pretrain --recipe towers --shards {tmp_path / 'narrated'} --output {tmp_path / 'run'} --epochs 1"
    pretrain += " --videos-per-batch 3 --clips.clips-per-video 4 --clips.min-words 4 --clips.max-words 8"
    pretrain += " --model.hidden-width 16 --model.layers 1 --model.heads 2 --threads 1"
    assert main(pretrain.split()) == 0
    assert main(evaluate.replace("--model frozen", f"--model {tmp_path / 'run' / 'model'}").split()) == 0
    # Tokens of an encoder without texts cannot be asked like this, and the command says why.
    make_video_encoder("x3d-tiny").save(tokens)
    assert main(evaluate.split()) == 2
    assert "has no text side; extract with a two-tower model" in capsys.readouterr().err
