"""Fine-tuning on described clips: R@K before and after, alone and with teachers."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipelines.checkpointing import Orders
from pipelines.cli import main
from pipelines.finetune import FinetuneConfig, Split, finetune
from pipelines.runs import Metrics
from pipelines.stopping import Stopped
from pipelines.teachtext import Network, TeachTextConfig, Training, teachtext
from videoclip.data.captions import NO_CAPTIONS
from videoclip.data.shards import Manifest, Shards, ShardWriter, VideoRecord
from videoclip.data.words import train_wordpiece
from videoclip.errors import InputError
from videoclip.recipes import from_pretrained
from videoclip.recipes.experts import Experts
from videoclip.recipes.videoclip import Options, build
from videoclip.training import OptimizerConfig

NOUNS = ("onion", "egg", "fish", "carrot", "tofu", "kale")
VERBS = ("chop", "stir", "fry", "peel")


@pytest.fixture
def benchmark(tmp_path: Path) -> FinetuneConfig:
    """Videos whose tokens say which of 24 things is done, described in YouCook2's form, and untrained models."""
    generator = np.random.default_rng(0)
    content = generator.standard_normal((len(VERBS), len(NOUNS), 12))
    writer = ShardWriter(tmp_path / "shards", Manifest("random", "f" * 64, 12))
    database = {}
    for number in range(48):
        verb, noun = divmod(number % 24, 6)
        tokens = content[verb, noun] + 0.4 * generator.standard_normal((20, 12))
        writer.add(VideoRecord(f"v{number}", 20.0, tokens.astype(np.float16), NO_CAPTIONS))
        segments = [{"segment": [s, s + 8], "sentence": f"{VERBS[verb]} the {NOUNS[noun]}"} for s in (1, 10)]
        subset = "training" if number < 24 else "validation"
        database[f"v{number}"] = {"subset": subset, "annotations": segments if number < 24 else segments[:1]}
    database["gone"] = {"subset": "training", "annotations": [{"segment": [0, 4], "sentence": "a video that is lost"}]}
    writer.close()
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps({"database": database}))
    for name, width in (("model", 16), ("teacher", 24)):
        tokenizer = train_wordpiece([f"{verb} the {noun}" for verb in VERBS for noun in NOUNS], 80 + width)
        options = Options(width=width, layers=1, heads=2, dropout=0.0, max_seconds=8, max_words=8)
        build(options, Shards(tmp_path / "shards").manifest, tokenizer).save_pretrained(tmp_path / name)
    split = Split(annotations, tmp_path / "shards")
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=5)
    return FinetuneConfig(
        tmp_path / "model", split, split, epochs=12, batch=24, optimizer=optimizer, output=tmp_path / "run"
    )


def test_fine_tuning_finds_more_than_before(benchmark: FinetuneConfig, capsys: pytest.CaptureFixture[str]) -> None:
    figures = finetune(benchmark)
    assert figures["after"]["R@5"] > figures["before"]["R@5"] + 30
    assert figures["clips"] == 48 and figures["dropped"] == 1 and "1 clips left out" in capsys.readouterr().out
    assert "gone 0-4" in (benchmark.output / "quarantine.jsonl").read_text()
    assert json.loads((benchmark.output / "metrics.json").read_text())["after"] == figures["after"]
    model = from_pretrained(benchmark.output / "model")
    assert model.encode_text(["chop the egg"]).shape == (1, 16)
    assert finetune(benchmark) == json.loads(json.dumps(figures)) and "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds a run with other epochs"):
        finetune(replace(benchmark, epochs=13))
    with pytest.raises(InputError, match="frozen has nothing to train"):
        finetune(replace(benchmark, model=Path("frozen")))


class Killed(Exception):
    """What a run that was taken off its machine does not even raise."""


