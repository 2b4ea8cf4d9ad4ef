"""A training on several Ray nodes, as a cluster has it: nodes are lost, nodes come, and the job's time runs out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ray_nodes import Node, RayNodes
from pipelines.checkpointing import checkpoints
from pipelines.heartbeat import FOLDER
from pipelines.run_status import read_status
from pipelines.stopping import EXIT_CODE
from videoclip.data.shards import Shards
from videoclip.files import read_json, read_json_lines

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


class Training:
    """`videoclip pretrain` on a cluster, as a process that goes on for longer than this test."""

    def __init__(self, shards: Shards, folder: Path, address: str) -> None:
        self.run, self.address = folder / "run", address
        options = {
            **{"shards": str(shards.folder), "output": str(self.run), "epochs": 2000, "videos_per_batch": 3},
            **{"batches_per_step": 2, "workers": 2, "threads": 1, "vocabulary": 300, "checkpoint_minutes": 0.01},
            **{"model": {"width": 16, "layers": 1, "heads": 2}, "max_failures": 3, "replacement_seconds": 120},
            **{"clips": {"clips_per_video": 2, "max_words": 24, "max_seconds": 16}},
        }
        self.options = folder / "options.yaml"
        self.options.write_text(json.dumps(options))
        self.process = self.start()

    def start(self) -> subprocess.Popen[str]:
        words = ["pretrain", "--config", str(self.options), "--address", self.address]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self.process

    def workers(self) -> list[dict[str, Any]]:
        """What the two say of themselves, once both have trained a step."""
        told = [read_json(path) for path in sorted((self.run / FOLDER).glob("worker-*.json"))]
        return told if len(told) == 2 and all(about["step"] > 0 for about in told) else []

    def steps(self) -> list[int]:
        path = self.run / "metrics.jsonl"
        return [row["step"] for row in read_json_lines(path)] if path.exists() else []

    def wait_for(self, what: str, ready: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 300
        while not ready():
            assert self.process.poll() is None, f"{what}: {self.process.communicate()[1]}"
            assert time.monotonic() < deadline, f"no {what} within five minutes"
            time.sleep(0.2)

    def terminate(self) -> str:
        """SIGTERM as Slurm and spot machines send it; what the command then says."""
        self.process.send_signal(signal.SIGTERM)
        error = self.process.communicate(timeout=120)[1]
        assert self.process.returncode == EXIT_CODE, error
        return error


def gauges(node: Node) -> dict[str, set[str]]:
    """What Prometheus reads at a node: our gauges, and the ranks that each is told of."""
    with urllib.request.urlopen(f"http://127.0.0.1:{node.metrics_port}/metrics", timeout=10) as answer:
        lines = [line for line in answer.read().decode().split("\n") if line.startswith("ray_videoclip_")]
    found: dict[str, set[str]] = {}
    for line in lines:
        found.setdefault(line.partition("{")[0], set()).add(line.partition('rank="')[2].partition('"')[0])
    return found


def test_a_training_outlives_a_node_takes_a_new_one_and_goes_on_after_sigterm(
    make_shards: Callable[..., Shards], tmp_path: Path
) -> None:
    with RayNodes() as cluster:
        first, second = cluster.add(), cluster.add()
        training = Training(make_shards(), tmp_path, cluster.address)
        try:
            training.wait_for("steps of two workers", training.workers)
            on_nodes = [[node.runs(about["process"]) for node in (first, second)] for about in training.workers()]
            assert sorted(on_nodes) == [[False, True], [True, False]], "a worker on each node"
            both = (first, second)
            training.wait_for("gauges", lambda: all("ray_videoclip_loss" in gauges(node) for node in both))
            ranks = [gauges(node).get("ray_videoclip_step", set()) for node in both]
            assert sorted(map(sorted, ranks)) == [["0"], ["1"]], "every node tells of its own worker"
            status = "\n".join(read_status(training.run).lines())
            assert "training   running: step" in status and "workers    2:" in status and "checkpoint " in status

            second.lose()
            third = cluster.add()
            training.wait_for(
                "worker on the new node", lambda: any(third.runs(about["process"]) for about in training.workers())
            )
            error = training.terminate()
            assert "stopped by SIGTERM, with a checkpoint of now; the same command goes on from here" in error
            reached = training.steps()
            left = read_json(checkpoints(training.run)[-1] / "state.json")["step"]
            assert reached == list(range(left)), "no step is missing or told twice, and the last is in the checkpoint"

            training.start()
            training.wait_for("steps behind the checkpoint", lambda: training.steps()[left + 2 :])
            training.terminate()
            assert training.steps() == list(range(len(training.steps())))
        finally:
            training.process.kill()
