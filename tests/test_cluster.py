"""What stands in cluster/ is what it says: the image builds, Kubernetes and Ray take the files, Slurm's job goes on."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli import main
from pipelines.stopping import EXIT_CODE

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
RAY_VERSION = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]  # type: ignore[index]


def accepted_by_ray_start(words: list[str]) -> dict[str, Any]:
    """The options that the present Ray reads from the words of a `ray start`; an unknown one is an error."""
    from ray.scripts.scripts import start

    return dict(start.make_context("ray start", list(words)).params)


def accepted_by_videoclip(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The options that a `videoclip pretrain` reads from its words; nothing is trained."""
    from pipelines import pretrain

    read: list[Any] = []

    def note(config: pretrain.PretrainConfig) -> None:
        read.append(config)

    note.__annotations__ = {"config": "PretrainConfig"}  # the command looks the options' class up by this name
    monkeypatch.setattr(pretrain, "pretrain", note)
    assert main(words) == 0
    return read[0]


# --- The image ----------------------------------------------------------------------------------------------------

PIP = """
import json, os, subprocess, sys
words = [word for word in sys.argv[1:] if word != "--no-cache-dir"]
with open(os.environ["NOTES"], "a") as file:
    file.write(json.dumps(words) + "\\n")
if "--index-url" in words:
    del words[words.index("--index-url") : words.index("--index-url") + 2]
words += ["--no-index", "--no-build-isolation", "--disable-pip-version-check", "-q"]
words += ["--target", os.environ["SITE"]] if words[-6:-4] == ["--no-deps", "."] else ["--dry-run"]
if os.environ["DEVICE"] == "cpu":
    sys.exit(subprocess.call([sys.executable, "-m", "pip", *words]))
"""


@dataclass
class Replay:
    """A Dockerfile's steps done in a folder that stands for the image's root; only named stand-ins can be run there."""

    root: Path
    device: str
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "root"
    started: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.programs = self.root.with_name("programs")
        self.programs.mkdir()
        self.root.mkdir()
        (self.programs / "pip.py").write_text(PIP)
        python = f'exec {shlex.quote(sys.executable)} "$@"\n'
        self._program("python", python)
        self._program("pip", python.replace('"$@"', f'{self.programs}/pip.py "$@"'))
        for name in ("apt-get", "useradd", "chown", "mkdir", "rm"):  # what they do to a real image is not done here
            self._program(name, f'echo "{name} $*" >> "$NOTES"\n')

    def _program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(f"#!/bin/sh\n{text}")
        (self.programs / name).chmod(0o755)

    def run(self, dockerfile: Path, context: set[str]) -> None:
        text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.M).replace("\\\n", "")
        for line in filter(None, map(str.strip, text.split("\n"))):
            keyword, rest = line.split(maxsplit=1)
            if keyword == "ARG":
                name, _, value = rest.partition("=")
                self.environment[name] = {"DEVICE": self.device}.get(name, value)
            elif keyword == "ENV":
                self.environment |= dict(item.split("=", 1) for item in shlex.split(rest))
            elif keyword == "WORKDIR":
                self.folder = rest
                self.inside(rest).mkdir(parents=True, exist_ok=True)
            elif keyword == "USER":
                self.user = rest
            elif keyword == "COPY":
                self._copy(rest.split(), context)
            elif keyword == "RUN":
                self._run(rest)
            elif keyword in ("ENTRYPOINT", "CMD"):
                self.started += json.loads(rest)
            else:
                assert keyword == "FROM", line

    def inside(self, path: str) -> Path:
        return self.root / os.path.join(self.folder, path).lstrip("/")

    def _copy(self, names: list[str], context: set[str]) -> None:
        *sources, target = names
        for source in sources:
            assert source in context, f"{source} is kept from the build by .dockerignore"
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, self.inside(target), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, self.inside(target))

    def _run(self, command: str) -> None:
        known = {"PATH": str(self.programs), "NOTES": str(self.notes), "SITE": str(self.site), "HOME": str(self.root)}
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=self.inside("."),
            env={**self.environment, **known},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    @property
    def notes(self) -> Path:
        return self.root.with_name("notes")

    @property
    def site(self) -> Path:
        """Where the package itself is installed."""
        return self.root.with_name("site")


def build_context() -> set[str]:
    """Names that Dockerfile.dockerignore lets through; it names them one by one."""
    lines = [
        line for line in (CLUSTER / "Dockerfile.dockerignore").read_text().split("\n") if line[:1] not in ("", "#")
    ]
    assert lines[0] == "*"
    return {line[1:] for line in lines if line.startswith("!")}


@pytest.fixture
def image(tmp_path: Path) -> Callable[[str], Replay]:
    def build(device: str) -> Replay:
        replay = Replay(tmp_path / "root", device)
        replay.run(CLUSTER / "Dockerfile", build_context())
        return replay

    return build


