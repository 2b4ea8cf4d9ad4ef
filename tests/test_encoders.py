"""Frozen encoders: X3D through pytorchvideo with or without torchvision, and text encoders of the BERT family."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_video

from videoclip.data.video import FrameFormat, decode_seconds
from videoclip.encoders.catalog import load_video_encoder
from videoclip.encoders.image import ImageEncoder
from videoclip.encoders.text import FrozenTextEncoder
from videoclip.encoders.video_encoder import prefetched, scale_and_crop
from videoclip.encoders.x3d import VARIANTS, X3D, _build
from videoclip.errors import InputError


def random_clips(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 8, 64, 64, 3), dtype=np.uint8)


def test_tiny_turns_a_second_into_a_token_and_is_standardised_by_calibration() -> None:
    encoder = X3D("tiny", seed=1)
    clips = random_clips(24)
    encoder.calibrate(clips)
    tokens = encoder.encode_clips(clips)
    assert tokens.shape == (24, encoder.dimension) == (24, 720)
    np.testing.assert_allclose(tokens.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(tokens.std(0, ddof=1), 1, atol=0.1)


def test_an_encoder_is_frozen_and_its_batch_does_not_matter() -> None:
    encoder = X3D("tiny")
    clips = random_clips(5)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    np.testing.assert_allclose(encoder.encode_clips(clips)[3], encoder.encode_clips(clips[3:4])[0], atol=1e-5)


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (X3D("tiny", seed=seed).fingerprint() for seed in (3, 3, 4))
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_saving_and_loading_gives_the_same_tokens(tmp_path: Path) -> None:
    encoder = X3D("tiny", seed=1)
    encoder.calibrate(random_clips(16))
    encoder.save(tmp_path)
    loaded = load_video_encoder(tmp_path)
    assert loaded.fingerprint() == encoder.fingerprint()
    assert np.array_equal(loaded.encode_clips(random_clips(3)), encoder.encode_clips(random_clips(3)))
    other = X3D("tiny", seed=2)
    other.save(tmp_path / "other")
    (tmp_path / "other" / "video_encoder.safetensors").replace(tmp_path / "video_encoder.safetensors")
    with pytest.raises(InputError, match="not the weights"):
        load_video_encoder(tmp_path)


def test_extracted_tokens_are_those_of_encode_video_and_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mp4", [n / 8 for n in range(40)], lambda n: picture[n])
    encoder = X3D("tiny")
    tokens = encoder.encode_video(path)
    assert tokens.shape == (5, 720) and tokens.dtype == np.float16
    encoder.clips_at_once = 2
    np.testing.assert_allclose(encoder.encode_video(path), tokens, atol=2e-3)
    np.testing.assert_allclose(encoder.encode_video(path, 1.0, 3.0), tokens[1:3], atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["xs", "s"])
def test_public_weights_replace_random_ones(tmp_path: Path, variant: str) -> None:
    network = _build(VARIANTS[variant], seed=7)
    torch.save({"model_state": network.state_dict()}, tmp_path / "weights.pyth")
    encoder = X3D(variant, tmp_path / "weights.pyth")
    shape = VARIANTS[variant]
    frames = torch.rand(1, 3, shape.frames, shape.size, shape.size)
    with torch.no_grad():
        token = encoder(frames)
        x = (frames - 0.45) / 0.225
        network.eval()
        for block in network.blocks[:5]:
            x = block(x)
        head = network.blocks[5].pool
        expected = head.pre_act(head.pre_norm(head.pre_conv(x)))
    assert token.shape == (1, encoder.dimension) == (1, 864)
    torch.testing.assert_close(token[:, :432], expected.mean((2, 3, 4)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(token[:, 432:], expected.amax((2, 3, 4)), atol=1e-4, rtol=1e-4)


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pyth"
    with pytest.raises(InputError, match="no such weights"):
        X3D("tiny", path)
    torch.save({"model_state": {"blocks.0.weight": torch.zeros(3)}}, path)
    with pytest.raises(InputError, match="not the weights of this network"):
        X3D("tiny", path)
    torch.save({"something": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="model_state"):
        X3D("tiny", path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="read safely"):
        X3D("tiny", path)
    torch.save({"model_state": Path("a foreign class")}, path)
    with pytest.raises(InputError, match="read safely"):
        X3D("tiny", path)
    with pytest.raises(InputError, match="variant"):
        X3D("xxl")


SHIM = """
import sys, types
{prepare}
from videoclip.encoders.x3d import import_x3d_builder
builder = import_x3d_builder()
assert builder.__name__ == "create_x3d"
{check}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepare", "check"),
    [
        # absent
        ("sys.modules['torchvision'] = None", "assert sys.modules['torchvision'] is None"),
        # broken: present, but its operators belong to another torch
        (
            "import importlib.abc, importlib.machinery\n"
            "class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):\n"
            "    def find_spec(self, name, path, target=None):\n"
            "        if name == 'torchvision': return importlib.machinery.ModuleSpec(name, self, is_package=True)\n"
            "    def create_module(self, spec): return None\n"
            "    def exec_module(self, module): raise RuntimeError('operator torchvision::nms does not exist')\n"
            "sys.meta_path.insert(0, Broken())",
            "assert 'torchvision' not in sys.modules and 'torchvision.ops' not in sys.modules",
        ),
        # present and working: pytorchvideo must get the real one
        (
            "real = types.ModuleType('torchvision'); ops = types.ModuleType('torchvision.ops')\n"
            "class RoIAlign: pass\n"
            "ops.RoIAlign = RoIAlign; real.ops = ops; real.__path__ = []\n"
            "sys.modules.update({'torchvision': real, 'torchvision.ops': ops})",
            "import pytorchvideo.models.head as head\nassert head.RoIAlign is RoIAlign\n"
            "assert sys.modules['torchvision'] is real",
        ),
    ],
    ids=["absent", "broken", "present"],
)
def test_x3d_builds_whatever_state_torchvision_is_in(prepare: str, check: str) -> None:
    code = SHIM.format(prepare=prepare, check=check)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def tiny_bert(folder: Path, vocabulary: int = 60) -> Path:
    """A random BERT with a tokenizer, as an ordinary model folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "chop", "the", "onion", "stir", "soup"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_a_frozen_text_encoder_gives_the_same_hidden_states_packed_and_padded(tmp_path: Path) -> None:
    encoder = FrozenTextEncoder(str(tiny_bert(tmp_path / "bert")))
    ids = encoder.tokenizer.clip_ids(["chop the onion", "stir", "the soup"], 10).to("cpu", torch.int64)
    padded, mask = ids.padded()
    packed = encoder.encode_packed(ids)
    torch.testing.assert_close(packed.rows, encoder(padded, mask.long())[mask], atol=1e-5, rtol=1e-4)
    assert not encoder.train().network.training


def test_a_frozen_text_encoder_travels_with_the_model(tmp_path: Path) -> None:
    from videoclip.model import VideoCLIP, VideoCLIPConfig

    encoder = FrozenTextEncoder(str(tiny_bert(tmp_path / "bert")))
    model = VideoCLIP(
        VideoCLIPConfig(
            video_dimension=8,
            width=16,
            layers=1,
            heads=2,
            intermediate=32,
            text="frozen",
            text_dimension=24,
            vocabulary=encoder.tokenizer.vocabulary,
            positions=128,
            cls_id=2,
            sep_id=3,
        )
    ).eval()
    model.frozen.tokenizer, model.frozen.text_encoder = encoder.tokenizer, encoder
    before = model.encode_text(["chop the onion", "soup"])
    assert model.text_projection.in_features == 24 and not any("network" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "model")
    after = VideoCLIP.from_pretrained(tmp_path / "model").encode_text(["chop the onion", "soup"])
    torch.testing.assert_close(after, before)


def test_text_encoders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text encoder"):
        FrozenTextEncoder(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="embedding table"):
        FrozenTextEncoder(str(tiny_bert(tmp_path / "small", vocabulary=7)))


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit"])
def test_a_vision_model_of_the_hub_encodes_seconds_by_the_mean_of_their_frames(tmp_path: Path, kind: str) -> None:
    import transformers

    text = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        network: torch.nn.Module = transformers.CLIPModel(config)
    elif kind == "siglip":
        network = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    else:
        network = transformers.ViTModel(transformers.ViTConfig(**vision))
    folder = tmp_path / "tiny-model"
    network.save_pretrained(folder)
    preparation = {"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    encoder = ImageEncoder.from_pretrained(str(folder))
    clips = np.random.default_rng(0).integers(0, 255, (3, 2, 32, 32, 3), dtype=np.uint8)
    tokens = encoder.encode_clips(clips)
    assert tokens.shape == (3, encoder.dimension) and encoder.name == "tiny-model"
    images = torch.from_numpy(clips[1]).permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    images = images / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    with torch.inference_mode():
        output = network.eval().get_image_features(images) if kind != "vit" else network.eval()(images)
    expected = (output if isinstance(output, torch.Tensor) else output.pooler_output).mean(0)
    np.testing.assert_allclose(tokens[1], expected.numpy(), atol=1e-5)
    encoder.save(tmp_path / "saved")
    np.testing.assert_allclose(load_video_encoder(tmp_path / "saved").encode_clips(clips), tokens, atol=1e-6)


def test_frames_scaled_by_the_device_are_those_that_the_decoder_scales(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:120, 0:200]
    wave = 127 + 90 * np.sin(columns / 17) * np.cos(rows / 13)
    picture = np.repeat(wave[..., None], 3, 2).astype(np.uint8)
    path = write_video(tmp_path / "a.mp4", [n / 8 for n in range(16)], lambda n: picture)
    decoded = next(decode_seconds(path, FrameFormat(8, 64)))[0]
    whole = next(decode_seconds(path, FrameFormat(8, 64, scaled=False)))
    assert whole.shape == (8, 120, 200, 3)
    scaled = scale_and_crop(torch.from_numpy(whole).permute(0, 3, 1, 2) / 255, 64)[0].permute(1, 2, 0) * 255
    assert np.abs(scaled.numpy() - decoded).mean() < 4
    encoder = X3D("tiny")
    close = encoder.encode_clips([whole], scaled=False), encoder.encode_clips([decoded[None].repeat(8, 0)])
    assert np.corrcoef(close[0].ravel(), close[1].ravel())[0, 1] > 0.99


def test_decoding_ahead_raises_what_the_decoder_raises_and_stops_when_nobody_reads(tmp_path: Path) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise InputError("the file is damaged")

    with pytest.raises(InputError, match="damaged"):
        list(prefetched(broken(), 2))
    assert list(prefetched(range(9), 2)) == list(range(9))
    reader = prefetched(iter(int, 1), 2)  # endless
    next(reader)
    reader.close()  # joins the thread, which must have noticed


def test_mobilebert_is_a_frozen_text_encoder_of_its_own_width(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast, MobileBertConfig, MobileBertModel

    folder = tiny_bert(tmp_path / "words")
    config = MobileBertConfig(
        vocab_size=60, hidden_size=32, embedding_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, intra_bottleneck_size=16, true_hidden_size=16,
    )  # fmt: skip
    MobileBertModel(config).save_pretrained(tmp_path / "mobile")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(tmp_path / "mobile")
    encoder = FrozenTextEncoder(str(tmp_path / "mobile"))
    ids = encoder.tokenizer.clip_ids(["chop the onion"], 10).to("cpu", torch.int64)
    assert encoder.encode_packed(ids).rows.shape == (5, 32)
