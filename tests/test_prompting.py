"""Efficient-Prompt: the release's numbers, its checkpoints, prompts that are trained through a frozen text side."""

import io
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from videoclip import convert
from videoclip.data.action_clips import ActionBatch
from videoclip.data.clips import ClipBatch
from videoclip.errors import InputError
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.packed import Packed
from videoclip.parts.clip import Clip, ClipConfig
from videoclip.parts.clip_files import read_clip
from videoclip.parts.prompts import Prompts, cut_words, fit_words, pack_words
from videoclip.recipes import from_pretrained
from videoclip.recipes.prompting import Config, Options, Recipe, prompted
from videoclip.training import OptimizerConfig, make_optimizer

NAMES = [[298, 7, 299], [298, 11, 12, 299], [298, 21, 22, 23, 299]]


def weight_by_name(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Every tensor of the release's parity data is made from its own name."""
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith(".bias"):
        z = 0.02 * z
    elif not shape:
        z = np.array(0.07, np.float32)
    elif len(shape) == 1 and name.endswith(".weight"):
        z = 1 + 0.02 * z
    else:
        z = z / np.sqrt(shape[-1])
    return torch.from_numpy(np.asarray(z, np.float32))


def read_keys(path: Path) -> dict[str, tuple[int, ...]]:
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return {name: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for name, shape, _ in rows}


@pytest.fixture
def release(reference: Path, tmp_path: Path) -> Path:
    """A checkpoint as the release writes it, with the tiny model's tensors."""
    keys = read_keys(reference / "efficient_prompt_tiny_keys.tsv")
    path = tmp_path / "checkpoint_iter1100.pth.tar"
    state = {name: weight_by_name(name, shape) for name, shape in keys.items()}
    torch.save({"state_dict": state, "optimizer": {"state": {}, "param_groups": []}, "iteration": 1100}, path)
    return path


def small_clip(**changes: int) -> Clip:
    sizes = {"dimension": 24, "width": 32, "layers": 2, "heads": 2, "intermediate": 128, "positions": 30}
    sizes |= {"vocabulary": 50, "image_width": 0}
    torch.manual_seed(0)
    clip = Clip(ClipConfig(**{**sizes, **changes}))  # type: ignore[arg-type]  # numbers all
    for parameter in (clip.positional_embedding, clip.text_projection):
        nn.init.normal_(parameter, std=0.1)
    return clip


def relative(ours: torch.Tensor | None, theirs: np.ndarray) -> float:
    assert ours is not None and ours.shape == theirs.shape
    return float(np.abs(ours.detach().numpy() - theirs).max() / np.abs(theirs).max())


def test_features_loss_and_gradients_are_the_release_s(reference: Path, release: Path) -> None:
    expected = np.load(reference / "efficient_prompt_tiny.npz")
    model = convert.from_efficient_prompt(release, prefix=4, postfix=4)
    video = model.video_features(torch.from_numpy(expected["frames"]))
    text = model.class_features(NAMES)
    logits = F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).T / 0.07
    loss = F.cross_entropy(logits, torch.tensor([2, 0]))
    loss.backward()
    for ours, name in ((video, "video"), (text, "text"), (logits, "logits"), (loss, "loss")):
        assert relative(ours, expected[name]) < 1e-5, name
    gradient = model.prompts.embedding.weight.grad
    assert gradient is not None
    assert relative(gradient[:20], expected["embedding_gradient"]) < 1e-5
    assert relative(model.temporal.positions.weight.grad, expected["temporal_gradient"]) < 1e-5
    # The postfix of a longer name stands elsewhere: names of 1, 2 and 3 words use rows 6 to 11 between them.
    used = (gradient.abs().sum(1) > 0).nonzero().ravel()
    assert used.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11] == expected["prompt_rows_with_gradient"].tolist()
    frames = Packed.from_padded(torch.from_numpy(expected["frames"]), torch.ones(2, 6))
    outputs = model(ActionBatch(frames, pack_words(NAMES), torch.tensor([2, 0])))
    assert relative(outputs["loss"], expected["loss"]) < 1e-5


def test_every_name_of_the_published_checkpoint_is_loaded(reference: Path) -> None:
    from videoclip.convert.efficient_prompt import _ByTheirNames

    with torch.device("meta"):  # 152,820,737 values
        model = Recipe(Config(position="absolute"), Clip(ClipConfig()))
    ours = {name: tuple(value.shape) for name, value in _ByTheirNames(model).state_dict().items()}
    assert ours == read_keys(reference / "efficient_prompt_hmdb_keys.tsv") and len(ours) == 316
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 3_200_000  # as the release says of one layer


