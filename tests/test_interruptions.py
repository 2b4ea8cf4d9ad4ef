"""A training that is told to stop, or whose last checkpoint is broken, loses nothing; its folder says how it does."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelines import pretrain_batches, pretrain_worker
from pipelines.checkpointing import Checkpoints, checkpoints, newest_checkpoint
from pipelines.cli import main
from pipelines.heartbeat import READING, Heartbeat
from pipelines.pretrain_batches import BatchPlan
from pipelines.pretrain_worker import Training, TrainingPlan
from pipelines.run_status import Worker, in_words, read_status, stalled_workers
from pipelines.stopping import STOP_FILE, Stopped, stopping
from pipelines.training_progress import TrainingProgress
from videoclip.checkpoints import TrainingState
from videoclip.data.clips import ClipConfig
from videoclip.data.shards import Shards
from videoclip.data.sources import open_shards
from videoclip.data.words import train_wordpiece
from videoclip.errors import InputError
from videoclip.files import read_json_lines
from videoclip.model import VideoCLIP
from videoclip.recipes import alignment, from_pretrained
from videoclip.recipes.videoclip import Options
from videoclip.retrieval.epochs import BatchOptions
from videoclip.retrieval.false_negatives import FalseNegativeConfig
from videoclip.training import OptimizerConfig


@pytest.fixture
def plan(make_shards: Callable[..., Shards], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingPlan:
    """Three epochs of four steps, on random tokens; trained here, without Ray."""
    monkeypatch.setattr(pretrain_worker.ray.train, "report", lambda _: None)
    monkeypatch.setattr(pretrain_worker, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(pretrain_worker, "prepare_model", lambda module: module)
    shards = make_shards()
    torch.set_num_threads(1)
    return TrainingPlan(
        shards=shards.folder,
        output=tmp_path / "run",
        recipe="videoclip",
        options=Options(width=16, layers=1, heads=2, max_seconds=16, max_words=24),
        init="",
        clips=ClipConfig(clips_per_video=2, max_words=24, max_seconds=16),
        batches=BatchPlan(BatchOptions(3, clusters_per_batch=1), "model", 2, False, None, 0),
        false_negatives=FalseNegativeConfig(),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        epochs=3,
        seed=0,
        threads=1,
        identity={"seed": 0},
    )


def run(plan: TrainingPlan) -> None:
    texts = [text for record in open_shards(plan.shards) for text in record.captions.text]
    train_wordpiece(texts).save(plan.output / "text")
    with Heartbeat(plan.output, 0, 1) as heartbeat:
        Training(plan, 0, 1, heartbeat).run()


def weights(plan: TrainingPlan) -> dict[str, torch.Tensor]:
    return VideoCLIP.from_pretrained(plan.output / "model").state_dict()


def same_bits(one: TrainingPlan, other: TrainingPlan) -> bool:
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def test_a_run_that_is_told_to_stop_again_and_again_ends_with_the_same_bits(plan: TrainingPlan) -> None:
    """And with its newest checkpoint broken once on the way: it goes on from the one before."""
    straight = replace(plan, output=plan.output.with_name("straight"))
    run(straight)
    stopped = replace(plan, checkpoints_kept=3)
    (plan.output).mkdir()
    for time_stopped in range(4):
        (plan.output / STOP_FILE).touch()  # after one step of each attempt
        run(stopped)
        whole = checkpoints(plan.output)
        assert len(whole) == min(3, time_stopped + 1) and not (plan.output / "model").exists()
    assert [path.name for path in whole][-2:] == ["epoch-0000-step-00000003", "epoch-0000-step-00000004"]
    share = whole[-1] / "share-00000-of-00001.safetensors"
    share.write_bytes(share.read_bytes()[:-1])
    (plan.output / STOP_FILE).unlink()
    run(stopped)
    assert same_bits(straight, plan)
    assert len(list((plan.output / "checkpoints").glob("damaged-epoch-0000-step-00000004-*"))) == 1
    assert [row["step"] for row in read_json_lines(plan.output / "metrics.jsonl")] == list(range(12))
    lines = read_status(plan.output).lines()
    assert any(line.startswith("training   finished: step 12 of 12 (100%), epoch 3 of 3") for line in lines), lines
    assert any(line.startswith("checkpoint epoch-0003") for line in lines) and "damaged" in "\n".join(lines)


def telling_of_steps(tell: Callable[[], None]) -> Callable[..., Iterator[Any]]:
    """`train_epoch` that calls `tell` after every step."""
    original = pretrain_worker.train_epoch

    def trained(*arguments: Any) -> Iterator[Any]:
        for item in original(*arguments):
            tell()
            yield item

    return trained


class NeverDone:
    """Clustering in a process that is killed before it gets anywhere."""

    def __init__(self, *_: object) -> None:
        pass

    def wait(self) -> None:
        raise AssertionError("nobody gets to the end of the epoch")


def test_clustering_beside_training_gives_the_same_bits_however_slow_it_is_and_however_often_stopped(
    plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(plan, batches=replace(plan.batches, ahead=True))
    straight, stepped, beside = replace(plan, output=plan.output.with_name("straight")), threading.Event(), []
    cluster_to_file = pretrain_batches.cluster_to_file

    def slow(*arguments: Any) -> None:
        beside.append(threading.current_thread() is not threading.main_thread())
        assert not beside[-1] or stepped.wait(20), "training goes on meanwhile"
        cluster_to_file(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain_batches, "cluster_to_file", slow)
        patch.setattr(pretrain_worker, "train_epoch", telling_of_steps(stepped.set))
        run(straight)
    assert beside == [False, True, True], "only the first epoch has to wait for its batches"

    plan.output.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_batches, "_Beside", NeverDone)
        for _ in range(3):
            (plan.output / STOP_FILE).touch()
            run(plan)
    assert list((plan.output / "batches").glob("embeddings-0001-*")), "what the model was as the epoch began is kept"
    (plan.output / STOP_FILE).unlink()
    run(plan)
    assert same_bits(straight, plan)
    assert not list((plan.output / "batches").glob("embeddings-*")), "embeddings are cleared away"


def test_a_recipe_with_its_own_sampler_is_trained_and_continued_like_any_other(plan: TrainingPlan) -> None:
    options = alignment.Options(
        width=16, layers=1, heads=2, max_seconds=16, max_words=24, joint_layers=1, agree_after=5
    )
    plan = replace(plan, recipe="alignment", options=options, epochs=2)
    straight = replace(plan, output=plan.output.with_name("straight"))
    run(straight)
    plan.output.mkdir()
    (plan.output / STOP_FILE).touch()
    run(plan)
    (plan.output / STOP_FILE).unlink()
    run(plan)
    one, other = (from_pretrained(of.output / "model").state_dict() for of in (straight, plan))
    assert int(one["steps"]) == 8 and all(torch.equal(value, other[name]) for name, value in one.items())
    agreed = [row["agreed"] for row in read_json_lines(plan.output / "metrics.jsonl")]
    assert not any(agreed[:5]) and any(agreed[5:]), "co-training begins after five steps"


def test_minutes_bring_checkpoints_within_an_epoch(plan: TrainingPlan) -> None:
    run(replace(plan, epochs=1, checkpoint_minutes=1e-9, checkpoints_kept=9))
    names = [path.name for path in checkpoints(plan.output)]
    assert names == [*(f"epoch-0000-step-{step:08d}" for step in (1, 2, 3, 4)), "epoch-0001"]


def test_a_run_whose_checkpoints_are_all_broken_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "epoch-0001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"files": {"share": "0"}}')
    (tmp_path / "checkpoints" / "epoch-0002").mkdir()  # killed while it was written
    with pytest.raises(InputError, match=r"no checkpoint is whole \(epoch-0001: share is missing"):
        newest_checkpoint(tmp_path, 0)
    assert not (tmp_path / "checkpoints" / "epoch-0002").exists()
    assert newest_checkpoint(tmp_path / "new", 0) is None


def test_what_goes_wrong_in_the_side_thread_is_raised_in_training(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    writer, module = Checkpoints(tmp_path, 0, 1, 2, {}), nn.Linear(2, 2)
    writer.save(module, torch.optim.AdamW(module.parameters()), TrainingState(0, 1, 1))
    with pytest.raises(OSError):
        writer.wait()


def test_sigterm_ends_a_stage_and_asks_workers_for_a_checkpoint_first(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="last checkpoint"), stopping(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="checkpoint of now"), stopping(tmp_path) as stop, stop.by_checkpoint():
        os.kill(os.getpid(), signal.SIGTERM)
        assert (tmp_path / STOP_FILE).exists()
        stop.watch()
    assert not (tmp_path / STOP_FILE).exists() and signal.getsignal(signal.SIGTERM) == before


def worker(rank: int, heard: float, doing: str, since: float) -> Worker:
    return Worker({"rank": rank, "process": 7, "host": "node", "doing": doing, "since": since}, heard)


def test_the_worker_that_the_others_wait_for_is_named() -> None:
    going = [worker(0, 1000, "training", 990), worker(1, 998, "training", 990)]
    assert stalled_workers(going, 1000) == []
    silent = stalled_workers([*going, worker(2, 940, "training", 939)], 1000)
    assert len(silent) == 1 and "worker 2" in silent[0] and "60 s" in silent[0]
    reading = stalled_workers([*going, worker(3, 1000, READING, 900)], 1000)
    assert len(reading) == 1 and "worker 3" in reading[0] and "storage" in reading[0]


def test_status_of_an_extraction_and_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2 and "holds no run" in capsys.readouterr().err
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    capsys.readouterr()
    parts = [{"videos": 3, "seconds": 5400.0}, {"videos": 1, "seconds": 1800.0}]
    (tmp_path / "manifest.json").write_text(json.dumps({"parts": parts, "complete": False}))
    rows = [{"video_id": str(n), "what": "video", "kind": "input", "reason": f"empty file ({n})"} for n in range(3)]
    (tmp_path / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "4 videos, 2.0 hours, not complete yet" in printed and "quarantine 3 video: empty file" in printed


def test_without_a_terminal_there_is_a_line_a_minute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(tmp_path, 10, every=0.1), Heartbeat(tmp_path, 0, 1) as heartbeat:
        heartbeat.did_step(3, 10, 0, 2, {"loss": 1.5})
        heartbeat._write()
        time.sleep(1.2)
    printed = capsys.readouterr().err
    assert "pretraining: step 3 of 10 (30%), epoch 1 of 2, loss 1.500" in printed and "\r" not in printed


def test_time_in_words() -> None:
    assert [in_words(seconds) for seconds in (59, 600, 7200, 200000)] == [
        "59 seconds",
        "10 minutes",
        "2 hours",
        "2 days",
    ]