@pytest.mark.slow
def test_the_image_builds_and_holds_a_command_that_runs_as_nobody_special(image: Callable[[str], Replay]) -> None:
    """Its steps replayed. Dependencies are resolved against what is installed here, under the same constraints, and not
    installed; the package itself is built from what the Dockerfile copies, installed, and started."""
    built = image("cpu")
    pip = [json.loads(line) for line in built.notes.read_text().split("\n") if line.startswith("[")]
    assert [words[-1] for words in pip] == ["torch", "requirements.txt", "."]
    assert "https://download.pytorch.org/whl/cpu" in pip[0] and all("constraints.txt" in words for words in pip[:2])
    wanted = built.inside("/opt/videoclip/requirements.txt").read_text()
    assert "faiss-cpu" in wanted and "faiss-gpu" not in wanted and "ray[default]" in wanted and "fastapi" in wanted
    assert built.user == "videoclip" and "useradd --create-home --uid 1000 videoclip" in built.notes.read_text()
    assert built.started[0] == "videoclip"
    command = [sys.executable, str(built.site / "bin" / "videoclip"), *built.started[1:]]
    environment = {**os.environ, "PYTHONPATH": str(built.site)}
    done = subprocess.run(command, cwd=built.root, env=environment, capture_output=True, text=True, check=True)
    assert "usage: videoclip VERB" in done.stdout
    for path in ("videoclip/py.typed", "videoclip/report/report.html.jinja", "pipelines/page/index.html"):
        assert (built.site / path).exists(), path


def test_the_image_for_gpus_takes_their_builds(image: Callable[[str], Replay]) -> None:
    """Only what pip is asked for: CUDA's packages are not at hand."""
    built = image("gpu")
    notes = built.notes.read_text()
    wanted = built.inside("/opt/videoclip/requirements.txt").read_text()
    assert "faiss-gpu" in wanted and "faiss-cpu" not in wanted and "index-url" not in notes
    assert {"video", "compute"} <= set(built.environment["NVIDIA_DRIVER_CAPABILITIES"].split(","))


def test_another_device_ends_the_build(image: Callable[[str], Replay]) -> None:
    with pytest.raises(AssertionError, match="DEVICE is cpu or gpu, not tpu"):
        image("tpu")


# --- Kubernetes ---------------------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON schema in which nothing may stand that the CRD does not name."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(value) for key, value in schema.items() if key != "default"}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        made.setdefault("additionalProperties", False)
    return made


def crd_schemas() -> Iterator[Any]:
    for path in (Path(__file__).with_name("rayjob_crd.yaml"), os.environ.get("VIDEOCLIP_RAYJOB_CRD")):
        if path:
            versions = yaml.safe_load(Path(path).read_text())["spec"]["versions"]
            yield strict(next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"])


def test_kubernetes_takes_the_ray_job(monkeypatch: pytest.MonkeyPatch) -> None:
    import jsonschema

    job = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text())
    for schema in crd_schemas():
        jsonschema.validate(job, schema)
        misspelt, mistyped = copy.deepcopy(job), copy.deepcopy(job)
        misspelt["spec"]["backOffLimit"] = misspelt["spec"].pop("backoffLimit")
        mistyped["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
        for wrong in (misspelt, mistyped):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, schema)
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == RAY_VERSION
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        accepted_by_ray_start([f"--{name}={value}" for name, value in group["rayStartParams"].items()])
    program, *words = shlex.split(job["spec"]["entrypoint"])
    config = accepted_by_videoclip(words, monkeypatch)
    (group,) = cluster["workerGroupSpecs"]
    gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] * group["replicas"]
    assert program == "videoclip" and config.workers == gpus == config.batches_per_step


# --- Ray's launcher -----------------------------------------------------------------------------------------------


def test_ray_takes_the_launchers_file_and_its_commands() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    with pytest.raises(Exception, match="setup_comands"):
        validate_config({**prepared, "setup_comands": []})
    for key, is_head in (("head_start_ray_commands", True), ("worker_start_ray_commands", False)):
        (start,) = [line for line in config[key] if " start " in line]
        words = shlex.split(start.replace("$RAY_HEAD_IP", "10.0.0.1"))
        options = accepted_by_ray_start(words[words.index("start") + 1 :])
        assert options["head"] == is_head and (options["address"] == "10.0.0.1:6379") != is_head


# --- Slurm --------------------------------------------------------------------------------------------------------

