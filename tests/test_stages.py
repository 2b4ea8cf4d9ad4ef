"""Stages as a person meets them: Ctrl-C, too few machines, lost machines, clusters nearby, errors that are final."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import training
from ray import cloudpickle as ray_pickle

from pipelines.pretrain import pretrain
from pipelines.ray_session import run_interruptibly
from pipelines.ray_training import Workers, _final_errors, train_on_workers
from videoclip.errors import InputError

pytestmark = pytest.mark.slow
ray_pickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test
ROOT = Path(__file__).parents[1]

# A shell may start this suite in the background, where Ctrl-C is ignored by every child.
COMMAND = """
import signal, sys
from pipelines.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


def start_command(*words: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt_when(ready: Callable[[], bool], process: subprocess.Popen[str]) -> str:
    """What Ctrl-C in a terminal does, to the whole process group, as soon as `ready()`; returns standard error."""
    deadline = time.time() + 120
    while not ready() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[1]
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=60)[1]


def pretraining_words(tokens: Path, output: Path) -> list[object]:
    config = training(tokens, output)
    options = {
        "shards": str(config.shards),
        "output": str(config.output),
        "epochs": 40,
        "videos_per_batch": 3,
        "vocabulary": 300,
        "threads": 1,
        "model": {"width": 32, "layers": 1, "heads": 2},
        "clips": {"clips_per_video": 4, "max_words": 24, "max_seconds": 16},
    }
    (output.parent / "options.yaml").write_text(json.dumps(options))
    return ["pretrain", "--config", output.parent / "options.yaml"]


