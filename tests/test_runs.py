"""Run folders: one run at a time, lists that are appended to, captions apart from tokens, few files open."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import random_record

from pipelines.caption_source import CaptionSource
from pipelines.extract import EncodeVideo
from pipelines.runs import Quarantine, locked, refuse_other_run, start_run
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.shards import Manifest, Shards, ShardWriter
from videoclip.data.words import train_wordpiece
from videoclip.errors import InputError
from videoclip.files import read_json_lines, write_json

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


class FailsOnce:
    """An encoder that runs out of memory."""

    def encode_video(self, path: Path) -> np.ndarray:
        raise RuntimeError("CUDA out of memory\nmore")


def worker(attempts: Path) -> EncodeVideo:
    encode = EncodeVideo.__new__(EncodeVideo)
    encode.encoder, encode.attempts = FailsOnce(), attempts
    return encode


def test_an_error_that_is_not_the_files_costs_one_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import videoclip.data.video

    class Probe:
        duration = 1.0

    monkeypatch.setattr(videoclip.data.video, "probe", lambda path: Probe())
    row = worker(tmp_path)({"video_id": "a", "path": "a.mp4"})
    assert row["kind"] == "crashed" and row["reason"] == "a.mp4: RuntimeError: CUDA out of memory"
    assert not list(tmp_path.iterdir()), "only a worker that dies leaves a mark"


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


FEW_FILES = """
import resource, sys
from pathlib import Path
import numpy as np
from videoclip.data.shards import Shards
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.words import WordTokenizer
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
shards = Shards(folder / "shards")
sampler = ClipSampler(shards, WordTokenizer.load(folder), ClipConfig(), folder / "cache")
rows = sampler.usable_rows()
batch = sampler.batch(rows, np.random.default_rng(5))
print(len(rows), int(batch.word_ids.rows.sum()), float(batch.video_tokens.rows.double().sum()))
"""


def test_hundreds_of_parts_need_few_open_files_and_one_file_of_words(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", 200, 1)
    write_shards(tmp_path / "whole", 200, 200)
    shards = Shards(tmp_path / "whole")
    tokenizer = train_wordpiece(text for record in shards for text in record.captions.text)
    tokenizer.save(tmp_path)
    done = subprocess.run([sys.executable, "-c", FEW_FILES, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-500:]
    batch = ClipSampler(shards, tokenizer, ClipConfig(), tmp_path / "one").batch(
        np.arange(200), np.random.default_rng(5)
    )
    total = float(batch.video_tokens.rows.double().sum())
    assert done.stdout.split() == ["200", str(int(batch.word_ids.rows.sum())), str(total)]
    assert len(list((tmp_path / "cache").iterdir())) == 1
