"""Do the tests notice? Small changes are made to the library, one at a time, and the tests that cover the file are run.

Every file's syntax tree gives its mutants: comparisons, arithmetic, constants, boolean operators, dropped statements,
dropped calls and keywords, swapped arguments. A seeded sample of them is tried, and the changes of `NAMED`, which once
passed every test. Each mutant runs in a process of its own with a time limit, in a copy of the tree. What survives is
printed with file and line: a test that is missing, or a change that makes no difference.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = "tests/test_workers.py"
# What covers a file, quick tests first: the first failure ends a mutant.
COVERED = {
    "videoclip/losses.py": ["tests/test_losses.py", "tests/test_teachtext.py", WORKERS],
    "videoclip/training.py": ["tests/test_training.py", WORKERS],
    "videoclip/gather.py": ["tests/test_pairs.py", "tests/test_global_batch.py", WORKERS],
    "videoclip/parts/pairs.py": ["tests/test_pairs.py", "tests/test_global_batch.py", WORKERS],
    "videoclip/recipes/videoclip.py": ["tests/test_model.py", "tests/test_training.py", WORKERS],
    "videoclip/data/clips.py": ["tests/test_clips.py"],
    "videoclip/retrieval/clustering.py": ["tests/test_retrieval.py"],
    "videoclip/retrieval/false_negatives.py": [
        "tests/test_losses.py",
        "tests/test_retrieval.py",
        "tests/test_training.py",
    ],
    "videoclip/retrieval/figures.py": ["tests/test_retrieval.py"],
    "videoclip/retrieval/index.py": ["tests/test_retrieval.py"],
    "videoclip/retrieval/epochs.py": ["tests/test_epochs.py"],
    "videoclip/evaluation/retrieval.py": [
        "tests/test_evaluation.py",
        "tests/test_comparison.py",
        "tests/test_zero_shot.py",
    ],
    "videoclip/evaluation/moments.py": ["tests/test_evaluation.py"],
    "videoclip/evaluation/localization.py": ["tests/test_evaluation.py"],
    "videoclip/evaluation/actions.py": ["tests/test_zero_shot.py"],
}
# Imported once, before the processes of the mutants are split off; nothing of the tree itself.
HEAVY = [
    "numpy",
    "torch",
    "torch.distributed",
    "pyarrow",
    "faiss",
    "hypothesis",
    "pytest",
    "ray.data",
    "ray.train",
    "tyro",
]


@dataclass(frozen=True)
class Mutant:
    """A change to one file: where it stands, what it does in words, and the whole text of the file with it."""

    file: str
    line: int
    change: str
    source: str
    tests: tuple[str, ...]


# --- Mutants of a syntax tree -------------------------------------------------------------------------------------

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


def changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in the place of a node; None for nothing at all."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in COMPARISONS.get(type(operator), ()):
                yield _with(node, ops=[*node.ops[:place], other(), *node.ops[place + 1 :]])
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
        yield _with(node, op=ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for place in range(len(node.values)):
            rest = [*node.values[:place], *node.values[place + 1 :]]
            yield rest[0] if len(rest) == 1 else _with(node, values=rest)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield _with(node, value=not node.value)
        elif isinstance(node.value, (int, float)):
            yield _with(node, value=node.value + 1 if isinstance(node.value, int) else 1.1 * node.value + 0.01)
    elif isinstance(node, ast.Call):
        yield from _changed_calls(node)
    elif isinstance(node, ast.Slice) and (node.lower or node.upper):
        if node.lower:
            yield _with(node, lower=None)
        if node.upper:
            yield _with(node, upper=None)
    if isinstance(node, (ast.Expr, ast.AugAssign, ast.Raise, ast.Continue, ast.Break)):
        yield ast.Pass()
    elif isinstance(node, ast.If):
        yield _with(node, test=ast.Constant(False))


def _changed_calls(node: ast.Call) -> Iterator[ast.AST]:
    if len(node.args) > 1 and ast.dump(node.args[0]) != ast.dump(node.args[1]):
        yield _with(node, args=[node.args[1], node.args[0], *node.args[2:]])
    for place in range(len(node.keywords)):
        yield _with(node, keywords=[*node.keywords[:place], *node.keywords[place + 1 :]])
    if isinstance(node.func, ast.Attribute) and not isinstance(node.func.value, ast.Name):
        yield node.func.value  # the call is left out, what it was called on stays
    elif len(node.args) == 1:
        yield node.args[0]


def _with(node: ast.AST, **values: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


def mutants_of(file: str) -> list[Mutant]:
    """All mutants of a file. Left alone: docstrings, annotations, and what only words an error."""
    text = (ROOT / file).read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = []
    for parent, name, place, node in _places(tree):
        for change in changes(node):
            siblings = getattr(parent, name)
            if place is None:
                setattr(parent, name, change)
            else:
                siblings[place] = change
            source = ast.unparse(ast.fix_missing_locations(tree))
            if place is None:
                setattr(parent, name, node)
            else:
                siblings[place] = node
            line = getattr(node, "lineno", getattr(parent, "lineno", 0))
            found.append(Mutant(file, line, f"{_short(node)} -> {_short(change)}", source, tuple(COVERED[file])))
    return found


def _places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every node below, with its parent, the parent's field and the place in it, but for those that are left alone."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "exc", "bases", "type_comment"):
            continue
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if not isinstance(child, ast.AST) or is_text or isinstance(child, ast.JoinedStr):
                continue
            yield node, name, place, child
            yield from _places(child)


def _short(node: ast.AST | None) -> str:
    text = "nothing" if node is None else " ".join(ast.unparse(node).split())
    return text if len(text) <= 70 else text[:67] + "…"


# --- Mutants with a name ------------------------------------------------------------------------------------------

STAGE = "tests/test_pipelines.py::test_two_workers_train_together_on_all_videos_as_one_would"
NAMED = [  # name, file, text that stands there once, what takes its place, tests
    (
        "no data parallelism",
        "pipelines/pretrain_worker.py",
        "self.trained = prepare_model(self.recipe)",
        "self.trained = self.recipe",
        [STAGE],
    ),
    (
        "negatives of the own worker only",
        "videoclip/recipes/videoclip.py",
        "pairs = gather_pairs(video, text, batch)\n",
        "pairs = gather_pairs(video, text, replace(batch, rows_per_rank=(len(batch),)))\n",
        [WORKERS],
    ),
    (
        "near-duplicates of a clustering dropped",
        "pipelines/pretrain_worker.py",
        "            clustering.duplicates,\n",
        "            None,\n",
        [STAGE],
    ),
    (
        "near-duplicates do not reach the labels",
        "videoclip/training.py",
        "pair_labels(batch, self.negatives, self.duplicates, ",
        "pair_labels(batch, self.negatives, None, ",
        ["tests/test_training.py"],
    ),
    (
        "no factor of world_size()",
        "videoclip/training.py",
        'outputs["loss"] * len(batch) * world_size()',
        'outputs["loss"] * len(batch)',
        [WORKERS],
    ),
    (
        "excluded pairs not given to the loss",
        "videoclip/parts/pairs.py",
        "gathered, block.rank_offset, block.excluded)",
        "gathered, block.rank_offset)",
        ["tests/test_training.py"],
    ),
    (
        "the same clips every epoch",
        "videoclip/training.py",
        "default_rng([self.seed, self.epoch, place, number])",
        "default_rng([self.seed, place, number])",
        ["tests/test_training.py"],
    ),
    (
        "every epoch is drawn as the first",
        "pipelines/pretrain_worker.py",
        "            plan.seed,\n            epoch,\n",
        "            plan.seed,\n            0,\n",
        [STAGE],
    ),
]


def named_mutants() -> list[Mutant]:
    """The mutants of `NAMED`. Raises ValueError if the text that one changes no longer stands there once."""
    found = []
    for name, file, before, after, tests in NAMED:
        text = (ROOT / file).read_text(encoding="utf-8")
        if text.count(before) != 1:
            raise ValueError(f"{name}: {file} holds {before!r} {text.count(before)} times")
        line = text[: text.index(before)].count("\n") + 1
        source = text.replace(before, after)
        if "replace(pairs" in after:
            source = source.replace("from dataclasses import dataclass", "from dataclasses import dataclass, replace")
        found.append(Mutant(file, line, name, source, tuple(tests)))
    return found


# --- Running them -------------------------------------------------------------------------------------------------


def run_tests(tree: Path, tests: tuple[str, ...], limit: float, log: Path) -> str:
    """Run tests in a process split off from this one: "passed", "failed" or "timeout"."""
    process = os.fork()
    if process == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"] = str(tree)
        import pytest

        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        os._exit(int(code))
    end = time.monotonic() + limit
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return "passed" if status == 0 else "failed"
            time.sleep(0.02)
        return "timeout"
    finally:  # also after Ctrl-C: with everything that the tests have started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)


def try_mutant(tree: Path, mutant: Mutant, limits: dict[tuple[str, ...], float]) -> str:
    """What the mutant's tests say of it, file after file; the copy of the tree is as it was before afterwards."""
    path = tree / mutant.file
    before = path.read_text(encoding="utf-8")
    path.write_text(mutant.source, encoding="utf-8")
    try:
        return run_tests(tree, mutant.tests, limits[mutant.tests], tree / "log.txt")
    finally:
        path.write_text(before, encoding="utf-8")


