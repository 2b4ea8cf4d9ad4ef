"""Our vision transformer gives what the public ones give, for every kind of attention."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from videoclip.errors import InputError
from videoclip.parts.vision_transformer import VisionShape, VisionTransformer
from videoclip.parts.vision_weights import load_vision_transformer

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
SMALL = {**SIZES, "image_size": 32}
FRAMES = {"size": 32, "patch": 8, "frames": 4, "width": 24, "layers": 2, "heads": 3, "intermediate": 48}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Random values in every parameter: fresh ones hide faults behind zeros."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def saved(model: torch.nn.Module, folder: Path) -> Path:
    """As transformers itself writes it to disk."""
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def same(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_a_picture_transformer_equals_transformers_and_gives_the_same_for_a_still_clip(
    kind: str, tmp_path: Path
) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(patch_size=8, layer_norm_eps=1e-6, **SMALL)
    theirs = randomise(getattr(transformers, f"{kind}Model")(config, add_pooling_layer=False))
    picture = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(picture).last_hidden_state
        ours = load_vision_transformer(saved(theirs, tmp_path), heads=3)
        seen = ours(picture[:, None])
        same(torch.cat([seen.special[:, 0], seen.patches[:, 0]], 1), expected)
        # Inflated to a video model, a still clip is what its picture was.
        video = load_vision_transformer(tmp_path / "model.safetensors", heads=3, attention="divided", frames=4)
        still = video(picture[:, None].expand(-1, 4, -1, -1, -1))
        same(still.special, expected[:, : ours.shape.special])
        same(still.patches[:, 2], expected[:, ours.shape.special :])


@pytest.mark.parametrize("attention", ["divided", "joint", "space"])
def test_timesformer_equals_transformers(attention: str, tmp_path: Path) -> None:
    from transformers import TimesformerConfig, TimesformerModel

    name = {"divided": "divided_space_time", "joint": "joint_space_time", "space": "space_only"}[attention]
    theirs = randomise(TimesformerModel(TimesformerConfig(patch_size=8, num_frames=4, attention_type=name, **SMALL)))
    ours = load_vision_transformer(saved(theirs, tmp_path), heads=3, frames=4)
    frames = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        expected, seen = theirs(frames).last_hidden_state, ours(frames)
    assert ours.shape.attention == attention
    if attention == "space":
        same(torch.cat([seen.special, seen.patches], 2).flatten(0, 1), expected)
        return
    same(seen.special[:, 0], expected[:, 0])
    same(seen.patches.transpose(1, 2).flatten(1, 2), expected[:, 1:])  # theirs: patch by patch, its frames in turn


@pytest.mark.parametrize("masked", [False, True])
def test_videomae_equals_transformers_with_all_and_with_visible_places(masked: bool, tmp_path: Path) -> None:
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(patch_size=8, num_frames=4, layer_norm_eps=1e-6, use_mean_pooling=False, **SMALL)
    theirs = randomise(VideoMAEModel(config))
    ours = load_vision_transformer(saved(theirs, tmp_path), heads=3, size=32, frames=4)
    frames = torch.randn(2, 4, 3, 32, 32)
    visible = torch.stack([torch.randperm(16)[:5].sort().values for _ in range(2)]) if masked else None
    hidden = None
    if visible is not None:
        hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, visible, False).repeat(1, 2)  # a tube in both steps
    with torch.no_grad():
        expected = theirs(frames, bool_masked_pos=hidden).last_hidden_state
        same(ours(frames, visible).patches.flatten(1, 2), expected)


def test_videomae_files_of_the_release_store_biases_of_queries_and_values_alone(tmp_path: Path) -> None:
    shape = VisionShape(**{**FRAMES, "attention": "joint", "special": 0, "positions": "sinusoid", "tubelet": 2})
    model = randomise(VisionTransformer(shape))
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("attn.qkv.bias"):
            value[24:48] = 0
            state[name.replace("qkv.bias", "q_bias")] = value[:24].clone()
            state[name.replace("qkv.bias", "v_bias")] = value[48:].clone()
        else:
            state[name] = value
    torch.save(
        {"model": {f"encoder.{k}": v for k, v in state.items()} | {"mask_token": torch.zeros(1)}}, tmp_path / "f"
    )
    ours = load_vision_transformer(tmp_path / "f", heads=3, size=32, frames=4)
    frames = torch.randn(1, 4, 3, 32, 32)
    same(ours(frames).patches, model(frames).patches)


def plain_frozen_block(block: torch.nn.Module, x: Tensor, frames: int, heads: int) -> Tensor:
    """Frozen in Time's block by one masked attention over all tokens: the same mathematics, the slow way."""
    places = (x.shape[1] - 1) // frames
    frame = torch.arange(x.shape[1] - 1) // places
    place = torch.arange(x.shape[1] - 1) % places

    def attend(module: torch.nn.Module, y: Tensor, group: Tensor) -> Tensor:
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        allowed[1:, 1:] = group[:, None] == group
        q, k, v = module.qkv(y).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~allowed, -1e9).softmax(-1)
        return module.proj((scores @ v).transpose(1, 2).flatten(2))

    timed = x + attend(block.timeattn, block.norm3(x), place)
    x = x + attend(block.attn, block.norm1(timed), frame)
    return x + block.mlp(block.norm2(x))


