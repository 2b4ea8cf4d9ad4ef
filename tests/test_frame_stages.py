"""Recipes on frames from the command line: from videos and pictures to answers, and through Ray to re-ranked clips."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import pretrain_frames
from pipelines.cli import main
from tests.conftest import write_video
from videoclip.convert.alpro import for_questions
from videoclip.data.augmentation import CHANGES, augment_picture, augment_video
from videoclip.data.captions import Captions
from videoclip.data.frame_shards import FrameShards
from videoclip.data.shards import Manifest, ShardWriter, VideoRecord
from videoclip.encoders.catalog import make_video_encoder
from videoclip.files import read_json, read_json_lines, write_json, write_json_lines
from videoclip.parts.frame_pairs import mixed_steps
from videoclip.recipes import RECIPES, alpro, from_pretrained

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "grey": (99, 99, 99)}
SMALL = "--model.patch 8 --model.frames 2 --model.width 32 --model.heads 2 --model.vision-layers 1"
SMALL += " --model.text-layers 1 --model.projection 16 --model.dropout 0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of one colour each and pictures of the same, with what is said of them, as frames of 32 x 32."""
    folder = tmp_path_factory.mktemp("frames")
    rows, pictures = [], []
    for name, colour in COLOURS.items():
        picture = np.full((48, 64, 3), colour, np.uint8)
        (folder / "videos").mkdir(exist_ok=True)
        write_video(folder / "videos" / f"{name}.mp4", [0.0, 0.5, 1.0, 1.5, 2.0], lambda n, p=picture: p)
        (folder / "pictures").mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / "pictures" / f"p-{name}.jpg")
        rows.append({"video_id": name, "text": f"something {name}", "txt_len": 2})
        pictures.append({"image": f"p-{name}.jpg", "caption": [f"a {name} wall"]})
    (folder / "videos" / "broken.mp4").write_bytes(b"no video")
    (folder / "pictures" / "p-cut.jpg").write_bytes((folder / "pictures" / "p-red.jpg").read_bytes()[:300])
    write_json_lines(folder / "webvid.jsonl", [*rows, {"video_id": "broken", "text": "x"}])
    write_json(folder / "cc3m.json", [*pictures, {"image": "p-cut.jpg", "caption": "cut"}])
    for kind, captions in (("videos", "webvid.jsonl"), ("pictures", "cc3m.json")):
        words = f"extract frames --folder {folder / kind} --captions {folder / captions} --size 32"
        assert main([*words.split(), "--output", str(folder / "shards" / kind)]) == 0
    return folder


def test_videos_and_pictures_become_shards_of_frames_and_broken_files_are_named(folder: Path) -> None:
    videos, pictures = (FrameShards(folder / "shards" / kind) for kind in ("videos", "pictures"))
    assert videos.video_ids() == sorted(COLOURS) and videos.count(0) >= 2
    assert pictures.video_ids() == sorted(f"p-{name}" for name in COLOURS) and pictures.count(0) == 1
    assert videos.captions(0).text == ["something blue"] and pictures.captions(0).text == ["a blue wall"]
    np.testing.assert_allclose(videos.frames(0, np.array([1]))[0].mean((0, 1)), COLOURS["blue"], atol=12)
    for kind, name in (("videos", "broken"), ("pictures", "p-cut")):
        assert [row["video_id"] for row in read_json_lines(folder / "shards" / kind / "quarantine.jsonl")] == [name]


def pretraining(folder: Path, output: Path, more: str = "") -> list[str]:
    words = f"pretrain frames --shards {folder / 'shards' / 'videos'} --pictures {folder / 'shards' / 'pictures'}"
    words += f" --output {output} {SMALL} --batch 4 --steps 6 --checkpoint-steps 2 --max-words 8 {more}"
    return words.split()


@pytest.mark.parametrize("recipe", ["frozen-in-time", "alpro"])
def test_pretraining_mixes_pictures_with_videos_and_goes_on_where_it_stopped(
    recipe: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = f"--recipe {recipe} --optimizer.learning-rate 1e-3 --optimizer.warmup-steps 1 "
    more += "--model.single-frame-steps 3" if recipe == "frozen-in-time" else "--model.losses vtc vtm mlm"
    assert main(pretraining(folder, tmp_path / "straight", more)) == 0
    rows = read_json_lines(tmp_path / "straight" / "metrics.jsonl")
    assert {row["pictures"] for row in rows} == {0.0, 1.0}
    if recipe == "frozen-in-time":
        shown = {(row["pictures"], row["step"] >= 3): row["frames"] for row in rows}
        assert all(count == (2 if late and not picture else 1) for (picture, late), count in shown.items())
    plain, steps = pretrain_frames.step, []

    def stops(*arguments: object) -> dict[str, float]:
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(1)
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain_frames, "step", stops)
    assert main(pretraining(folder, tmp_path / "stopped", more)) == 130
    monkeypatch.setattr(pretrain_frames, "step", plain)
    assert main(pretraining(folder, tmp_path / "stopped", more)) == 0
    models = [from_pretrained(tmp_path / name / "model").state_dict() for name in ("straight", "stopped")]
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())


