"""TeachText: the student's loss is the release's, teachers stand still, and a batch has every clip once."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from videoclip.data import expert_features
from videoclip.data.described_clips import DescribedClips, described_clips, draw_epoch, epoch_batches
from videoclip.errors import InputError
from videoclip.evaluation.similarities import figures, retrieval_figures, text_ranks, video_ranks
from videoclip.losses import distillation_loss, margin_loss
from videoclip.packed import Packed
from videoclip.recipes.experts import Experts, ExpertsConfig
from videoclip.recipes.teachtext import (
    ExpertsSide,
    Options,
    StoredSide,
    TeachText,
    TowersSide,
    learning_rate_at,
    make_optimizer,
)

SIMILARITY = torch.tensor([[0.5, 0.2, 0.4], [0.1, 0.3, 0.35], [0.0, 0.25, 0.6]])


@pytest.mark.parametrize(("normalisation", "value"), [("release", 0.05), ("diagonal", 0.1), ("paper", 0.2)])
def test_the_ranking_loss_is_the_releases(normalisation: str, value: float) -> None:
    assert margin_loss(SIMILARITY, 0.2, normalisation).item() == pytest.approx(value)


def test_the_distillation_loss_is_hubers_of_the_mean_teacher() -> None:
    student = torch.tensor([[0.0, 1.5], [0.0, 0.0]], requires_grad=True)
    teachers = torch.tensor([[[0.0, 0.0], [0.5, 0.0]], [[0.0, 0.0], [0.5, 0.0]]], requires_grad=True)
    loss = distillation_loss(student, teachers)
    assert loss.item() == pytest.approx((1.0 + 0.125) / 4)
    assert distillation_loss(student, teachers, "paper").item() == pytest.approx((1.0 + 0.125) / 2)
    loss.backward()
    assert student.grad is not None and teachers.grad is None


def test_both_losses_agree_with_the_release(reference: Path) -> None:
    arrays = np.load(reference / "teachtext_cenet_tiny.npz")
    similarities, teacher = (torch.from_numpy(arrays[name]) for name in ("ce_eval_sims", "teacher"))
    assert margin_loss(similarities, 0.2).item() == pytest.approx(arrays["margin_loss_fix_norm"], rel=1e-5)
    assert margin_loss(similarities, 0.2, "diagonal").item() == pytest.approx(arrays["margin_loss_no_fix"], rel=1e-5)
    assert distillation_loss(similarities, teacher[None]).item() == pytest.approx(arrays["huber_mean"], rel=1e-5)


# --- Clips --------------------------------------------------------------------------------------------------------


def some_clips(count: int = 12, captions: int = 3, seed: int = 0) -> DescribedClips:
    """Clips whose two experts and whose words say the same of each, with noise."""
    generator = np.random.default_rng(seed)
    content = generator.standard_normal((count, 6))

    def noisy(rows: int) -> np.ndarray:
        return np.repeat(content[:, None], rows, 1) + 0.3 * generator.standard_normal((count, rows, 6))

    ids = [f"video{number}" for number in range(count)]
    experts = {
        "rgb": {video: row[0] for video, row in zip(ids, noisy(1))},
        "audio": dict(zip(ids, noisy(4))),
    }
    experts["audio"][ids[1]] = None  # type: ignore[assignment]
    texts = {
        name: {video: [row[: 2 + i] for i in range(captions)] for video, row in zip(ids, noisy(5))}
        for name in ("one", "two")
    }
    return described_clips(ids, experts, texts)[0]


def new_side(text: str, seed: int) -> ExpertsSide:
    torch.manual_seed(seed)
    config = ExpertsConfig.of({"audio": 6, "rgb": 6}, 6, {"audio": 2}, width=8, text_clusters=2, text_ghosts=1)
    return ExpertsSide(Experts(config), text)


def test_an_epoch_has_every_clip_once_with_one_of_its_own_texts() -> None:
    clips = some_clips(13)
    batches = list(epoch_batches(clips, 4, np.random.default_rng(0)))
    assert [len(batch) for batch in batches] == [4, 4, 5]  # a last batch of one joins the one before
    assert sorted(torch.cat([batch.rows for batch in batches]).tolist()) == list(range(13))
    for batch in batches:
        assert torch.equal(clips.owners[batch.captions], batch.rows)
        assert torch.equal(batch.texts["one"].split()[0], clips.texts["one"].split()[batch.captions[0]])
    assert (
        torch.cat([b.captions for b in batches]).tolist()
        != torch.cat([b.captions for b in epoch_batches(clips, 4, np.random.default_rng(1))]).tolist()
    )


def test_texts_that_are_masked_are_never_drawn_and_clips_without_any_are_left_out() -> None:
    counts = np.array([2, 3, 1, 2])
    mask = np.array([0, 1, 1, 0, 0, 0, 1, 1])
    for seed in range(20):
        drawn = draw_epoch(counts, 4, np.random.default_rng(seed), mask)
        assert sorted(np.concatenate([rows for rows, _ in drawn])) == [0, 1, 3]
        assert mask[np.concatenate([captions for _, captions in drawn])].all()
    with pytest.raises(InputError, match="1 clips with texts in batches of 4: at least two"):
        draw_epoch(counts, 4, np.random.default_rng(0), np.array([1, 0, 0, 0, 0, 0, 0, 0]))
    with pytest.raises(InputError, match="a mask of 3 texts where there are 8"):
        draw_epoch(counts, 4, np.random.default_rng(0), mask[:3])


def test_videos_that_no_model_could_place_are_named() -> None:
    row, text = np.ones(4), [np.ones((2, 3))]
    experts = {"rgb": {"a": row, "b": None, "c": row}, "flow": {"a": row, "c": row}}
    clips, rejected = described_clips(["a", "b", "c"], experts, {"w2v": {"a": text, "b": text}})
    assert clips.ids == ("a",)
    assert rejected == [("b", "has none of the experts flow, rgb"), ("c", "has no text encoded by w2v")]
    with pytest.raises(InputError, match=r"video 'c': expert rgb of shape \(5,\), expected \[4\]"):
        described_clips(["a", "c"], {"rgb": {"a": row, "c": np.ones(5)}}, {"w2v": {"a": text, "c": text}})
    with pytest.raises(InputError, match="video 'a': 1 texts encoded by w2v, but 2 by gpt"):
        described_clips(["a"], {"rgb": {"a": row}}, {"w2v": {"a": text}, "gpt": {"a": text * 2}})
    with pytest.raises(InputError, match="none of 1 videos can be used"):
        described_clips(["z"], experts, {"w2v": {}})


# --- Students and teachers ----------------------------------------------------------------------------------------


def test_a_student_comes_to_agree_with_the_mean_of_its_teachers() -> None:
    clips = some_clips()
    teachers = [new_side("one", 1).eval(), new_side("two", 2).eval()]
    recipe = TeachText(new_side("one", 3), teachers, Options(distillation=20.0)).train()
    before = [parameter.clone() for teacher in teachers for parameter in teacher.state_dict().values()]
    optimizer = make_optimizer(recipe.student, 1e-2)
    losses = []
    for epoch in range(25):
        for batch in epoch_batches(clips, 6, np.random.default_rng(epoch)):
            outputs = recipe(batch)
            optimizer.zero_grad()
            outputs["loss"].backward()
            optimizer.step()
            losses.append(outputs["distillation"].item())
    assert np.mean(losses[-10:]) < 0.2 * np.mean(losses[:10])
    after = [parameter for teacher in teachers for parameter in teacher.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after))  # batch statistics included
    assert not any(parameter.grad is not None for teacher in teachers for parameter in teacher.parameters())


def test_a_stored_teacher_is_the_live_one() -> None:
    clips = some_clips()
    side = new_side("two", 1).eval()
    with torch.no_grad():
        videos, _ = side.model.embed_experts(clips.experts, {})
        texts, _ = side.model.embed_words(clips.texts["two"])
    batch = next(epoch_batches(clips, 5, np.random.default_rng(3)))
    everything = DescribedClips(clips.ids, clips.experts, {}, clips.texts, clips.counts)
    live = side(everything.batch(batch.rows, batch.captions))
    assert torch.allclose(StoredSide(videos, texts)(batch), live, atol=1e-6)


class Towers(nn.Module):
    """Two towers that embed the mean of a sequence, at any length."""

    def embed_video(self, tokens: Packed) -> Tensor:
        return 7 * torch.stack([rows.mean(0) for rows in tokens.split()])

    def embed_text(self, word_ids: Packed) -> Tensor:
        return 3 * torch.stack([rows.mean(0) for rows in word_ids.split()])


def test_any_model_with_two_towers_can_teach_and_is_compared_by_cosines() -> None:
    clips = some_clips()
    present = DescribedClips(
        clips.ids, {**clips.experts, "rgb": clips.texts["two"].take(clips.first)}, {}, clips.texts, clips.counts
    )
    batch = next(epoch_batches(present, 5, np.random.default_rng(3)))
    similarities = TowersSide(Towers(), "rgb", "one")(batch)
    assert similarities.shape == (5, 5) and similarities.abs().max() <= 1 + 1e-6
    with pytest.raises(InputError, match="rgb: one row a clip"):
        TowersSide(Towers(), "rgb", "one")(next(epoch_batches(clips, 5, np.random.default_rng(3))))


def test_the_release_trains_with_radam_and_steps_down_every_epoch() -> None:
    weight = nn.Linear(1, 1, bias=False)
    nn.init.ones_(weight.weight)
    optimizer = make_optimizer(weight, 0.1, 0.5)
    weight.weight.grad = torch.zeros(1, 1)
    optimizer.step()
    assert weight.weight.item() == pytest.approx(1 - 0.1 * 0.5)  # decoupled: no gradient, and still lr * decay
    assert learning_rate_at(0) == 1e-3 and learning_rate_at(2) == pytest.approx(1e-3 * 0.95**2)


# --- Evaluation ---------------------------------------------------------------------------------------------------


def test_ties_take_their_mean_place_and_a_video_its_best_text() -> None:
    similarities = np.array([[0.9, 0.1, 0.9], [0.5, 0.5, 0.5], [0.1, 0.2, 0.3], [0.0, 0.9, 0.2]])
    owners = np.array([0, 1, 2, 1])
    assert text_ranks(similarities, owners).tolist() == [1.5, 2.0, 1.0, 1.0]
    # Video 0: 0.9 is first. Video 1: its texts have 0.5 and 0.9. Video 2: 0.3 behind 0.9 and 0.5.
    assert video_ranks(similarities, owners).tolist() == [1.0, 1.0, 3.0]
    found = retrieval_figures(similarities, owners)
    assert found["text_to_video"]["R@1"] == 50 and found["text_to_video"]["R@5"] == 100
    values = figures(np.array([1.0, 5.5, 10.0, 60.0]))  # 5.5, counted from 0, is below 5
    assert (values["R@1"], values["R@5"], values["R@10"], values["R@50"]) == (25, 50, 75, 75)
    assert values["geometric_mean"] == pytest.approx((25 * 50 * 75) ** (1 / 3)) and values["MedR"] == 7.75
    with pytest.raises(InputError, match="video 1 of 3 has no text"):
        video_ranks(similarities, np.array([0, 0, 2, 0]))


# --- Files of the release -----------------------------------------------------------------------------------------


def dump(path: Path, value: object) -> Path:
    path.write_bytes(pickle.dumps(value))
    return path


def test_the_releases_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("video1\n\nvideo0.mp4.avi\n")
    assert expert_features.read_video_list(tmp_path / "list.txt") == ["video1", "video0.mp4.avi"]
    assert expert_features.read_video_list(tmp_path / "list.txt", suffixes=False) == ["video1", "video0"]
    captions = dump(tmp_path / "raw-captions.pkl", {"video0": [["a", "dog"], ["it", "runs"]]})
    assert expert_features.read_captions(captions) == {"video0": ["a dog", "it runs"]}
    assert expert_features.read_caption_choice(dump(tmp_path / "idx.pkl", {"video0": np.int64(3)})) == {"video0": 3}
    expert = expert_features.read_expert(dump(tmp_path / "e.pickle", {"v0": np.ones(4), "v1": float("nan")}))
    assert expert["v0"] is not None and expert["v0"].dtype == np.float32 and expert["v1"] is None
    sequence = expert_features.read_expert(dump(tmp_path / "a.pickle", {"v0": np.ones((3, 4)), "v1": np.nan}))
    assert sequence["v0"] is not None and sequence["v0"].shape == (3, 4)
    texts = expert_features.read_text_features(dump(tmp_path / "w2v.pkl", {"v0": [np.ones((2, 5)), np.ones((7, 5))]}))
    assert [text.shape for text in texts["v0"]] == [(2, 5), (7, 5)]
    masks = expert_features.read_masks(dump(tmp_path / "less100.pkl", {"v0": np.array([0.0, 1.0])}))
    assert masks["v0"].tolist() == [False, True]


def test_stored_teachers_are_the_sum_over_their_experts(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    clip = {"scene": generator.standard_normal(3), "rgb": generator.standard_normal(2)}
    text = {"scene": 0.1 * generator.standard_normal((4, 3)), "rgb": list(0.1 * generator.standard_normal((4, 2)))}
    path = dump(tmp_path / "teacher.pkl", {"v0": {"vid_embds": clip, "text_embds": text}})
    read = expert_features.read_teacher(path)["v0"]
    expected = text["scene"] @ clip["scene"] + np.stack(text["rgb"]) @ clip["rgb"]
    assert np.allclose(read.texts @ read.clip, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("reader", "value", "message"),
    [
        ("read_expert", {"v0": np.ones(4), "v1": np.ones(5)}, "video 'v1': features .* wide 4 or 5"),
        ("read_expert", {"v0": np.array([1, np.inf])}, "video 'v0': features .* not finite"),
        ("read_expert", {"v0": "words"}, "video 'v0': expected numbers, found str"),
        ("read_expert", [np.ones(3)], "expected values by video id"),
        ("read_text_features", {"v0": [np.ones((2, 5)), np.ones((2, 4))]}, "video 'v0': words 4 and 5 wide"),
        ("read_text_features", {"v0": [np.ones((0, 5))]}, "video 'v0': a caption that is not"),
        ("read_text_features", {"v0": []}, "video 'v0': no captions"),
        ("read_captions", {"v0": [["a"], []]}, "video 'v0': an empty caption"),
        ("read_caption_choice", {"v0": "first"}, "video 'v0': 'first' is no number"),
        ("read_teacher", {"v0": {"vid_embds": {"a": np.ones(2)}}}, "video 'v0': expected vid_embds and text_embds"),
        (
            "read_teacher",
            {"v0": {"vid_embds": {"a": np.ones(2)}, "text_embds": {"a": np.ones((3, 4))}}},
            "video 'v0': embeddings of different widths",
        ),
        (
            "read_teacher",
            {"v0": {"vid_embds": {"a": np.ones(2)}, "text_embds": {"a": np.ones((3, 2))}}},
            "video 'v0': text embeddings without the experts' weights",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, reader: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=f"file.pkl: {message}"):
        getattr(expert_features, reader)(dump(tmp_path / "file.pkl", value))
