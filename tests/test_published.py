"""Faithful to the published checkpoints: S3D, the VideoCLIP release, BERT; and features of older tools."""

import argparse
import zlib
from ast import literal_eval
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_encoders import tiny_bert
from test_model import reference_model, weight_by_name

from pipelines.cli import main
from videoclip import convert
from videoclip.convert.mmpt import UNUSED
from videoclip.data.shards import Shards
from videoclip.data.words import train_wordpiece
from videoclip.encoders.catalog import load_video_encoder
from videoclip.encoders.s3d import S3D, SamePool, space_to_depth
from videoclip.errors import InputError
from videoclip.files import read_json_lines
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.packed import Packed

# --- S3D ----------------------------------------------------------------------------------------------------------


def s3d_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Every reference tensor is made from its own name."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        z = 1 + 0.02 * np.abs(z)
    elif name.endswith(("running_mean", "bias")) or "word_embd" in name:
        z = 0.02 * z
    elif len(shape) == 1:
        z = 1 + 0.02 * z
    else:
        z = z * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(z.astype(np.float32))


@pytest.fixture(scope="module")
def s3d_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict with the published names and shapes."""
    path = tmp_path_factory.mktemp("s3d") / "s3d_howto100m.pth"
    network = S3D(text=True)
    torch.save({name: s3d_weight(name, tuple(value.shape)) for name, value in network.state_dict().items()}, path)
    return path


def test_names_and_shapes_are_those_of_the_public_weights(reference: Path) -> None:
    rows = [line.split("\t") for line in (reference / "s3d_howto100m_keys.tsv").read_text().splitlines()]
    ours = {name: tuple(value.shape) for name, value in S3D(text=True).state_dict().items()}
    assert ours == {name: literal_eval(shape) for name, shape, _ in rows} and len(ours) == 537


def test_s3d_gives_the_reference_outputs(reference: Path, s3d_file: Path) -> None:
    expected = np.load(reference / "s3d_parity.npz")
    frames = torch.from_numpy(np.random.default_rng(3).random((2, 3, 32, 64, 64), dtype=np.float32))
    encoder = S3D.from_howto100m(s3d_file)
    with torch.inference_mode():
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            given = frames.contiguous(memory_format=layout)
            for ours, theirs in (
                (encoder(given), expected["embedding"]),
                (encoder.mixed_5c_features(given), expected["mixed_5c"]),
            ):
                assert np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max() < 1e-4


def test_the_fast_arrangement_equals_the_plain_one_and_follows_its_weights(s3d_file: Path) -> None:
    encoder = S3D.from_howto100m(s3d_file)
    frames = torch.rand(1, 3, 8, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.mixed_5c_features(frames), encoder.blocks(frames), atol=1e-4, rtol=1e-4)
        before = encoder(frames)
        encoder.conv_2b.conv1.weight.mul_(2)
        assert not torch.allclose(encoder(frames), before)
        torch.testing.assert_close(encoder.mixed_5c_features(frames), encoder.blocks(frames), atol=1e-4, rtol=1e-4)


def test_space_to_depth_folds_in_the_order_time_height_width_channel() -> None:
    frames = torch.arange(2 * 3 * 4 * 4 * 4).view(2, 3, 4, 4, 4)
    folded = space_to_depth(frames)
    assert folded.shape == (2, 24, 2, 2, 2)
    for t, h, w, c in ((0, 0, 0, 1), (1, 0, 1, 2), (0, 1, 0, 0)):
        assert torch.equal(folded[:, ((t * 2 + h) * 2 + w) * 3 + c], frames[:, c, t::2, h::2, w::2])


def test_pooling_pads_as_tensorflow_does() -> None:
    x = torch.arange(1.0, 6.0).view(1, 1, 1, 1, 5)
    pooled = SamePool((1, 1, 3), (1, 1, 2))(x.expand(1, 1, 1, 1, 5))
    assert pooled.flatten().tolist() == [3.0, 5.0, 5.0]


def test_a_stored_token_is_the_unit_vector(s3d_file: Path, tmp_path: Path) -> None:
    encoder = S3D.from_howto100m(s3d_file)
    clips = np.random.default_rng(0).integers(0, 255, (2, 4, 32, 32, 3), dtype=np.uint8)
    tokens = encoder.encode_clips(clips)
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=1), 1, atol=1e-5)
    encoder.save(tmp_path)
    np.testing.assert_allclose(load_video_encoder(tmp_path).encode_clips(clips), tokens, atol=1e-5)


def test_sentences_are_embedded_by_the_text_module_of_the_same_file(s3d_file: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "s3d_dict.npy", np.array(["open", "door", "the"]))
    encoder = S3D.from_howto100m(s3d_file, tmp_path / "s3d_dict.npy")
    rows = encoder.encode_text(["Open door", "open, door!", "open unheard door", "door"])
    assert rows.shape == (4, 512)
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[3])
    module = encoder.text_module
    words = torch.zeros(16, dtype=torch.long)
    words[:2] = torch.tensor([1, 2])
    by_hand = module.fc2(torch.relu(module.fc1(module.word_embd(words))).max(0).values)
    torch.testing.assert_close(rows[0], by_hand)
    with pytest.raises(InputError, match="s3d_dict"):
        S3D.from_howto100m(s3d_file).encode_text(["door"])


def test_weights_and_dictionaries_that_do_not_fit_are_refused(s3d_file: Path, tmp_path: Path) -> None:
    state = torch.load(s3d_file)
    state.pop("fc.bias")
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"1 missing: fc\.bias; 1 unknown: extra"):
        S3D.from_howto100m(tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(s3d_file.read_bytes()[:1000])
    with pytest.raises(InputError, match="read safely"):
        S3D.from_howto100m(tmp_path / "cut.pth")
    np.save(tmp_path / "big.npy", np.array(["w"] * 66250))
    with pytest.raises(InputError, match="do not fit"):
        S3D.from_howto100m(s3d_file, tmp_path / "big.npy")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="read safely"):
        S3D.from_howto100m(s3d_file, tmp_path / "objects.npy")
    with pytest.raises(InputError, match="multiples of 16"):
        S3D()(torch.zeros(1, 3, 8, 30, 30))


# --- The VideoCLIP release ----------------------------------------------------------------------------------------


def released(transformer: str) -> dict[str, torch.Tensor]:
    """A tiny release: names of the public files, values from the names."""
    config = replace(
        reference_model().config, transformer=transformer, video_layers=2 if transformer == "separate" else 3
    )
    names = {name: tuple(value.shape) for name, value in VideoCLIP(config).state_dict().items()}
    names.pop("log_temperature")
    if transformer == "separate":
        names["video_encoder.bert.embeddings.word_embeddings.weight"] = (1000, 64)
    for tower in ("mm_encoder.bert",) if transformer == "shared" else ("video_encoder.bert", "text_encoder"):
        names |= {f"{tower}.pooler.dense.weight": (64, 64), f"{tower}.pooler.dense.bias": (64,)}
    return {name: torch.from_numpy(np.asarray(weight_by_name(name, shape))) for name, shape in names.items()}


def save_release(path: Path, state: dict[str, torch.Tensor], **beside: object) -> Path:
    torch.save({"model": {f"mmmodel.{name}": value for name, value in state.items()}, **beside}, path)
    return path


@pytest.mark.parametrize("transformer", ["separate", "shared"])
def test_names_are_those_of_the_public_checkpoints(reference: Path, transformer: str) -> None:
    file = {"separate": "mmpt_separate_keys.tsv", "shared": "mmpt_share_keys.tsv"}[transformer]
    rows = [line.split("\t") for line in (reference / file).read_text().splitlines()]
    public = {name: literal_eval(shape) for name, shape, _ in rows if not UNUSED.search(name)}
    with torch.device("meta"):
        model = VideoCLIP(VideoCLIPConfig(transformer=transformer, layers=12, video_layers=6, max_words=61))
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "log_temperature"}
    words = "video_encoder.bert.embeddings.word_embeddings.weight"
    if transformer == "separate":
        ours[words] = public[words]
    assert ours == public


def test_a_separate_release_gives_the_reference_outputs(reference: Path, tmp_path: Path) -> None:
    path = save_release(tmp_path / "checkpoint_best.pt", released("separate"), args=argparse.Namespace(lr=1e-4))
    model = convert.from_mmpt(path, heads=4)
    assert (model.config.layers, model.config.video_layers, model.config.vocabulary) == (3, 2, 1000)
    tokens = torch.from_numpy(np.random.default_rng(7).standard_normal((3, 32, 512)).astype(np.float32))
    with torch.no_grad():
        ours = model.get_video_features(tokens, torch.arange(32) < torch.tensor([32, 20, 5])[:, None]).numpy()
    theirs = np.load(reference / "mmpt_tiny_separate.npz")["video"]
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4


def test_a_shared_release_numbers_its_positions_as_published(tmp_path: Path) -> None:
    """Text takes position 0 for [CLS], then 34, 35, …, and token type 1 for all but [CLS]."""
    model = convert.from_mmpt(save_release(tmp_path / "c.pt", released("shared")), heads=4)
    assert model.config.transformer == "shared" and model.config.layers == 3
    embeddings = model.mm_encoder.bert.embeddings
    seen: list[torch.Tensor] = []
    embeddings.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    with torch.no_grad():
        model.embed_text(Packed(torch.tensor([101, 7, 8, 102]), torch.tensor([4])))
        model.embed_video(Packed(torch.zeros(5, 512), torch.tensor([5])))
    words, positions, types, _, video_positions, video_types = seen
    assert positions.tolist() == [0, 34, 35, 36] and types.tolist() == [0, 1, 1, 1]
    assert video_positions.tolist() == [0, 1, 2, 3, 4, 5, 33] and video_types.tolist() == [0] * 7
    torch.testing.assert_close(words, embeddings.word_embeddings.weight[[101, 7, 8, 102]])


def test_a_converted_release_survives_saving_and_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_release(tmp_path / "c.pt", released("separate"))
    assert main(["convert", "mmpt", str(path), str(tmp_path / "model"), "--heads", "4"]) == 0
    assert "S3D" in capsys.readouterr().out
    direct, loaded = convert.from_mmpt(path, heads=4), VideoCLIP.from_pretrained(tmp_path / "model")
    tokens = torch.randn(9, 512)
    with torch.no_grad():
        clip = Packed(tokens, torch.tensor([9]))
        assert torch.equal(direct.embed_video(clip), loaded.embed_video(clip))


class Foreign:
    """A class that a checkpoint has no business to hold."""


def test_checkpoints_that_do_not_fit_are_refused_with_what_differs(tmp_path: Path) -> None:
    state = released("separate")
    state.pop("text_encoder.embeddings.LayerNorm.bias")
    state["text_encoder.new.weight"] = torch.zeros(2)
    with pytest.raises(
        InputError, match=r"missing: text_encoder\.embeddings\.LayerNorm\.bias.*unknown: text_encoder\.new"
    ):
        convert.from_mmpt(save_release(tmp_path / "a.pt", state), heads=4)
    with pytest.raises(InputError, match="without running code"):
        convert.from_mmpt(save_release(tmp_path / "b.pt", released("separate"), cfg=Foreign()))
    with pytest.raises(InputError, match="not a VideoCLIP checkpoint"):
        convert.from_mmpt(save_release(tmp_path / "d.pt", {"x": torch.zeros(1)}))
    torch.save([1, 2], tmp_path / "e.pt")
    with pytest.raises(InputError, match="fairseq"):
        convert.from_mmpt(tmp_path / "e.pt")


def test_a_tokenizer_that_knows_more_words_than_the_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = released("separate")
    words = "text_encoder.embeddings.word_embeddings.weight"
    state[words] = state[words][:110]
    path = save_release(tmp_path / "c.pt", state)
    train_wordpiece(["".join(chr(33 + i) for i in range(90))], 300).save(tmp_path / "words")
    code = main(
        ["convert", "mmpt", str(path), str(tmp_path / "m"), "--heads", "4", "--tokenizer", str(tmp_path / "words")]
    )
    assert code == 2 and "another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("transformer", ["shared", "separate"])
def test_bert_initialises_the_transformers(tmp_path: Path, transformer: str) -> None:
    from transformers import BertModel

    folder = tiny_bert(tmp_path / "bert")
    config = VideoCLIPConfig(
        video_dimension=8, width=24, layers=1, video_layers=1, heads=2, intermediate=32, transformer=transformer,
        vocabulary=60, positions=128, max_words=20, cls_id=2, sep_id=3,
    )  # fmt: skip
    model = convert.from_bert(folder, config).eval()
    bert = BertModel.from_pretrained(folder).eval()
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    if transformer == "separate":  # the shared variant numbers its text positions differently
        with torch.no_grad():
            expected = bert(ids).last_hidden_state[0, 1:].mean(0)
            ours = model.embed_text(Packed(ids[0], torch.tensor([5])))[0]
        torch.testing.assert_close(ours, expected / expected.norm(), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="not a BERT of 2 layers"):
        convert.from_bert(folder, replace(config, layers=2))


# --- Features of older tools --------------------------------------------------------------------------------------


def test_feature_folders_become_shards_and_come_back(
    tmp_path: Path, make_shards: Callable[..., Shards], capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards()
    assert main(["convert", "shards", str(shards.folder), str(tmp_path / "npy")]) == 0
    np.save(tmp_path / "npy" / "nan.npy", np.full((3, 16), np.nan, np.float32))
    np.save(tmp_path / "npy" / "narrow.npy", np.zeros((3, 15), np.float32))
    np.save(tmp_path / "npy" / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "npy" / "cut.npy").write_bytes(b"\x93NUMPY")
    assert main(["convert", "features", str(tmp_path / "npy"), str(tmp_path / "back")]) == 0
    back = Shards(tmp_path / "back", verify=True)
    assert back.video_ids() == shards.video_ids()
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(shards, back))
    rejected = {row["video_id"] for row in read_json_lines(tmp_path / "back" / "quarantine.jsonl")}
    assert rejected == {"nan", "narrow", "objects", "cut"}
    assert main(["convert", "features", str(tmp_path), str(tmp_path / "none")]) == 2
