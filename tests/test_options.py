"""A YAML file fills options; every fault in it is one line that names the file and the option."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tyro

from pipelines.cli import VERBS, main
from pipelines.options import read_options
from pipelines.pretrain import PretrainConfig
from videoclip.errors import InputError


def options_file(folder: Path, text: str) -> Path:
    path = folder / "o.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: many", 'epochs: should be a valid integer, not "many"'),
        ("epochs: 7.5", "epochs: should be a valid integer"),
        ("epochs: true", "epochs: should be a valid integer, not true"),
        ("epochs:", "epochs: should be a valid integer, not null"),
        ("epochs: [1, 2]", "epochs: should be a valid integer"),
        ("shards: 7", "shards: should be a valid string"),
        ("verify: 'no'", "verify: should be a valid boolean"),
        ("optimizer: {betas: 0.5}", "optimizer.betas: should be a valid array, not 0.5"),
        ("optimizer: {betas: [0, hard]}", 'optimizer.betas.1: should be a valid number, not "hard"'),
        ("optimizer: {betas: [0.9]}", "optimizer.betas.1: Field required"),
        ("model: 3", "model: expected options by name, not 3"),
        ("model: [width, 64]", "model: expected options by name"),
        ("model: {width: wide}", 'model.width: should be a valid integer, not "wide"'),
        ("model: {width: {of: 3}}", "model.width: should be a valid integer"),
        ("model: {hats: 3}", "unknown option model.hats; known in model are width, layers"),
        ("width: 64", "unknown options width; it belongs inside model"),
        ("epoch: 7", "unknown options epoch; known are shards, output"),
        ("[epochs, 7]", "expected options by name"),
        ("7", "expected options by name"),
        ("epochs: [", "not valid YAML"),
        ("&a [*a]", "not valid YAML"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_a_fault_in_a_yaml_file_is_one_line_with_file_and_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = options_file(tmp_path, text)
    assert main(["pretrain", "--shards", "nowhere", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count("\n") == 1


def test_a_file_that_cannot_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(InputError, match=str(path)):
            read_options(path, PretrainConfig)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00epochs")
    with pytest.raises(InputError, match="not valid YAML"):
        read_options(tmp_path / "bytes.yaml", PretrainConfig)


def test_values_become_what_the_dataclass_says(tmp_path: Path) -> None:
    path = options_file(
        tmp_path,
        "shards: a\ntopics: t.csv\nclusters-per-batch: 3\nvideos-per-batch: 3\ngpu: null\n"
        "optimizer: {learning-rate: 5e-5, betas: [0.5, 0.9]}\nmodel: {dropout: 0}\n",
    )
    config = read_options(path, PretrainConfig)
    assert (config.shards, config.topics, config.clusters_per_batch) == (Path("a"), Path("t.csv"), 3)
    assert (config.videos_per_batch, config.gpu, config.model.dropout) == (3, None, 0.0)
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (5e-5, (0.5, 0.9))
    assert read_options(options_file(tmp_path, ""), PretrainConfig).epochs == PretrainConfig(Path("a")).epochs


def test_options_win_over_the_file_and_what_neither_gives_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = options_file(tmp_path, "epochs: 7\nmodel: {width: 64}\n")
    default = read_options(path, PretrainConfig)
    config = tyro.cli(PretrainConfig, args=["--shards", "a", "--epochs", "9"], default=default)
    assert (config.shards, config.epochs, config.model.width, config.model.heads) == (Path("a"), 9, 64, 12)
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--config", str(path)])
    assert stop.value.code == 2 and "--shards" in "".join(capsys.readouterr())


@dataclass(frozen=True)
class Inner:
    count: int = 1


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)


def test_options_inside_others_keep_their_own_defaults(tmp_path: Path) -> None:
    assert read_options(options_file(tmp_path, "inner: {}"), Outer) == Outer()
    assert read_options(options_file(tmp_path, "inner: {count: 2}"), Outer) == Outer(Inner(2))


def test_the_overview_tells_every_verb_from_its_docstring_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pipelines.cli import main; main(['--help']); "
        "print(sorted({'torch', 'ray', 'tyro', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    told = {line[2:26].strip(): line[26:] for line in lines if line.startswith("  ")}
    assert set(told) == set(VERBS) and all(len(line) > 10 for line in told.values())
    assert told["pretrain"] == (PretrainConfig.__doc__ or "").split(".")[0]
