"""Run folders: one run at a time, lists that are appended to, captions apart from tokens, few files open."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_record

from pipelines.caption_source import CaptionSource
from pipelines.cli import main
from pipelines.cluster import cluster
from pipelines.convert import convert_features, convert_mmpt, convert_shards
from pipelines.demo import demo
from pipelines.extract import extract
from pipelines.index import build_index
from pipelines.pretrain import pretrain
from pipelines.runs import Quarantine, locked, refuse_other_run, start_run
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.shards import Manifest, Shards, ShardWriter
from videoclip.data.words import train_wordpiece
from videoclip.errors import InputError
from videoclip.files import read_json_lines, write_json
from videoclip.model import VideoCLIPConfig
from videoclip.recipes.videoclip import Recipe

ROOT = Path(__file__).parents[1]


def test_a_second_run_on_one_output_is_refused_and_a_dead_one_keeps_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from pipelines.runs import locked\n"
        "with locked(Path(sys.argv[1]), 'cluster'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    said = rf"another run is writing here \(cluster, process {other.pid}"
    with pytest.raises(InputError, match=said), locked(tmp_path, "extract"):
        pass
    other.kill()
    other.communicate()
    with (
        locked(tmp_path, "extract"),
        locked(tmp_path / "inside", "pretrain"),
        pytest.raises(InputError, match="another run"),
        locked(tmp_path, "extract"),
    ):
        pass


def test_a_run_is_held_to_what_the_first_said_it_was(tmp_path: Path) -> None:
    start_run(tmp_path, "extract", None, {"seed": 0})
    refuse_other_run(tmp_path, {"seed": 0})
    with pytest.raises(InputError, match="with other seed"):
        refuse_other_run(tmp_path, {"seed": 1})


def test_a_quarantine_list_is_appended_to_and_survives_half_a_line(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    quarantine.add("one", "empty")
    quarantine.save()
    inode = quarantine.path.stat().st_ino
    with open(quarantine.path, "a") as file:
        file.write('{"video_id": "tw')  # a run that was killed
    again = Quarantine(tmp_path)
    again.add("two", "out of memory", kind="crashed")
    again.save()
    assert quarantine.path.stat().st_ino == inode, "the list is not written anew"
    assert [(r["video_id"], r["kind"]) for r in read_json_lines(again.path)] == [("one", "input"), ("two", "crashed")]
    again.forget(kind="crashed")
    assert Quarantine(tmp_path).video_ids() == {"one"}


def write_shards(folder: Path, videos: int, per_part: int) -> None:
    writer = ShardWriter(folder, Manifest("random", "f" * 64, 16), per_part)
    for number in range(videos):
        writer.add(random_record(number))
    writer.close()


def test_captions_can_be_changed_and_no_token_is_touched(tmp_path: Path) -> None:
    write_shards(tmp_path, 5, 2)
    before = Shards(tmp_path)
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    raw = {"video_001": {"start": [1, 90], "end": [3, 95], "text": ["new words", "after the end"]}}
    write_json(tmp_path / "raw.json", raw)
    source = CaptionSource(str(tmp_path / "raw.json"), False, 0, Quarantine(tmp_path))
    source.update_shards(tmp_path)
    after = Shards(tmp_path, verify=True)
    assert [len(record.captions) for record in after] == [0, 1, 0, 0, 0]
    assert after.record(1).captions.text == ["new words"]
    assert all(np.array_equal(one.tokens, two.tokens) for one, two in zip(before, after))
    assert stamps == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    assert before.manifest.parts[0].digest != after.manifest.parts[0].digest, "what was made of them is made again"
    assert any("1 caption lines left out" in row["reason"] for row in read_json_lines(tmp_path / "quarantine.jsonl"))
    names = sorted(path.name for path in tmp_path.glob("captions-*"))
    CaptionSource(str(tmp_path / "raw.json"), False, 0, Quarantine(tmp_path)).update_shards(tmp_path)
    assert names == sorted(path.name for path in tmp_path.glob("captions-*"))
    path = tmp_path / names[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="captions-0000"):
        Shards(tmp_path)


STAGES = """
import contextlib, resource, sys
from pathlib import Path
import numpy as np
import pipelines.cluster, pipelines.index, pipelines.runs
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.shards import Shards
from videoclip.data.words import WordTokenizer
from videoclip.retrieval.index import load_faiss
folder = Path(sys.argv[1])
load_faiss()
for module in (pipelines.cluster, pipelines.index):
    module.ray_session = lambda address: contextlib.nullcontext()
pipelines.runs.cluster_processors = lambda: 1
one_by_one = lambda function, tasks, *told: [function(*task) for task in tasks]
pipelines.runs.run_tasks = pipelines.index.run_tasks = one_by_one
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
model, shards = folder / "model", folder / "shards"
config = pipelines.cluster.ClusterConfig(model, shards, folder / "clusters", 20, clips_per_video=1)
batches = pipelines.cluster.cluster(config)
print("clustered", len(batches), sum(map(len, batches)))
config = pipelines.index.IndexConfig(model, shards, output=folder / "index", faiss_index="IVF4,Flat")
pipelines.index.build_index(config)
sampler = ClipSampler(Shards(shards), WordTokenizer.load(model), ClipConfig(), folder / "cache")
batch = sampler.batch(sampler.usable_rows(), np.random.default_rng(5))
print("drawn", int(batch.word_ids.rows.sum()), float(batch.video_tokens.rows.double().sum()))
"""


def test_hundreds_of_parts_need_few_open_files_and_few_files_of_words(tmp_path: Path) -> None:
    """`index` and `cluster` as they are, their tasks called one after the other in one process; then a batch."""
    write_shards(tmp_path / "shards", 200, 1)
    shards = Shards(tmp_path / "shards")
    tokenizer = train_wordpiece(text for record in shards for text in record.captions.text)
    size = {"width": 16, "layers": 1, "heads": 2, "intermediate": 32, "vocabulary": tokenizer.vocabulary}
    model = Recipe(VideoCLIPConfig(video_dimension=16, **size, cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id))
    model.frozen.tokenizer = tokenizer
    model.save_pretrained(tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", STAGES, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1500:]
    assert "clustered 10 200" in done.stdout and "200 videos" in done.stdout
    for folder in ("clusters", "cache"):
        assert len(list((tmp_path / folder).glob("words-*"))) == 4, "a file of word ids for 64 parts"
    write_shards(tmp_path / "whole", 200, 200)
    sampler = ClipSampler(Shards(tmp_path / "whole"), tokenizer, ClipConfig(), tmp_path / "one")
    batch = sampler.batch(np.arange(200), np.random.default_rng(5))
    total = float(batch.video_tokens.rows.double().sum())
    assert f"drawn {int(batch.word_ids.rows.sum())} {total}\n" in done.stdout, "as from one part"


@pytest.mark.parametrize(
    "stage", [extract, pretrain, cluster, build_index, convert_mmpt, convert_features, convert_shards, demo]
)
def test_every_stage_that_writes_a_folder_refuses_to_share_it(tmp_path: Path, stage: Callable[[Any], object]) -> None:
    class Config:
        output = tmp_path

    with locked(tmp_path, "extract"), pytest.raises(InputError, match=r"another run is writing here \(extract, proc"):
        stage(Config())


def test_the_second_of_two_extractions_into_one_folder_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path, "extract"):
        assert main(["extract", "--videos", str(tmp_path), "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "another run is writing here (extract, process" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "and has touched nothing"