def test_ctrl_c_in_a_training_is_exit_code_130_and_the_same_command_goes_on(tokens: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_command(*pretraining_words(tokens, run), RAY_ADDRESS="127.0.0.1:1")  # not meant without --address
    error = interrupt_when((run / "checkpoints" / "epoch-0001" / "state.json").exists, process)
    assert process.returncode == 130 and "the same command goes on from here" in error and "Traceback" not in error
    reached = len(list((run / "checkpoints").glob("epoch-*/state.json")))
    assert reached and not (run / "model").exists()


def test_ctrl_c_in_an_extraction_is_exit_code_130_and_what_was_finished_stays(corpus: Path, tmp_path: Path) -> None:
    words = ["extract", "--videos", corpus / "train" / "videos", "--output", tmp_path / "tokens"]
    words += ["--encoder", "x3d-tiny", "--calibration-clips", "24", "--videos-per-part", "2"]
    process = start_command(*words)
    error = interrupt_when(lambda: any((tmp_path / "tokens").glob("part-*.arrow")), process)
    assert process.returncode == 130 and "the same command goes on from here" in error and "Traceback" not in error
    assert not json.loads((tmp_path / "tokens" / "manifest.json").read_text())["complete"]


def test_more_workers_than_the_machine_has_are_refused_with_both_numbers(
    ray: None, tokens: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"--workers 4096: 4096 CPUs are needed and Ray has \d+;"):
        pretrain(training(tokens, tmp_path / "run", workers=4096))
    with pytest.raises(InputError, match=r"2 GPUs are needed and Ray has 0"):
        train_on_workers(print, {}, Workers(2, True, 0, 1), tmp_path)


def note_and_raise(arguments: dict[str, Any]) -> None:
    """A training function: notes that it was started, and fails, every time with the next of the errors."""
    attempts = Path(arguments["notes"]) / "attempts"
    with open(attempts, "a") as file:
        file.write(".")
    raise arguments["errors"][attempts.stat().st_size - 1]


def test_bad_input_is_final_and_anything_else_is_tried_again(ray: None, tmp_path: Path) -> None:
    errors = [OSError("a bad day"), InputError("part 3 is damaged"), OSError("once too often")]
    with pytest.raises(InputError) as raised:
        train_on_workers(
            note_and_raise, {"notes": str(tmp_path), "errors": errors}, Workers(1, False, 5, 60), tmp_path / "run"
        )
    assert str(raised.value) == "part 3 is damaged", "one line, which is what the worker said"
    assert len((tmp_path / "attempts").read_text()) == 2, "the first error was tried again, the second was not"


def test_what_is_final_is_found_in_all_that_ray_wraps_it_in() -> None:
    class Wrapped(Exception):
        """As Ray hands a worker's error on."""

        def __init__(self, cause: Exception) -> None:
            self.cause = cause

    callback = _final_errors()
    for error in (InputError("part 3 is damaged"), FloatingPointError("the loss became nan")):
        with pytest.raises(InputError, match=str(error)):
            callback.after_exception(None, {0: OSError("a bad day"), 1: Wrapped(Wrapped(error))})
    assert callback.after_exception(None, {0: Wrapped(OSError("a bad day"))}) is None


def tell_newest_checkpoint(arguments: dict[str, Any]) -> None:
    """Each worker looks into a folder of its own, as on a file system that shows them different states."""
    import ray.train

    from pipelines.checkpointing import newest_checkpoint

    rank = ray.train.get_context().get_world_rank()
    folder = Path(arguments["folder"]) / f"rank-{rank}"
    (folder / "newest").write_text(str(newest_checkpoint(folder, rank)))


def test_all_workers_continue_from_the_checkpoint_that_the_first_one_sees(ray: None, tmp_path: Path) -> None:
    for rank, epochs in enumerate((2, 1)):
        for epoch in range(1, epochs + 1):
            path = tmp_path / f"rank-{rank}" / "checkpoints" / f"epoch-{epoch:04d}" / "state.json"
            path.parent.mkdir(parents=True)
            path.write_text('{"files": {}}')
    train_on_workers(tell_newest_checkpoint, {"folder": str(tmp_path)}, Workers(2, False, 0, 60), tmp_path / "run")
    newest = [(tmp_path / f"rank-{rank}" / "newest").read_text() for rank in (0, 1)]
    assert newest == [str(tmp_path / f"rank-{rank}" / "checkpoints" / "epoch-0002") for rank in (0, 1)]


def test_an_error_of_the_watch_or_of_the_function_is_raised() -> None:
    def fail() -> None:
        raise InputError("too long")

    with pytest.raises(InputError, match="too long"):
        run_interruptibly(lambda: time.sleep(5), fail, seconds=0.01)
    with pytest.raises(InputError, match="too long"):
        run_interruptibly(fail, lambda: None, seconds=0.01)


# --- With a cluster beside ----------------------------------------------------------------------------------------

CLUSTER = """
import os, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(second)
print("removed", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


@pytest.fixture
def cluster() -> Iterator[subprocess.Popen[str]]:
    """A real Ray cluster of two machines with a CPU each, in a process of its own, which is told to lose the second."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    yield process
    process.communicate("\n\n", timeout=60)


ON_CLUSTER = """
import sys, time
from pathlib import Path
import ray
from pipelines.ray_session import ray_session
from pipelines.ray_training import Workers, _final_errors, train_on_workers
from videoclip.errors import InputError

def work(arguments):
    import ray.train
    (Path(arguments["folder"]) / f"started-{ray.train.get_context().get_world_rank()}").touch()
    time.sleep(300)

with ray_session(None):
    print("alone", len(ray.nodes()), flush=True)
with ray_session(sys.argv[1]):
    print("joined", len(ray.nodes()), flush=True)
    try:
        train_on_workers(work, {"folder": sys.argv[2]}, Workers(2, False, 3, 4), Path(sys.argv[2]))
    except InputError as error:
        print("error", error, flush=True)
"""


def test_a_lost_machine_is_waited_for_and_then_given_up_in_one_line(
    cluster: subprocess.Popen[str], tmp_path: Path
) -> None:
    """And without an address a stage keeps to this machine, though it is part of a cluster."""
    assert cluster.stdout and cluster.stdin
    address = cluster.stdout.readline().strip()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_CLUSTER, address, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    deadline = time.time() + 90
    while len(list(tmp_path.glob("started-*"))) < 2 and process.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    assert len(list(tmp_path.glob("started-*"))) == 2
    cluster.stdin.write("\n")
    cluster.stdin.flush()
    printed = process.communicate(timeout=90)[0]
    assert "alone 1\n" in printed and "joined 2\n" in printed
    assert "error workers were lost and not replaced within 4 s: 2 CPUs are needed and Ray has 1" in printed


def test_without_an_address_ray_runs_here_whatever_the_environment_names(tmp_path: Path) -> None:
    code = "from pipelines.ray_session import *\nwith ray_session(None):\n    print(cluster_processors())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": "nonsense:1"},
    )
    assert done.returncode == 0 and int(done.stdout) >= 1, done.stderr
