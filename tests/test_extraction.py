"""Extraction through a real local Ray: bad files, crashes, interruptions, captions that come later, refusals."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import extraction, kill_first_worker, training
from ray import cloudpickle as ray_pickle

import pipelines.extract
import pipelines.extraction_pool
import pipelines.pretrain
from pipelines.extract import ExtractConfig, extract
from pipelines.extraction_worker import ExtractionWorker, Outcome, Work
from pipelines.pretrain import pretrain
from videoclip.data.shards import Shards
from videoclip.errors import InputError
from videoclip.files import read_json_lines, write_json

pytestmark = pytest.mark.slow
ray_pickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test


def test_bad_files_go_to_quarantine_with_their_reason_and_the_rest_is_finished(tokens: Path) -> None:
    shards = Shards(tokens / "train", verify=True)
    assert shards.manifest.complete and shards.video_ids() == [f"train_{n:04d}" for n in range(10)]
    rows = read_json_lines(tokens / "train" / "quarantine.jsonl")
    reasons = {(row["video_id"], row["what"]): row["reason"] for row in rows}
    for key, part in {
        ("empty", "video"): "empty",
        ("text", "video"): "not a video",
        ("cut", "video"): "",
        ("audio", "video"): "no video",
        ("one", "video"): "single picture",
        ("train_0001", "file"): "taken",
        ("../../x", "captions"): "path",
        ("nowhere", "captions"): "not there",
        ("train_0004", "captions"): "cannot be used",
    }.items():
        assert part in reasons[key], key
    of_third = [row["reason"] for row in rows if row["video_id"] == "train_0003"]
    assert any("text is not a string" in reason for reason in of_third)
    assert any("end is not after start" in reason for reason in of_third)
    assert len(shards.record(4).captions) == 0 and len(shards.record(3).captions) > 0


def test_rolling_repeats_are_gone_from_the_shards(tokens: Path, corpus: Path) -> None:
    raw = json.loads((corpus / "train" / "raw_caption.json").read_text())
    before = sum(len(text.split()) for text in raw["train_0005"]["text"])
    after = sum(len(text.split()) for text in Shards(tokens / "train").record(5).captions.text)
    assert 0 < after < before


def test_a_second_run_writes_nothing_again(tokens: Path, corpus: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (tokens / "train").glob("part-*.arrow")}
    extract(extraction(corpus, tokens / "train"))
    assert before == {path.name: path.stat().st_mtime_ns for path in (tokens / "train").glob("part-*.arrow")}


def test_an_interrupted_run_does_only_what_is_missing(ray: None, tokens: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(tokens / "train", tmp_path / "train")
    manifest = json.loads((tmp_path / "train" / "manifest.json").read_text())
    manifest["parts"], manifest["complete"] = manifest["parts"][:1], False
    (tmp_path / "train" / "manifest.json").write_text(json.dumps(manifest))
    for path in sorted((tmp_path / "train").glob("part-*.arrow"))[1:]:
        path.write_bytes(b"left by a run that was killed")
    extract(extraction(corpus, tmp_path / "train"))
    whole, again = Shards(tokens / "train", verify=True), Shards(tmp_path / "train", verify=True)
    assert [p.sha256 for p in whole.manifest.parts] == [p.sha256 for p in again.manifest.parts]


def test_tokens_of_another_encoder_or_of_other_videos_are_not_mixed(ray: None, tokens: Path, corpus: Path) -> None:
    with pytest.raises(InputError, match="holds tokens of x3d-tiny"):
        extract(replace(extraction(corpus, tokens / "train"), encoder="x3d-xs"))
    with pytest.raises(InputError, match="other videos"):
        extract(replace(extraction(corpus, tokens / "train"), videos=corpus / "test" / "videos"))


def test_a_killed_extraction_worker_is_replaced(ray: None, tokens: Path, corpus: Path, tmp_path: Path) -> None:
    parts = tmp_path / "tokens"
    killed, thread = kill_first_worker("ExtractionWorker", lambda: any(parts.glob("part-*")))  # others are on their way
    shards = extract(replace(extraction(corpus, tmp_path / "tokens"), encoder_from=tokens / "train"))
    thread.join()
    assert killed, "the test must have killed a worker"
    assert [p.sha256 for p in shards.manifest.parts] == [p.sha256 for p in Shards(tokens / "train").manifest.parts]


class Unlucky(ExtractionWorker):
    """Runs out of memory over one video; another takes it down."""

    def _tokens(self, work: Work) -> tuple[Outcome, np.ndarray | None]:
        if work.video.video_id == "test_0001":
            raise RuntimeError("CUDA out of memory")
        if work.video.video_id == "test_0002":
            os._exit(1)
        return super()._tokens(work)


def test_a_crash_costs_its_video_and_can_be_tried_again(
    ray: None, tokens: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "tokens"
    config = ExtractConfig(corpus / "test" / "videos", output, encoder_from=tokens / "train")
    whole = Shards(tokens / "test")
    monkeypatch.setattr(pipelines.extract, "ExtractionWorker", Unlucky)
    monkeypatch.setattr(pipelines.extraction_pool, "DEATHS", 1)
    assert extract(config).video_ids() == [f"test_{n:04d}" for n in (0, 3, 4, 5)]
    monkeypatch.undo()
    rows = {row["video_id"]: row for row in read_json_lines(output / "quarantine.jsonl")}
    assert {row["kind"] for row in rows.values()} == {"crashed"} and set(rows) == {"test_0001", "test_0002"}
    assert rows["test_0001"]["reason"].endswith("test_0001.mp4: RuntimeError: CUDA out of memory")
    assert "took its worker down" in rows["test_0002"]["reason"]
    assert len(extract(config)) == 4, "not tried again unless that is asked for"
    again = extract(replace(config, retry_crashed=True))
    assert sorted(again.video_ids()) == whole.video_ids()
    assert not read_json_lines(output / "quarantine.jsonl")
    by_id = again.rows_by_id()
    for row, video_id in enumerate(whole.video_ids()):
        assert np.array_equal(whole.tokens(row), again.tokens(by_id[video_id]))


class ReachedTraining(Exception):
    """Pretraining has found all that it needs."""


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.arrow")}


def test_captions_may_come_after_the_tokens_and_nothing_is_encoded_again(
    tokens: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`extract`, then again with captions, with others, and without: pretraining finds what was given last."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("nothing is to be encoded")

    def reach(*arguments: object) -> None:
        raise ReachedTraining

    monkeypatch.setattr(pipelines.extract, "_encode", refuse)
    output = tmp_path / "train"
    shutil.copytree(tokens / "test", output)
    config = ExtractConfig(corpus / "test" / "videos", output, encoder_from=tokens / "train")
    before, parts = Shards(output), stamps(output)
    monkeypatch.setattr(pipelines.pretrain, "_fit", reach)
    with pytest.raises(InputError, match="holds no captions to train on; run `videoclip extract` with --captions"):
        pretrain(training(tmp_path, tmp_path / "run"))
    said = {"test_0001": {"start": [2, 5], "end": [4, 9], "text": ["stir the egg", "chop it"]}, "gone": {}}
    write_json(tmp_path / "said.json", said)
    shards = extract(replace(config, captions=tmp_path / "said.json"))
    assert [len(record.captions) for record in shards] == [0, 2, 0, 0, 0, 0]
    with pytest.raises(ReachedTraining):
        pretrain(training(tmp_path, tmp_path / "other run"))
    reasons = {row["video_id"]: row["reason"] for row in read_json_lines(output / "quarantine.jsonl")}
    assert reasons["gone"] == "captions of a video that is not there"
    said["test_0001"]["text"] = ["stir the carrot", "chop it"]
    write_json(tmp_path / "other.json", said)
    shards = extract(replace(config, captions=tmp_path / "other.json"))
    assert shards.record(1).captions.text == ["stir the carrot", "chop it"]
    with pytest.raises(InputError, match="was made with captions; give --captions again"):
        extract(config)
    assert parts == stamps(output) and all(np.array_equal(a.tokens, b.tokens) for a, b in zip(before, shards))


@pytest.mark.parametrize("changes", [{"seed": 5}, {"calibration_clips": 25}])
def test_options_that_decide_the_encoder_are_those_of_the_first_run(
    tokens: Path, corpus: Path, changes: dict[str, int]
) -> None:
    before = stamps(tokens / "train")
    with pytest.raises(InputError, match=f"with other {next(iter(changes))};"):
        extract(replace(extraction(corpus, tokens / "train"), **changes))
    assert before == stamps(tokens / "train")


def test_more_encoders_than_the_machine_has_cpus_are_refused_with_both_numbers(
    ray: None, tokens: Path, corpus: Path, tmp_path: Path
) -> None:
    config = ExtractConfig(corpus / "test" / "videos", tmp_path, encoder_from=tokens / "train", workers=4096)
    with pytest.raises(InputError, match=r"--workers 4096: 4096 CPUs are needed and Ray has \d+;"):
        extract(config)