def test_every_step_is_of_one_collection_and_each_is_gone_through() -> None:
    steps = list(mixed_steps([6, 20], 4, 200, seed=1))
    shares = np.bincount([source for source, _ in steps]) / len(steps)
    assert abs(shares[0] - 0.5) < 0.15
    of_second = np.concatenate([chosen for source, chosen in steps if source == 1])
    assert sorted(of_second[:20].tolist()) == list(range(20)), "all of it before any comes again"
    assert all(len(set(chosen.tolist())) == 4 for _, chosen in steps)


def test_a_clip_is_changed_alike_in_all_frames_and_keeps_its_size() -> None:
    generator = np.random.default_rng(0)
    frame = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    changed = [augment_video(np.stack([frame, frame]), generator) for _ in range(20)]
    assert all(np.array_equal(*clip) and clip.shape == (2, 32, 32, 3) for clip in changed)
    assert len({clip.tobytes() for clip in changed}) > 10
    assert augment_picture(frame[None], generator).shape == (1, 32, 32, 3)
    picture = Image.fromarray(frame)
    assert np.array_equal(np.asarray(CHANGES["flip"](picture, 0.5)), frame[:, ::-1])
    moved = np.asarray(CHANGES["translate_x"](picture, 0.5))
    assert np.array_equal(moved[:, :27], frame[:, 5:]) and (moved[:, 27:] == 128).all()


def test_a_pretrained_alpro_learns_to_answer_and_is_asked_from_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "--recipe alpro --model.losses vtc vtm --optimizer.learning-rate 3e-3 --optimizer.warmup-steps 5"
    words = pretraining(folder, tmp_path / "pretrained", more)
    words[words.index("--steps") + 1] = "40"
    assert main(words) == 0
    model, shards = str(tmp_path / "pretrained" / "model"), str(folder / "shards" / "videos")
    test = tmp_path / "msrvtt.csv"
    test.write_text("video_id,sentence\n" + "".join(f"{name},something {name}\n" for name in COLOURS))
    metrics = tmp_path / "retrieval" / "metrics.json"
    asked = ["evaluate", "msrvtt", "--model", model, "--shards", shards, "--annotations", str(test)]
    assert main([*asked, "--rerank", "3", "--output", str(metrics)]) == 0
    assert read_json(metrics)["queries"] == 4 and "by_contrast" in read_json(metrics)
    assert len(read_json_lines(metrics.with_name("predictions.jsonl"))) == 4

    questions = [
        {"video_id": name, "question": "what is it", "answer": name, "answer_type": "what"} for name in COLOURS
    ]
    write_json_lines(tmp_path / "questions.jsonl", questions)
    files = ["--train", str(tmp_path / "questions.jsonl"), "--test", str(tmp_path / "questions.jsonl")]
    tuned = ["finetune", "questions", "--model", model, "--shards", shards, *files, "--no-augmented"]
    rates = "--optimizer.learning-rate 3e-3 --optimizer.warmup-steps 4"
    tuned += f"--epochs 40 --batch 4 --frames 3 {rates}".split()
    assert main([*tuned, "--output", str(tmp_path / "tuned")]) == 0
    found = read_json(tmp_path / "tuned" / "metrics.json")
    assert found["accuracy"] == found["accuracy_what"] >= 75 and found["majority"] == 25
    asked = ["evaluate", "open-questions", "--shards", shards, "--annotations", str(tmp_path / "questions.jsonl")]
    again = [*asked, "--output", str(tmp_path / "again" / "metrics.json")]
    assert main([*again, "--model", str(tmp_path / "tuned" / "model")]) == 0
    assert read_json(tmp_path / "again" / "metrics.json")["accuracy"] == found["accuracy"]
    capsys.readouterr()
    assert main([*again, "--model", model]) == 2
    assert "answers no questions" in capsys.readouterr().err


def test_a_classifier_is_kept_for_the_same_answers_and_new_for_others(folder: Path) -> None:
    from tests.small_recipes import make_alpro

    source = make_alpro()
    source.frozen.tokenizer = object()  # type: ignore[assignment]  # is handed on
    first = for_questions(source, ["a", "b"], frames=4)
    assert first.shape.vision.frames == 4 and first.prompter is None and not first.config.losses
    assert torch.equal(first.itm_head.weight, source.itm_head.weight)
    same, other = for_questions(first, ["a", "b"], 4), for_questions(first, ["b", "a"], 4)
    assert torch.equal(same.classifier[0].weight, first.classifier[0].weight)
    assert not torch.equal(other.classifier[0].weight, first.classifier[0].weight)