STAND_INS = {
    # Slurm's: runs the command here, once, and says on which nodes it would.
    "srun": 'echo "srun $*" >> "$LOG"\nwhile [ "${1#-}" != "$1" ]; do [ "$1" = -w ] && shift; shift; done\nexec "$@"',
    "scontrol": 'echo "scontrol $*" >> "$LOG"\n[ "$1" = show ] && printf "one\\ntwo\\nthree\\n" || true',
    "hostname": "echo 10.0.0.7 fe80::1",
    # Ours: Ray stays until it is told to end; the command does so, too, and leaves a checkpoint.
    ".venv/bin/ray": 'echo "ray $*" >> "$LOG"\ntrap "echo ray ended >> $LOG; kill %1; exit 0" TERM\nsleep 60 & wait',
    ".venv/bin/python": 'echo "wait $2 $3" >> "$LOG"\n[ "$3" != "$NEVER" ] || exec sleep 60',
    ".venv/bin/videoclip": 'trap "kill %1; sleep 0.3; echo checkpoint >> $LOG; exit 75" TERM\n'
    'echo "videoclip $*" >> "$LOG"\nsleep "$SECONDS_OF_WORK" & wait; exit "$CODE"',
}


class SlurmJob:
    """cluster/slurm.sh as Slurm's batch shell, with stand-ins for everything that it calls."""

    def __init__(self, folder: Path, code: int = 0, work: float = 60, never: str = "") -> None:
        self.log = folder / "log"
        folder.mkdir(exist_ok=True)
        self.log.touch()
        for name, text in STAND_INS.items():
            path = folder / name if "/" in name else folder / "bin" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/bash\n{text}\n")
            path.chmod(0o755)
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "[one-three]", "SLURM_CPUS_PER_TASK": "64"}
        test = {"LOG": str(self.log), "CODE": str(code), "SECONDS_OF_WORK": str(work), "NEVER": never}
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", str(CLUSTER / "slurm.sh"), "pretrain", "--shards", "a b"],
            cwd=folder,
            env={**os.environ, **slurm, **test, "PATH": path, "SLURM_GPUS_ON_NODE": "8"},
        )

    def terminate_after(self, line: str) -> None:
        """SIGTERM to the batch shell alone, as --signal=B:TERM@120 has it, once a line is in the log."""
        deadline = time.monotonic() + 20
        while not any(found.startswith(line) for found in self.lines()) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.process.send_signal(signal.SIGTERM)

    def lines(self) -> list[str]:
        return self.log.read_text().split("\n")[:-1]

    def end(self) -> int:
        return self.process.wait(20)


def test_a_slurm_job_starts_ray_on_all_nodes_and_the_command_on_it(tmp_path: Path) -> None:
    job = SlurmJob(tmp_path, work=0)
    assert job.end() == 0
    lines = job.lines()
    starts = [line.removeprefix("ray start ").split() for line in lines if line.startswith("ray start")]
    head, others = (accepted_by_ray_start(words) for words in starts)
    assert head["head"] and head["node_ip_address"] == "10.0.0.7" and head["port"] == 24711
    assert others["address"] == "10.0.0.7:24711" and not others["head"]
    assert {option["num_gpus"] for option in (head, others)} == {8} and head["num_cpus"] == others["num_cpus"] == 64
    assert any(line.startswith("srun --nodes=2 --ntasks=2 -w two,three") for line in lines)
    waits = [line for line in lines if line.startswith("wait")]
    assert waits == ["wait 10.0.0.7:24711 1", "wait 10.0.0.7:24711 3"], "the others join a head that is there"
    assert "videoclip pretrain --shards a b --address 10.0.0.7:24711" in lines
    assert lines.count("ray ended") == 2 and not any("requeue" in line for line in lines)


def test_sigterm_reaches_the_command_whose_checkpoint_is_waited_for_and_the_job_queues_again(tmp_path: Path) -> None:
    job = SlurmJob(tmp_path)
    job.terminate_after("videoclip")
    assert job.end() == EXIT_CODE
    lines = job.lines()
    assert lines[-1] == "scontrol requeue 4711" and lines.index("checkpoint") < lines.index("ray ended")


def test_a_job_told_to_stop_before_its_command_runs_queues_again_and_one_that_failed_does_not(tmp_path: Path) -> None:
    waiting = SlurmJob(tmp_path / "waiting", never="3")
    waiting.terminate_after("wait 10.0.0.7:24711 3")
    assert waiting.end() == EXIT_CODE and waiting.lines()[-1] == "scontrol requeue 4711"
    failed = SlurmJob(tmp_path / "failed", code=2, work=0)
    assert failed.end() == 2 and not any("requeue" in line for line in failed.lines())


def test_the_slurm_jobs_own_options_leave_time_for_a_checkpoint() -> None:
    from pipelines.stopping import GRACE

    words = re.findall(r"^#SBATCH (\S+)$", (CLUSTER / "slurm.sh").read_text(), re.M)
    (before,) = [int(word.rpartition("@")[2]) for word in words if word.startswith("--signal=B:TERM@")]
    assert before >= GRACE + 60 and "--requeue" in words, "Ray itself takes a while to end"
