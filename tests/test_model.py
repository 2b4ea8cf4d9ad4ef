"""Both sides share one transformer, pooling is a mean, and padding never matters."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videoclip.data.words import train_wordpiece
from videoclip.errors import InputError
from videoclip.losses import contrastive_loss
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.packed import Packed
from videoclip.pretrained import ModelCard

TINY = VideoCLIPConfig(
    video_dimension=12,
    width=32,
    layers=2,
    video_layers=1,
    heads=4,
    intermediate=64,
    vocabulary=50,
    positions=80,
    max_seconds=16,
    max_words=20,
    cls_id=2,
    sep_id=3,
)


def tiny(**changes: object) -> VideoCLIP:
    torch.manual_seed(0)
    return VideoCLIP(replace(TINY, **changes)).eval()


def padded(lengths: list[int], generator: torch.Generator, extra: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens [B, longest + extra, 12] with rubbish in the padding, and their mask."""
    tokens = torch.randn(len(lengths), max(lengths) + extra, 12, generator=generator)
    mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    return torch.where(mask[..., None], tokens, torch.tensor(1e6)), mask


@given(
    st.lists(st.integers(1, 16), min_size=1, max_size=6),
    st.integers(0, 5),
    st.integers(0, 99),
    st.sampled_from(["shared", "separate"]),
    st.sampled_from(["mean", "cls"]),
)
@settings(max_examples=40, deadline=None)
def test_padding_composition_and_order_never_change_an_embedding(
    lengths: list[int], extra: int, seed: int, transformer: str, pooling: str
) -> None:
    model = tiny(transformer=transformer, pooling=pooling)
    generator = torch.Generator().manual_seed(seed)
    tokens, mask = padded(lengths, generator, extra)
    ids = torch.randint(5, 50, (len(lengths), 20), generator=generator)
    ids[:, 0] = TINY.cls_id
    words = torch.arange(20) < torch.tensor([max(2, n) for n in lengths])[:, None]
    order = torch.randperm(len(lengths), generator=generator)
    with torch.no_grad():
        video, text = model.get_video_features(tokens, mask), model.get_text_features(ids, words)
        shuffled = model.get_video_features(tokens[order], mask[order])
        for row, length in enumerate(lengths):
            alone = model.get_video_features(tokens[row : row + 1, :length], mask[row : row + 1, :length])
            assert torch.allclose(video[row], alone[0], atol=1e-5)
            alone = model.get_text_features(ids[row : row + 1], words[row : row + 1])
            assert torch.allclose(text[row], alone[0], atol=1e-5)
    assert torch.allclose(shuffled, video[order], atol=1e-5)


def test_the_packed_path_equals_plain_padded_attention() -> None:
    """The same arithmetic, written the usual way: padded rows and an attention mask."""
    model = tiny(transformer="separate", normalize=False)
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 2, 5, 9]
    tokens, mask = padded(lengths, generator, 0)
    with torch.no_grad():
        expected = _padded_video_features(model, tokens.masked_fill(~mask[..., None], 0), lengths)
        assert torch.allclose(model.get_video_features(tokens, mask), expected, atol=1e-5)


