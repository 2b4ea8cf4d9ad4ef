"""`videoclip prompt`, `evaluate actions` and `evaluate detection`: classes learned around frozen towers and found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_collaborative_experts import by_name, names_and_shapes, saved
from test_prompting import small_clip, weight_by_name

from pipelines.cli import main
from pipelines.evaluate_recognition import ActionsConfig, DetectionConfig, evaluate_actions, evaluate_detection
from pipelines.prompting import PromptConfig, prompt
from videoclip.data.captions import NO_CAPTIONS
from videoclip.data.shards import Manifest, Shards, ShardWriter, VideoRecord
from videoclip.data.words import train_wordpiece
from videoclip.errors import InputError
from videoclip.evaluation.recognition import ListedClips, draw_batch
from videoclip.files import read_json
from videoclip.packed import Packed
from videoclip.parts.clip import ClipConfig
from videoclip.recipes import from_pretrained
from videoclip.recipes.experts import Experts
from videoclip.recipes.prompting import Options
from videoclip.recipes.videoclip import Options as VideoOptions
from videoclip.recipes.videoclip import build

CLASSES = ("chop_onion", "stir_soup", "fry_fish", "peel_egg")


def write_lists(folder: Path, **lists: list[str]) -> None:
    for name, lines in lists.items():
        (folder / f"{name}.list").write_text("\n".join(lines))


@pytest.fixture
def actions(tmp_path: Path) -> PromptConfig:
    """Videos of 40 frames, of which 15 to 25 show one of four things, and an untrained dual encoder."""
    generator = np.random.default_rng(0)
    content = 2 * generator.standard_normal((len(CLASSES), 12))
    writer = ShardWriter(tmp_path / "shards", Manifest("random", "f" * 64, 12))
    lines, database = [], {}
    for number in range(32):
        label, start = number % 4, 2 + number // 2
        tokens = 0.3 * generator.standard_normal((40, 12))
        tokens[start : start + 20] += content[label]
        writer.add(VideoRecord(f"v{number}", 40.0, tokens.astype(np.float16), NO_CAPTIONS))
        lines.append(f"{CLASSES[label]}/v{number}.avi")
        window = {"segment": [start, start + 20], "label": CLASSES[label]}
        database[f"v{number}"] = {"subset": "validation", "annotations": [window]}
    writer.close()
    write_lists(tmp_path, classes=list(CLASSES), train=lines[:20], test=lines[20:])
    (tmp_path / "truth.json").write_text(json.dumps({"database": database}))
    tokenizer = train_wordpiece([name.replace("_", " ") for name in CLASSES], 60)
    torch.manual_seed(0)
    options = VideoOptions(width=16, layers=1, heads=2, dropout=0.0, max_seconds=1, max_words=12)
    build(options, Shards(tmp_path / "shards").manifest, tokenizer).save_pretrained(tmp_path / "towers")
    return PromptConfig(
        tmp_path / "shards",
        tmp_path / "classes.list",
        tmp_path / "train.list",
        tmp_path / "test.list",
        model=Options(towers=str(tmp_path / "towers"), prefix=2, postfix=2, frames=8, heads=2),
        steps=60,
        batch=16,
        learning_rate=1e-2,
        passes=0,
        output=tmp_path / "run",
    )


def test_classes_are_learned_recognised_and_localised(
    actions: PromptConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = prompt(actions)
    assert figures["top1"] > 80 and figures["chance"] == 25 and figures["videos"] == 12
    assert prompt(actions) == figures and "nothing to do" in capsys.readouterr().out
    model, lists = actions.output / "model", (actions.classes, tmp_path / "test.list")
    again = evaluate_actions(ActionsConfig(model, actions.shards, *lists, passes=0, output=tmp_path / "a/metrics.json"))
    assert again == figures
    rows = [json.loads(line) for line in (tmp_path / "a/predictions.jsonl").read_text().splitlines()]
    assert 100 * np.mean([row["answer"] == row["class"] for row in rows]) == pytest.approx(figures["top1"], abs=0.01)
    detection = DetectionConfig(model, actions.shards, actions.classes, tmp_path / "truth.json", output=tmp_path / "d")
    found = evaluate_detection(replace(detection, output=tmp_path / "d/metrics.json"))
    assert found["videos"] == 32 and found["mAP@0.5"] > 2 * found["commonest class everywhere"]["mAP"]
    perfect = {f"v{n}": [{"segment": [2 + n // 2, 22 + n // 2], "score": 1}] for n in range(32)}
    (tmp_path / "proposals.json").write_text(json.dumps({"results": perfect}))
    given = replace(detection, proposals=tmp_path / "proposals.json", rule="thumos", output=tmp_path / "e/metrics.json")
    assert evaluate_detection(given)["mAP"] > 80


def test_few_shot_splits_are_trained_from_anew_and_averaged(actions: PromptConfig, tmp_path: Path) -> None:
    lines = (tmp_path / "train.list").read_text().splitlines() + (tmp_path / "test.list").read_text().splitlines()
    for number, ways in enumerate(((0, 1), (2, 3))):
        for side, numbers in (("train", range(8)), ("test", range(20, 32))):
            (tmp_path / "few" / side).mkdir(parents=True, exist_ok=True)
            kept = [lines[n] for n in numbers if n % 4 in ways]
            (tmp_path / "few" / side / f"split_{number}.list").write_text("\n".join(kept))
    few = replace(actions, train=tmp_path / "few", test=None, steps=20)
    figures = prompt(few)
    assert figures["splits"] == 2 and figures["chance"] == 50 and figures["top1"] > 60
    one, other = (from_pretrained(few.output / f"split-{n}" / "model") for n in range(2))
    assert not torch.equal(one.prompts.embedding.weight, other.prompts.embedding.weight)  # type: ignore[attr-defined]


def test_open_sets_ask_for_the_classes_that_were_not_trained_on(actions: PromptConfig, tmp_path: Path) -> None:
    for side, names in (("train", CLASSES[:2]), ("test", CLASSES[2:])):
        (tmp_path / "open" / side).mkdir(parents=True)
        (tmp_path / "open" / side / "split_0.list").write_text("\n".join(names))
    figures = prompt(replace(actions, open_set=tmp_path / "open", steps=5))
    assert figures["chance"] == 50 and figures["videos"] == 6
    with pytest.raises(InputError, match="give one of them"):
        prompt(replace(actions, train=tmp_path, open_set=tmp_path / "open", output=tmp_path / "other"))


def test_what_does_not_fit_is_named(actions: PromptConfig, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps(dict.fromkeys(CLASSES, "chop " * 40)))
    with pytest.raises(InputError, match=r"the class 'chop_onion' has 40 words, but .* there is room for 9"):
        prompt(replace(actions, names=tmp_path / "names.json"))
    write_lists(tmp_path, test=["chop_onion/nowhere"])
    with pytest.raises(InputError, match="1 of 1 listed videos have no features, for instance 'nowhere'"):
        prompt(replace(actions, steps=1))
    with pytest.raises(InputError, match="name the test videos"):
        prompt(replace(actions, test=None, output=tmp_path / "second"))
    config = ActionsConfig(tmp_path / "towers", actions.shards, actions.classes, tmp_path / "test.list")
    with pytest.raises(InputError, match="not a model of the recipe prompting; train one with `videoclip prompt`"):
        evaluate_actions(config)


def test_a_step_compares_with_its_own_classes_and_some_others() -> None:
    """As the release does where there are more than 400; labels are those of the classes that are left."""
    frames = [np.full((4, 2), label, np.float32) for label in (5, 5, 3)]
    clips = ListedClips(frames, np.array([5, 5, 3]), [])
    names = Packed(torch.arange(8), torch.ones(8, dtype=torch.int64))
    batch = draw_batch(clips, names, 3, 2, np.random.default_rng(0), 4)
    assert len(batch.classes) == 4 and len(set(batch.classes.rows.tolist())) == 4
    assert torch.equal(batch.classes.rows[batch.labels], batch.frames.rows[::2, 0].long())
    assert len(draw_batch(clips, names, 3, 2, np.random.default_rng(0), 1).classes) == 2, "never fewer than its own"


def test_the_command_prompts_and_evaluates(actions: PromptConfig, tmp_path: Path) -> None:
    files = f"--shards {actions.shards} --classes {actions.classes}"
    train = f"prompt {files} --train {actions.train} --test {actions.test} --model.towers {actions.model.towers}"
    train += f" --steps 1 --batch 4 --model.prefix 2 --model.postfix 2 --model.frames 8 --output {tmp_path / 'c'}"
    assert main(train.split()) == 0 and (tmp_path / "c/model/config.json").exists()
    asked = f"{files} --model {tmp_path / 'c/model'} --output {tmp_path / 'm.json'}"
    assert main(f"evaluate actions {asked} --annotations {actions.test}".split()) == 0
    assert main(f"evaluate detection {asked} --annotations {tmp_path / 'truth.json'} --rule thumos".split()) == 0
    assert read_json(tmp_path / "m.json")["mAP"] >= 0


# --- Converting -----------------------------------------------------------------------------------------------------


def test_checkpoints_of_both_releases_become_model_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = small_clip()
    state = {f"clipmodel.{name}": value for name, value in clip.state_dict().items()}
    shapes = {"embedding.weight": (30, 32), "temporalEmbedding.weight": (6, 24)}
    state |= {name: weight_by_name(name, shape) for name, shape in shapes.items()}
    torch.save({"state_dict": state}, tmp_path / "prompts.pth.tar")
    output = tmp_path / "prompts"
    words = ["convert", "efficient-prompt", str(tmp_path / "prompts.pth.tar"), str(output), "--prefix", "4"]
    assert main([*words, "--postfix", "4"]) == 0
    assert "4+X+4, absolute" in capsys.readouterr().out
    model = from_pretrained(output)
    assert torch.equal(model.prompts.embedding.weight, state["embedding.weight"])  # type: ignore[attr-defined]
    train_wordpiece(["a few words"], 40).save(tmp_path / "tokenizer")
    assert main([*words, "--tokenizer", str(tmp_path / "tokenizer")]) == 2
    assert "trained with another tokenizer" in capsys.readouterr().err and ClipConfig().positions == 77


def test_a_checkpoint_of_experts_becomes_a_model_folder(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = names_and_shapes(reference / "teachtext_ce_tiny_keys.tsv")
    saved(tmp_path / "trained_model.pth", {name: by_name(name, shape) for name, shape in shapes.items()})
    assert main(["convert", "experts", str(tmp_path / "trained_model.pth"), str(tmp_path / "ce")]) == 0
    assert "3 experts that gate each other (CE)" in capsys.readouterr().out
    assert not Experts.from_pretrained(tmp_path / "ce").config.masked
    assert read_json(tmp_path / "ce" / "config.json")["recipe"] == "experts"