def test_checkpoints_that_do_not_fit_are_refused_with_their_names(release: Path, tmp_path: Path) -> None:
    state = torch.load(release)["state_dict"]
    path = tmp_path / "other.pth"
    wrong = {**state, "clipmodel.visual.extra": torch.zeros(2)}
    wrong.pop("temporalModelling.resblocks.1.ln_2.bias")
    torch.save({"state_dict": wrong}, path)
    message = r"1 missing: temporalModelling\.resblocks\.1\.ln_2\.bias; 1 unknown: clipmodel\.visual\.extra"
    with pytest.raises(InputError, match=message):
        convert.from_efficient_prompt(path)
    torch.save({**state, "embedding.weight": torch.zeros(77, 256)}, path)
    with pytest.raises(InputError, match="do not belong together"):
        convert.from_efficient_prompt(path)
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
    with pytest.raises(InputError, match="missing 'positional_embedding'"):
        convert.from_efficient_prompt(path)
    with pytest.raises(InputError, match="leave no room"):
        convert.from_efficient_prompt(release, prefix=40, postfix=40)


def test_what_stands_behind_the_end_word_need_not_be_computed() -> None:
    clip = small_clip()
    vectors = torch.randn(2, 30, 32)
    ends = torch.tensor([9, 14])
    whole = clip.transformer(
        Packed((vectors + clip.positional_embedding).flatten(0, 1), torch.tensor([30, 30]))
    ).rows.view(2, 30, 32)
    as_released = clip.ln_final(whole[torch.arange(2), ends]) @ clip.text_projection
    cut = Packed.of([vectors[0, :10], vectors[1, :15]])
    torch.testing.assert_close(clip.embed_word_vectors(cut), as_released, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_prompts_stand_around_the_words(position: str) -> None:
    prompts = Prompts(4, 2, 3, position, 20)  # type: ignore[arg-type]
    words = Packed.of([torch.full((3, 4), 10.0), torch.full((5, 4), 20.0)])
    first, second = prompts(words).split()
    table = prompts.embedding.weight
    shift = 0 if position == "relative" else 2
    assert torch.equal(first[[0, 3, 7]], torch.full((3, 4), 10.0)) and len(first) == 8
    assert torch.equal(second[[0, 3, 4, 5, 9]], torch.full((5, 4), 20.0)) and len(second) == 10
    assert torch.equal(first[1:3], second[1:3])
    rows = table[[2, 3, 4]] if position == "relative" else table[[4, 5, 6]]
    assert torch.equal(first[4:7], rows)
    after = table[[2, 3, 4]] if position == "relative" else table[[4 + shift, 5 + shift, 6 + shift]]
    assert torch.equal(second[6:9], after)


def test_names_that_do_not_fit_are_named_and_sentences_cut_and_counted() -> None:
    model = prompted(Options(prefix=8, postfix=8, layers=0), small_clip())
    with pytest.raises(InputError, match=r"text 1 has 13 words; .* there is room for 12"):
        model.class_features([[1, 2, 3], list(range(15))])
    cut, count = fit_words([[1, 2, 3], list(range(15))], model.prompts.room)
    assert count == 1 and cut == [[1, 2, 3], [*range(13), 14]]
    assert model.class_features(cut).shape == (2, 24)
    packed, number = cut_words(pack_words([[1, 2, 3], list(range(15))]), model.prompts.room)
    assert number == 1 and [rows.tolist() for rows in packed.split()] == cut
    with pytest.raises(InputError, match="vocabulary of 50"):
        model.class_features([[1, 60, 2]])
    with pytest.raises(InputError, match="start and end"):
        model.class_features([[1]])
    with pytest.raises(InputError, match="frame features are 8 wide; these towers give 24"):
        model.video_features(torch.zeros(1, 3, 8))


def our_towers() -> VideoCLIP:
    torch.manual_seed(0)
    config = VideoCLIPConfig(
        video_dimension=8, width=16, layers=1, video_layers=1, heads=2, intermediate=32, vocabulary=30, cls_id=2,
        sep_id=3, transformer="separate", positions=40, max_words=20, max_seconds=4, dropout=0.1,
    )  # fmt: skip
    return VideoCLIP(config)


@pytest.mark.parametrize("kind", ["clip", "ours"])
def test_prompts_learn_and_the_frozen_towers_stay(kind: str) -> None:
    model = prompted(Options(prefix=3, postfix=3, frames=4), small_clip() if kind == "clip" else our_towers())
    frozen = {name: value.clone() for name, value in model.towers.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(3, model.config.width, generator=generator)
    labels = torch.arange(12) % 3
    frames = (centres[labels][:, None] + 0.3 * torch.randn(12, 4, model.config.width, generator=generator)).flatten(
        0, 1
    )
    names = pack_words([[2, 5, 3], [2, 6, 7, 3], [2, 8, 3]])
    batch = ActionBatch(Packed(frames, torch.full((12,), 4)), names, labels)
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=1e-2, weight_decay=0.01))
    model.train()
    assert not model.towers.training
    before = model(batch)["loss"].item()
    for _ in range(30):
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
    assert model(batch)["loss"].item() < 0.2 * before
    for name, value in model.towers.state_dict().items():
        assert torch.equal(value, frozen[name]), name