def kill_after(steps: int, monkeypatch: pytest.MonkeyPatch, training: str = "") -> None:
    """Let the next run die when it, or the training of this name in it, has done so many steps and one."""
    add = Metrics.add

    def dying(self: Metrics, step: int, values: dict[str, float]) -> None:
        add(self, step, values)
        if step == steps and training in ("", self.path.parent.name):
            raise Killed

    monkeypatch.setattr(Metrics, "add", dying)


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_the_same(
    benchmark: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run starts from step 4, within an epoch; only the clock says when checkpoints are left."""
    config = replace(benchmark, epochs=3, checkpoint_minutes=1e-9)
    whole = finetune(config)
    killed = replace(config, output=config.output.with_name("killed"))
    with monkeypatch.context() as patch:
        kill_after(4, patch)
        with pytest.raises(Killed):
            finetune(killed)
    for thread in threading.enumerate():  # what wrote the last checkpoint would have died with the rest
        if thread.name == "checkpoint":
            thread.join()
    assert [path.name for path in (killed.output / "checkpoints").iterdir()] == ["epoch-0001-step-00000002"]
    assert finetune(killed) == whole
    one, other = (load_file(config.output.with_name(name) / "model/model.safetensors") for name in ("run", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [json.loads(line) for line in (killed.output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))


def test_sigterm_leaves_a_checkpoint_of_now(benchmark: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    after_step = Orders.after_step

    def told(self: Orders) -> tuple[bool, bool]:
        os.kill(os.getpid(), signal.SIGTERM)
        return after_step(self)

    monkeypatch.setattr(Orders, "after_step", told)
    with pytest.raises(Stopped, match="with a checkpoint of now"):
        finetune(replace(benchmark, checkpoint_minutes=0))
    assert [path.name for path in (benchmark.output / "checkpoints").iterdir()] == ["epoch-0000-step-00000001"]
    assert not (benchmark.output / "metrics.json").exists()


def test_a_finished_model_teaches_another_of_other_width_and_words(benchmark: FinetuneConfig, tmp_path: Path) -> None:
    taught = replace(benchmark, model=tmp_path / "teacher", output=tmp_path / "teacher-run")
    finetune(taught)
    figures = finetune(replace(benchmark, teachers=(tmp_path / "teacher-run" / "model",)))
    assert figures["after"]["R@5"] > figures["before"]["R@5"] + 30
    rows = [json.loads(line) for line in (benchmark.output / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["distillation"] < 0.7 * rows[0]["distillation"]


def test_a_stored_teacher_must_know_every_clip_and_caption(benchmark: FinetuneConfig, tmp_path: Path) -> None:
    names = [f"v{number} {span}" for number in range(24) for span in ("1-9", "10-18")]
    stored = {name: {"vid_embds": {"rgb": np.ones(3)}, "text_embds": {"rgb": np.ones((1, 3)) / 3}} for name in names}
    path = tmp_path / "teacher.pkl"
    config = replace(benchmark, teachers=(path,), epochs=1)
    path.write_bytes(pickle.dumps({name: stored[name] for name in names[1:]}))
    with pytest.raises(InputError, match=r"teacher.pkl: this teacher has stored nothing for 'v0 1-9'"):
        finetune(config)
    stored[names[3]]["text_embds"]["rgb"] = np.ones((2, 3)) / 3
    path.write_bytes(pickle.dumps(stored))
    with pytest.raises(InputError, match=r"'v1 10-18' has 1 captions, but the teacher 2"):
        finetune(replace(config, output=tmp_path / "other"))
    stored[names[3]]["text_embds"]["rgb"] = np.ones((1, 3)) / 3
    path.write_bytes(pickle.dumps(stored))
    assert finetune(replace(config, output=tmp_path / "third"))["clips"] == 48


def test_the_command_fine_tunes(benchmark: FinetuneConfig, capsys: pytest.CaptureFixture[str]) -> None:
    split = ["annotations", str(benchmark.train.annotations), "shards", str(benchmark.train.shards)]
    words = ["finetune", "--model", str(benchmark.model), "--output", str(benchmark.output), "--epochs", "1"]
    for side in ("train", "test"):
        words += [f"--{side}.{split[0]}", split[1], f"--{side}.{split[2]}", split[3]]
    assert main(words) == 0
    assert "before" in capsys.readouterr().out
    assert main([*words, "--epochs", "0"]) == 2


# --- TeachText ----------------------------------------------------------------------------------------------------


def tiny_text_encoder(folder: Path, seed: int, width: int) -> str:
    """A BERT with random weights that knows the benchmark's words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "video", *NOUNS, *VERBS]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words), hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def taught(benchmark: FinetuneConfig, tmp_path: Path) -> TeachTextConfig:
    """Two experts from shards, one a sequence, and two text encoders."""
    texts = tuple(tiny_text_encoder(tmp_path / f"text-{width}", width, width) for width in (16, 24))
    shards = benchmark.train.shards
    return TeachTextConfig(
        (f"rgb={shards}", f"audio={shards}:2"),
        texts,
        benchmark.train.annotations,
        benchmark.train.annotations,
        network=Network(width=24, text_clusters=2),
        training=Training(epochs=40, batch=24, learning_rate=1e-2),
        output=tmp_path / "taught",
    )


@pytest.mark.slow
def test_teachers_of_two_texts_teach_a_student_that_reads_one(taught: TeachTextConfig) -> None:
    figures = teachtext(replace(taught, denoise=20))
    names = [name for name in figures if name.endswith("text to video")]
    assert names == [
        f"teacher {taught.texts[0]}, text to video",
        f"teacher {taught.texts[1]}, text to video",
        *names[2:],
    ]
    assert figures["student, text to video"]["R@10"] > 60 and figures["student, video to text"]["R@10"] > 60
    model = Experts.from_pretrained(taught.output / "model")
    assert model.config.names == ("audio", "rgb") and not model.training
    rows = [json.loads(line) for line in (taught.output / "mask.jsonl").read_text().splitlines()]
    assert len(rows) == 48 and figures["captions_kept"] == pytest.approx(
        100 * np.mean([kept for row in rows for kept in row["kept"]]), abs=0.01
    )
    steps = [json.loads(line) for line in (taught.output / "training/student/metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["distillation"] < steps[0]["distillation"] and steps[0]["learning_rate"] == 1e-2
    assert "gone 0-4" in (taught.output / "quarantine.jsonl").read_text()


def test_a_run_that_was_killed_does_not_train_its_finished_teachers_again(
    taught: TeachTextConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(taught, training=replace(taught.training, epochs=2), checkpoint_minutes=1e-9)
    whole = teachtext(short)
    killed = replace(short, output=short.output.with_name("killed"))
    with monkeypatch.context() as patch:
        kill_after(2, patch, "student")
        with pytest.raises(Killed):
            teachtext(killed)
    written = (killed.output / "teacher-1" / "model.safetensors").stat().st_mtime_ns
    assert teachtext(killed) == whole
    assert (killed.output / "teacher-1" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(InputError, match="holds a run with other seed"):
        teachtext(replace(killed, seed=1))


def test_one_text_alone_teaches_nobody(taught: TeachTextConfig) -> None:
    training = replace(taught.training, epochs=1)
    figures = teachtext(replace(taught, texts=taught.texts[:1], training=training, network=Network(16, 2, 0, "moee")))
    assert [name for name in figures if "text to video" in name] == ["student, text to video"]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (("rgb",), "--experts 'rgb': expected NAME=FOLDER"),
        (("rgb=here", "rgb=there"), "given twice"),
        (("rgb=nowhere", "audio=nowhere"), "nowhere: holds no manifest.json"),
    ],
)
def test_experts_that_cannot_be_are_refused(taught: TeachTextConfig, experts: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        teachtext(replace(taught, experts=experts))
