"""The campaign of `benchmarks/faults.py stages` in short: what is disturbed ends in the same bytes, or says why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.fault_commands import FAULTS, Command, Stage, flip_bit
from benchmarks.faults_stages import ALL, World, clustering, digests, indexing, run


@pytest.mark.slow
def test_an_index_whose_worker_is_killed_is_the_same_bytes(trained: Path, tokens: Path, tmp_path: Path) -> None:
    world = World(tmp_path)
    stage = indexing(trained / "model", tokens / "train")
    world.reference(stage)
    assert {Path(name).suffix for name in world.expected["index"]} == {".npy", ".faiss", ".sqlite"}
    outcome = run(world, stage, "worker killed", seed=0)
    assert outcome.happened and outcome.kind == "same bytes", outcome


def test_a_result_is_compared_by_its_bytes_and_a_flipped_bit_makes_another(tmp_path: Path) -> None:
    """On a stage that is a shell's, quick to end: what the campaign itself does with files."""
    assert set(ALL) == {*FAULTS, "disk full", "node lost, node joins"}
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "part-00000.arrow").write_bytes(bytes(64))
    (folder / "log.txt").write_text("differs from run to run")
    before = digests(folder, ("*.arrow",))
    command = Command(Stage("status", ["status", str(tmp_path)], tmp_path, ()), folder)
    assert flip_bit(command, np.random.default_rng(0))
    after = digests(folder, ("*.arrow",))
    assert before.keys() == after.keys() == {"part-00000.arrow"} and before != after
    data = np.frombuffer((folder / "part-00000.arrow").read_bytes(), np.uint8)
    assert np.unpackbits(data).sum() == 1, "one bit"
    assert clustering(tmp_path, tmp_path).results and command.process.poll() is not None