def time_limits(tree: Path, mutants: list[Mutant]) -> dict[tuple[str, ...], float]:
    """Seconds that each set of tests may take: generously more than with nothing changed.

    Tests that fail with nothing changed are told, and get no limit.
    """
    limits = {}
    for tests in dict.fromkeys(mutant.tests for mutant in mutants):
        start = time.monotonic()
        outcome, seconds = run_tests(tree, tests, 900, tree / "log.txt"), time.monotonic() - start
        names = " ".join(test for test in tests if not test.startswith("--"))
        print(f"{seconds:6.1f} s, {outcome} with nothing changed: {names}", flush=True)
        if outcome == "passed":
            limits[tests] = 30 + 4 * seconds
        else:
            print((tree / "log.txt").read_text()[-1000:])
    return limits


def chosen(arguments: argparse.Namespace) -> list[Mutant]:
    """The named mutants, then a sample of the others, the same for the same seed."""
    files = arguments.only or ["NAMED", *COVERED]
    mutants = named_mutants() if "NAMED" in files else []
    for file in [file for file in COVERED if file in files]:
        others = mutants_of(file)
        sample = random.Random(f"{arguments.seed} {file}").sample(others, min(arguments.count, len(others)))
        print(f"{file}: {len(sample)} of {len(others)} mutants")
        mutants += sorted(sample, key=lambda mutant: mutant.line)
    return mutants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10, help="mutants of each file, beside the named ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="files, as in COVERED, or NAMED")
    parser.add_argument("--deselect", nargs="+", default=[], help="tests that are left out because they take long")
    parser.add_argument("--output", type=Path, default=Path("runs/mutations.jsonl"))
    arguments = parser.parse_args()
    mutants = chosen(arguments)
    left_out = tuple(f"--deselect={test}" for test in arguments.deselect)
    mutants = [replace(mutant, tests=(*mutant.tests, *left_out)) for mutant in mutants]
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a mutant of the same size, a second later, would be read from it
    sys.dont_write_bytecode = True
    os.environ.setdefault(
        "VIDEOCLIP_REFERENCE", str(ROOT.parent / "shared" / "reference")
    )  # as tests/conftest.py looks
    for name in HEAVY:
        importlib.import_module(name)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, open(arguments.output, "w", encoding="utf-8") as file:
        tree = Path(folder) / "tree"
        left_out = shutil.ignore_patterns("__pycache__", ".*cache", ".git", ".venv", "runs", "shared", "build")
        shutil.copytree(ROOT, tree, ignore=left_out)
        limits = time_limits(tree, mutants)
        mutants = [mutant for mutant in mutants if mutant.tests in limits]
        for number, mutant in enumerate(mutants, 1):
            outcome = try_mutant(tree, mutant, limits)
            outcomes[outcome] += 1
            row = {key: value for key, value in asdict(mutant).items() if key in ("file", "line", "change")}
            file.write(json.dumps({**row, "outcome": outcome}) + "\n")
            file.flush()
            if outcome == "passed":
                print(f"survived: {mutant.file}:{mutant.line}  {mutant.change}", flush=True)
            elif number % 10 == 0:
                print(f"{number} of {len(mutants)}", flush=True)
    killed = outcomes["failed"] + outcomes["timeout"]
    print(
        f"{killed} of {len(mutants)} noticed ({outcomes['timeout']} by the time limit), {outcomes['passed']} survived"
    )


if __name__ == "__main__":
    main()