def test_bare_names_are_the_frozen_model_s_own_and_need_no_gradient() -> None:
    towers = our_towers()
    model = prompted(Options(prefix=0, postfix=0, layers=0), towers)
    words = pack_words([[2, 5, 3], [2, 6, 7, 3]])
    torch.testing.assert_close(model.embed_text(words), towers.eval().embed_text(words))
    assert not model.text_features(words).requires_grad
    tokens = Packed(torch.randn(3, 8), torch.tensor([3]))
    mean = F.normalize(model.frame_features(tokens).rows.mean(0), dim=0)
    torch.testing.assert_close(model.embed_video(tokens)[0], mean)


def test_a_saved_model_gives_the_same_embeddings(tmp_path: Path) -> None:
    for kind, towers in (("clip", small_clip()), ("ours", our_towers())):
        model = prompted(Options(prefix=2, postfix=1, frames=3, layers=2), towers)
        model.save_pretrained(tmp_path / kind)
        again = from_pretrained(tmp_path / kind)
        words = pack_words([[2, 5, 3], [2, 6, 7, 3]])
        tokens = Packed(torch.randn(9, 24 if kind == "clip" else 8), torch.tensor([2, 7]))
        with torch.no_grad():
            assert torch.equal(again.embed_text(words), model.embed_text(words))
            assert torch.equal(again.embed_video(tokens), model.embed_video(tokens))


@pytest.mark.parametrize("symmetric", [False, True])
def test_sentences_are_retrieved_and_cut_to_fit(symmetric: bool) -> None:
    """Sentences in place of names: NCE over a batch's, video to text and, if asked, back; long ones are cut."""
    model = prompted(Options(prefix=8, postfix=8, frames=3, layers=0, symmetric=symmetric), small_clip())
    tokens = Packed(torch.randn(7, 24), torch.tensor([2, 5]))
    texts = [[1, 2, 3], list(range(15))]
    batch = ClipBatch(tokens, pack_words(texts), torch.tensor([0, 1]))
    outputs = model(batch)
    video, text = model.embed_video(tokens), model.embed_text(pack_words(fit_words(texts, 12)[0]))
    logits, target = video @ text.T / 0.07, torch.arange(2)
    expected = F.cross_entropy(logits, target) + symmetric * F.cross_entropy(logits.T, target)
    torch.testing.assert_close(outputs["loss"], expected)
    assert float(outputs["cut"]) == 0.5


# --- CLIP's own files ---------------------------------------------------------------------------------------------


def hugging_face_clip(folder: Path) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": 60, "max_position_embeddings": 20, "eos_token_id": 59, "bos_token_id": 58}
    vision = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    model.save_pretrained(folder)
    return model


def features(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output  # type: ignore[attr-defined]


@torch.no_grad()
def test_a_hugging_face_clip_gives_transformers_numbers(tmp_path: Path) -> None:
    theirs = hugging_face_clip(tmp_path)
    ours = read_clip(tmp_path)
    ids = torch.tensor([[58, 3, 4, 5, 59]])
    text = ours.embed_word_vectors(ours.word_vectors(Packed(ids[0], torch.tensor([5]))))
    torch.testing.assert_close(text, features(theirs.get_text_features(input_ids=ids)), atol=1e-5, rtol=1e-4)
    pictures = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        ours.embed_images(pictures), features(theirs.get_image_features(pixel_values=pictures)), atol=1e-5, rtol=1e-4
    )
    with pytest.raises(InputError, match="32 x 32"):
        ours.embed_images(torch.zeros(1, 3, 16, 16))


class Tree(nn.Module):
    """A module with the parameters of a state dict at their places, for TorchScript."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in state.items():
            first, _, rest = name.partition(".")
            if rest:
                groups.setdefault(first, {})[rest] = value
            else:
                self.register_parameter(first, nn.Parameter(value))
        for first, values in groups.items():
            self.add_module(first, Tree(values))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_openai_s_archive_is_read_without_running_it(tmp_path: Path) -> None:
    hugging_face_clip(tmp_path)
    clip = read_clip(tmp_path)
    tree = Tree({name: value.half() for name, value in clip.state_dict().items()})
    tree.register_buffer("context_length", torch.tensor(20))
    path = tmp_path / "ViT-tiny.pt"
    torch.jit.script(tree).save(str(path))
    again = read_clip(path)
    for name, value in clip.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float()), name


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (print, ("this was run",))


def test_an_archive_that_would_run_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    buffer = io.BytesIO()
    pickle.dump(Runs(), buffer, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", buffer.getvalue())
        archive.writestr("model/constants.pkl", b"")
    with pytest.raises(InputError, match=r"it wants .*print"):
        read_clip(path)
    torch.save({"state_dict": Runs()}, path)
    with pytest.raises(InputError, match="can be read safely"):
        convert.from_efficient_prompt(path)
    assert "this was run" not in capsys.readouterr().out