def test_frozen_in_time_adds_space_to_the_blocks_input_and_cls_looks_at_every_frame() -> None:
    model = randomise(VisionTransformer(VisionShape(**FRAMES, attention="frozen")))
    x = torch.randn(2, 1 + 4 * 16, 24)
    for block in model.blocks:
        same(block(x, (4, 16), None), plain_frozen_block(block, x, 4, 3))


@pytest.mark.parametrize("attention", ["divided", "joint", "frozen", "space"])
def test_padded_frames_change_nothing(attention: str) -> None:
    model = randomise(VisionTransformer(VisionShape(**FRAMES, attention=attention)))
    short = torch.randn(1, 2, 3, 32, 32)
    padded = torch.cat([short, 9 * torch.ones(1, 2, 3, 32, 32)], 1)
    if attention != "space":
        with torch.no_grad():  # fewer frames stretch the time embeddings; give both the same ones
            model.time_embed[:, 1:] = model.time_embed[:, :1]
    present = torch.tensor([[True, True, False, False]])
    with torch.no_grad():
        alone, among = model(short), model(torch.cat([padded, torch.randn_like(padded)]), None, present.expand(2, -1))
    same(among.patches[:1, :2], alone.patches)
    same(among.special[:1, :2] if attention == "space" else among.special[:1], alone.special)


@pytest.mark.parametrize("attention", ["divided", "joint", "frozen", "space"])
def test_only_visible_places_are_looked_at(attention: str) -> None:
    model = randomise(VisionTransformer(VisionShape(**FRAMES, attention=attention)))
    frames = torch.randn(2, 4, 3, 32, 32)
    visible = torch.tensor([[0, 1, 2, 3, 8, 9, 10, 11]]).expand(2, -1)  # rows 0 and 2 of the grid
    changed = frames.clone()
    changed[..., 8:16, :] = 5.0  # row 1 of the grid
    with torch.no_grad():
        one, other = model(frames, visible), model(changed, visible)
        everything = model(frames, torch.arange(16)[None].expand(2, -1))
        plain = model(frames)
    assert torch.equal(one.patches, other.patches) and one.patches.shape == (2, 4, 8, 24)
    same(everything.patches, plain.patches)


@pytest.mark.parametrize("attention", ["divided", "joint", "frozen", "space"])
def test_attention_of_cls_is_a_share_of_every_frame(attention: str) -> None:
    model = randomise(VisionTransformer(VisionShape(**FRAMES, attention=attention)))
    looked = model(torch.randn(2, 4, 3, 32, 32), cls_attention=True).cls_attention
    assert looked is not None
    assert looked.shape == ((2, 4, 16) if attention in ("divided", "space") else (2, 1, 64))
    assert bool((looked > 0).all() and (looked.sum(2) < 1).all() and (looked.sum(2) > 0.5).all())


def test_places_may_differ_between_frames_only_without_divided_attention() -> None:
    visible = torch.stack([torch.arange(5), torch.arange(5, 10), torch.arange(5), torch.arange(5)])[None]
    frames = torch.randn(1, 4, 3, 32, 32)
    assert VisionTransformer(VisionShape(**FRAMES, attention="joint"))(frames, visible).patches.shape[2] == 5
    with pytest.raises(InputError, match="same places in every frame"):
        VisionTransformer(VisionShape(**FRAMES))(frames, visible)


def test_frames_that_do_not_fit_are_refused() -> None:
    model = VisionTransformer(VisionShape(**FRAMES))
    for frames, words in (
        (torch.zeros(1, 4, 3, 24, 32), "24 x 32 pixels; this model reads 32 x 32"),
        (torch.zeros(1, 5, 3, 32, 32), "5 frames; this model has time embeddings for 4"),
        (torch.zeros(1, 4, 3, 32, 32).to(torch.uint8), "floats"),
    ):
        with pytest.raises(InputError, match=words):
            model(frames)
    with pytest.raises(InputError, match="divide evenly"):
        VisionShape(size=30, patch=8)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "a")
    with pytest.raises(InputError, match="not a vision transformer"):
        load_vision_transformer(tmp_path / "a")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_vision_transformer(tmp_path / "b.safetensors")
