"""Extraction on several Ray nodes of one machine with logical GPUs: placement, a node lost, a node that joins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from videoclip.data.shards import Shards

pytestmark = pytest.mark.slow

# Two nodes of one GPU and two CPUs each; when the first part is there one of them is lost, and then another joins.
# Every worker says on which node and GPU it is. Ray is this script's own: the tests' session stays as it is.
SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster
import pipelines.extract
from pipelines.extract import ExtractConfig, extract
from pipelines.extraction_worker import ExtractionWorker

videos, encoder, output, notes = map(Path, sys.argv[1:5])
node = dict(num_cpus=2, num_gpus=1, object_store_memory=80 * 2**20)

class Telling(ExtractionWorker):
    def ready(self):
        device = super().ready()
        context = ray.get_runtime_context()
        about = {"node": context.get_node_id(), "gpus": ray.get_gpu_ids(), "threads": self.options.threads}
        (notes / f"{context.get_actor_id()}.json").write_text(json.dumps(about))
        return device

pipelines.extract.ExtractionWorker = Telling
head = dict(num_cpus=0, include_dashboard=False, object_store_memory=80 * 2**20)
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = [cluster.add_node(**node) for _ in range(2)]

def lose_one():
    while not any(output.glob("part-*")):
        time.sleep(0.05)
    cluster.remove_node(nodes[0], allow_graceful=False)
    cluster.add_node(**node)

thread = threading.Thread(target=lose_one, daemon=True)
thread.start()
pipelines.extraction_pool.MAINTENANCE = 1.0
extract(ExtractConfig(videos, output, encoder_from=encoder, videos_per_part=1, address=cluster.address))
thread.join(120)
cluster.shutdown()
print("lost one:", not thread.is_alive())
"""


def test_a_node_is_lost_and_another_joins_and_the_shards_are_the_same(
    tokens: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    words = [corpus / "test" / "videos", tokens / "train", tmp_path / "shards", tmp_path / "notes"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lost one: True" in done.stdout, "the run was over before a node was lost"
    workers = [json.loads(path.read_text()) for path in (tmp_path / "notes").glob("*.json")]
    assert len(workers) >= 2 and all(worker["gpus"] == [0] and worker["threads"] == 2 for worker in workers)
    assert len({worker["node"] for worker in workers}) >= 2, "one actor a GPU, not both on one node"
    assert "PyTorch sees none" in done.stderr, "logical GPUs are none, and it says so"
    expected, found = Shards(tokens / "test"), Shards(tmp_path / "shards", verify=True)
    assert found.video_ids() == expected.video_ids() and found.manifest.complete
    for row in range(len(found)):
        np.testing.assert_allclose(found.tokens(row), expected.tokens(row), atol=4e-3)