def test_what_cannot_be_is_said_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: Path
) -> None:
    shards = folder / "shards" / "videos"

    def refused(words: str) -> str:
        capsys.readouterr()
        assert main(words.split()) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        return error

    assert "know" in refused(f"pretrain frames --shards {shards} --recipe margin")
    assert "no such folder" in refused(f"extract frames --folder {tmp_path / 'none'} --output {tmp_path / 'x'}")
    assert "--size" in refused(f"extract frames --folder {folder / 'videos'} --size 4 --output {tmp_path / 'x'}")
    bare = tmp_path / "bare"
    assert main(f"extract frames --folder {folder / 'pictures'} --size 16 --output {bare}".split()) == 0
    assert "no captions" in refused(f"pretrain frames --shards {bare} --output {tmp_path / 'y'} {SMALL}")
    assert "one size" in refused(f"pretrain frames --shards {bare} --pictures {shards} --output {tmp_path / 'z'}")
    (tmp_path / "train.pkl").write_bytes(b"x")
    pickled = f"extract frames --folder {folder / 'videos'} --captions {tmp_path / 'train.pkl'}"
    assert "a pickle may run code" in refused(f"{pickled} --output {tmp_path / 'p'}")


def test_recipes_are_listed_with_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for name in RECIPES:
        assert f"{name}: " in printed
    assert printed.count("needs:") == printed.count("approximate:") == len(RECIPES)


# --- Through Ray ------------------------------------------------------------------------------------------------------


def pixel_shards(folder: Path) -> None:
    """Four videos of ten seconds, one frame of 32 x 32 a second, as the encoder `pixels-32` leaves them."""
    encoder = make_video_encoder("pixels-32")
    encoder.save(folder)
    writer = ShardWriter(folder, Manifest(encoder.name, encoder.fingerprint(), encoder.dimension))
    for number, (name, colour) in enumerate(COLOURS.items()):
        start = np.array([1.0, 5.0], np.float32)
        captions = Captions(start, start + 3, [f"{name} onion", f"a {name} carrot"])
        tokens = encoder.encode_clips(np.full((10, 1, 32, 32, 3), colour, np.uint8)).astype(np.float16)
        writer.add(VideoRecord(f"v{number}", 10.0, tokens, captions))
    writer.close()


@pytest.mark.slow
def test_fusion_and_alpro_are_pretrained_through_ray_and_re_rank_what_they_find(ray: None, tmp_path: Path) -> None:
    """ALPRO in its three stages: a prompter, all four losses with it, retrieval by matching; both re-rank."""
    pixel_shards(tmp_path / "shards")
    entities = [*COLOURS, "onion", "carrot"]
    (tmp_path / "entities.txt").write_text("".join(f"{name} 4\n" for name in entities))
    common = f"pretrain --shards {tmp_path / 'shards'} --epochs 2 --videos-per-batch 2 --vocabulary 200 --threads 1"
    common += " --clips.clips-per-video 2 --clips.max-words 12 --clips.max-seconds 6 --clips.min-words 2"
    small = f"--recipe alpro {SMALL} --model.fusion-layers 1 --model.losses"
    assert main([*common.split(), *f"{small} vtc --output {tmp_path / 'prompter'}".split()]) == 0
    prompter = f"--model.prompter {tmp_path / 'prompter' / 'model'} --model.entities {tmp_path / 'entities.txt'}"
    run = f"{small} vtc vtm mlm pem {prompter} --output {tmp_path / 'alpro'}"
    assert main([*common.split(), *run.split()]) == 0
    fusion = "--recipe fusion --model.width 16 --model.layers 1 --model.heads 2 --model.fusion-layers 1"
    assert main([*common.split(), *fusion.split(), "--output", str(tmp_path / "fusion")]) == 0
    for name, losses in (("alpro", ("vtc", "vtm", "mlm", "pem")), ("fusion", ("vtc", "vtm", "mlm"))):
        rows = read_json_lines(tmp_path / name / "metrics.jsonl")
        assert len(rows) == 4 and all(np.isfinite(row[loss]) for row in rows for loss in losses)
    trained = from_pretrained(tmp_path / "alpro" / "model")
    assert isinstance(trained, alpro.Recipe) and trained.prompter is not None
    assert trained.prompter.names == tuple(entities)

    steps = [{"segment": [1, 4], "sentence": "onion"}, {"segment": [5, 8], "sentence": "carrot"}]
    database = {f"v{n}": {"subset": "validation", "duration": 10, "annotations": steps} for n in range(4)}
    (tmp_path / "youcook2.json").write_text(json.dumps({"database": database}))
    for name in ("alpro", "fusion"):
        words = f"evaluate youcook2 --model {tmp_path / name / 'model'} --shards {tmp_path / 'shards'} --rerank 3"
        words += f" --annotations {tmp_path / 'youcook2.json'} --output {tmp_path / 'metrics' / name}.json"
        assert main(words.split()) == 0
        found = read_json(tmp_path / "metrics" / f"{name}.json")
        assert found["reranked"] == 3 and found["queries"] == 8 and "by_contrast" in found