def _padded_video_features(model: VideoCLIP, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    bert, longest = model.video_encoder.bert, tokens.shape[1]
    cls, sep = bert.embeddings.word_embeddings.weight
    x = torch.zeros(len(lengths), longest + 2, TINY.width)
    positions = torch.zeros(len(lengths), longest + 2, dtype=torch.long)
    for row, n in enumerate(lengths):
        x[row, 0], x[row, 1 : n + 1], x[row, n + 1] = cls, model.video_encoder.videomlp(tokens[row, :n]), sep
        positions[row, 1 : n + 1], positions[row, n + 1] = torch.arange(1, n + 1), TINY.max_seconds + 1
    valid = torch.arange(longest + 2) < torch.tensor(lengths)[:, None] + 2
    x = bert.embeddings(x, positions, torch.zeros_like(positions))
    for layer in bert.encoder.layer:
        attention = layer.attention.self
        q, k, v = (
            part(x).unflatten(-1, (TINY.heads, -1)).transpose(1, 2)
            for part in (attention.query, attention.key, attention.value)
        )
        scores = (q @ k.transpose(-1, -2)) / (TINY.width // TINY.heads) ** 0.5
        weights = scores.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
        x = layer.attention.output((weights @ v).transpose(1, 2).flatten(2), x)
        x = layer.output(layer.intermediate(x), x)
    return torch.stack([x[row, 1 : n + 2].mean(0) for row, n in enumerate(lengths)])


def test_shared_transformer_has_one_set_of_weights_and_separate_has_two() -> None:
    assert not any(name.startswith("text_encoder") for name in tiny().state_dict())
    names = tiny(transformer="separate").state_dict()
    assert any(n.startswith("text_encoder") for n in names) and any(n.startswith("video_encoder") for n in names)


def test_a_clip_embedding_is_the_mean_of_its_hidden_states_and_sep(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(normalize=False)
    outputs: list[Packed] = []
    encoder = model.mm_encoder.bert.encoder
    monkeypatch.setattr(encoder, "forward", lambda x, run=encoder.forward: outputs.append(run(x)) or outputs[-1])
    clips = Packed(torch.randn(7, 12), torch.tensor([4, 3]))
    with torch.no_grad():
        hidden = model.video_hidden(clips)
        features = model.embed_video(clips)
    shorter, longer = outputs[0].split()  # [CLS] tokens [SEP] of the second clip, then of the first
    assert torch.equal(hidden.rows, torch.cat([longer[1:5], shorter[1:4]]))
    assert hidden.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    for feature, of_tokens, sep in zip(features, hidden.split(), (longer[5], shorter[4])):
        assert torch.allclose(feature, (of_tokens.sum(0) + sep) / (len(of_tokens) + 1), atol=1e-6)
    assert not torch.allclose(features[0], hidden.split()[0].mean(0), atol=1e-3), "[SEP] counts"


def test_a_temperature_at_its_limit_can_rise_again_and_never_falls_below() -> None:
    model = tiny(temperature=0.01)
    optimizer = torch.optim.SGD([model.log_temperature], lr=1.0)
    for sign in (1.0, -1.0):  # first the loss asks for a lower temperature, then for a higher one
        optimizer.zero_grad()
        (sign * model.temperature * 10).backward()
        optimizer.step()
        model.after_step()
        lowest, model_is = 0.01, model.temperature.item()
        assert model_is == pytest.approx(lowest, rel=1e-5) if sign > 0 else model_is > lowest


def test_kept_tokens_keep_their_places() -> None:
    model = tiny(normalize=False)
    tokens = torch.randn(6, 12)
    kept = Packed(tokens, torch.tensor([6])).keep(torch.tensor([True, False, True, False, False, True]))
    with torch.no_grad():
        sparse = model.embed_video(kept)
        closed_up = model.embed_video(Packed(tokens[[0, 2, 5]], torch.tensor([3])))
    assert not torch.allclose(sparse, closed_up, atol=1e-4), "positions 0, 2, 5 are not 0, 1, 2"


def test_saving_and_loading_gives_the_same_embeddings(tmp_path: Path) -> None:
    model = tiny(normalize=True)
    tokenizer = train_wordpiece(["chop the onion", "stir the soup"], vocabulary=50)
    model = VideoCLIP(replace(model.config, vocabulary=tokenizer.vocabulary)).eval()
    model.frozen.tokenizer = tokenizer
    model.save_pretrained(tmp_path / "model")
    loaded = VideoCLIP.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    texts = ["chop the onion", "soup"]
    assert torch.equal(loaded.encode_text(texts), model.encode_text(texts))
    assert torch.allclose(loaded.encode_text(texts).norm(dim=1), torch.ones(2))


def test_the_card_states_data_encoders_licence_and_scores(tmp_path: Path) -> None:
    card = ModelCard("240 cooking videos", "s3d (abc)", scores=(("R@1", 38.2),))
    tiny().save_pretrained(tmp_path, card)
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("---\nlicense: mit\n")
    for part in ("240 cooking videos", "s3d (abc)", "| R@1 | 38.20 |", "50 words"):
        assert part in page


def test_what_is_pushed_to_the_hub_is_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the upload itself is left out: there is no hub here."""
    from huggingface_hub import HfApi, ModelHubMixin

    seen: list[str] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Repo", (), {"repo_id": repo_id}))
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, folder_path, **_: seen.extend(p.name for p in Path(folder_path).iterdir())
    )
    assert issubclass(VideoCLIP, ModelHubMixin)
    tiny().push_to_hub("someone/model")
    assert {"config.json", "model.safetensors", "README.md"} <= set(seen)


def test_long_videos_are_embedded_in_pieces() -> None:
    model = tiny()
    tokens = torch.randn(40, 12)
    with torch.no_grad():
        whole = model.embed_long_video(tokens)
        pieces = model.embed_video(Packed(tokens, torch.tensor([16, 16, 8]))).mean(0)
    assert torch.allclose(whole, pieces / pieces.norm(), atol=1e-6)


def test_inputs_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    model = tiny()
    for tokens, lengths, message in (
        (torch.zeros(3, 11), torch.tensor([3]), "12"),
        (torch.zeros(17, 12), torch.tensor([17]), "1 to 16"),
        (torch.full((3, 12), torch.nan), torch.tensor([3]), "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            model.embed_video(Packed(tokens, lengths))
    with pytest.raises(InputError, match="vocabulary"):
        model.embed_text(Packed(torch.tensor([2, 77, 3]), torch.tensor([3])))
    with pytest.raises(InputError, match="no model here"):
        VideoCLIP.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:500])
    with pytest.raises(InputError, match="does not fit"):
        VideoCLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize("option", [{"transformer": "both"}, {"pooling": "max"}, {"width": 30}, {"positions": 20}])
def test_impossible_configurations_are_refused(option: dict) -> None:
    with pytest.raises(InputError):
        replace(TINY, **option)


# --- Parity with the public release -------------------------------------------------------------------------------


def weight_by_name(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Every reference tensor is made from its own name."""
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    return 1 + 0.02 * z if name.endswith("LayerNorm.weight") else 0.02 * z


def reference_model() -> VideoCLIP:
    config = VideoCLIPConfig(
        width=64,
        layers=3,
        video_layers=2,
        heads=4,
        intermediate=128,
        transformer="separate",
        vocabulary=1000,
        max_words=61,
        normalize=False,
        temperature=1.0,
        train_temperature=False,
    )
    model = VideoCLIP(config).eval()
    state = model.state_dict()
    special = "video_encoder.bert.embeddings.word_embeddings.weight"
    for name in state:
        if name == special:  # of the release's video vocabulary only [CLS] and [SEP] are ever used
            state[name] = torch.from_numpy(weight_by_name(name, (1000, 64))[[101, 102]])
        elif name != "log_temperature":
            state[name] = torch.from_numpy(np.asarray(weight_by_name(name, tuple(state[name].shape))))
    model.load_state_dict(state)
    return model


def test_outputs_equal_the_public_releases(reference: Path) -> None:
    expected = np.load(reference / "mmpt_tiny_separate.npz")
    model = reference_model()
    lengths = torch.tensor([32, 20, 5])
    tokens = torch.from_numpy(np.random.default_rng(7).standard_normal((3, 32, 512)).astype(np.float32))
    mask = torch.arange(32) < lengths[:, None]
    words = np.random.default_rng(8).integers(200, 1000, (3, 64))
    ids = torch.zeros(3, 64, dtype=torch.int64)
    for row, count in enumerate((12, 30, 3)):
        ids[row, : count + 2] = torch.tensor([101, *words[row, :count], 102])
    with torch.no_grad():
        video, text = model.get_video_features(tokens, mask), model.get_text_features(ids, ids > 0)
        hidden = model.video_hidden(Packed(tokens[mask], lengths)).split()
        loss = contrastive_loss(video, text)
    for ours, theirs in ((video, expected["video"]), (text, expected["text"]), (loss, expected["loss"])):
        assert np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max() < 1e-4
    for row, count in enumerate(lengths.tolist()):
        assert np.abs(hidden[row].numpy() - expected["video_hidden"][row, 1 : count + 1]).max() < 1e-4
