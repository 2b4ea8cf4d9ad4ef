"""The library is light to import and knows nothing of Ray."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = ("ray", "faiss", "av", "pytorchvideo", "transformers", "tokenizers", "pyarrow", "matplotlib", "tensorboard")


def test_the_library_never_imports_ray() -> None:
    for path in (ROOT / "videoclip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("ray", "pipelines") for name in names), path


# Imports go from right to left only.
ROOMS = (
    *("errors", "remote", "files", "storage", "packed", "gather", "losses", "transformer", "checkpoints", "data"),
    *("synthetic", "prefetch"),
    *(
        "retrieval",
        "encoders",
        "pretrained",
        "two_towers",
        "frame_model",
        "parts",
        "model",
        "embedding",
        "gradient_caching",
        "training",
    ),
    *("sentence_transformers_module", "recipes", "convert"),
    *("evaluation", "alignment", "search", "report", "pipelines"),
)


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    paths = [*(ROOT / "videoclip").rglob("*.py"), *(ROOT / "pipelines").glob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, those inside functions and for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & known.keys()) or {node.module}
    return found & known.keys()


def test_imports_go_downwards_and_never_in_a_circle() -> None:
    known = modules()
    below = {name: imports_of(path, known) - {name} for name, path in known.items()}
    for name, others in below.items():
        for other in others - {"videoclip", "pipelines"}:
            own, its = (part.split(".")[1] if part.startswith("videoclip.") else "pipelines" for part in (name, other))
            if name != "videoclip":
                assert ROOMS.index(its) <= ROOMS.index(own), f"{name} imports {other}, which is above it"
    while free := [name for name, others in below.items() if not others & below.keys()]:
        for name in free:
            del below[name]
    assert not below, f"modules that import each other: {sorted(below)}"


def test_files_and_functions_stay_short() -> None:
    for name, path in modules().items():
        source = path.read_text()
        assert source.count("\n") <= 400, f"{name} has {source.count(chr(10))} lines: two subjects in one room?"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None and node.end_lineno - node.lineno < 60, f"{name}.{node.name}"


def test_training_needs_only_torch_numpy_and_safetensors() -> None:
    code = f"""
import sys
for name in {HEAVY!r}: sys.modules[name] = None  # importing any of them now fails
import videoclip, torch, numpy as np
from videoclip import VideoCLIP, VideoCLIPConfig
from videoclip.data.clips import ClipBatch
from videoclip.packed import Packed
from videoclip.recipes.videoclip import Recipe
from videoclip.training import OptimizerConfig, make_optimizer, step
config = VideoCLIPConfig(
    video_dimension=8, width=16, layers=1, heads=2, intermediate=32, vocabulary=30, cls_id=2, sep_id=3
)
model = Recipe(config)
optimizer = make_optimizer(model, OptimizerConfig())
rng = np.random.default_rng(0)
lengths = torch.tensor([3, 4])
batch = ClipBatch(Packed(torch.from_numpy(rng.standard_normal((7, 8)).astype(np.float16)), lengths),
                  Packed(torch.tensor([2, 9, 3, 2, 11, 12, 3]), lengths), torch.tensor([0, 1]))
print(step(model, optimizer, batch, 1e-3, 2.0)["loss"])
model.save_pretrained(sys.argv[1]); VideoCLIP.from_pretrained(sys.argv[1])
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0


def test_scoring_predictions_does_not_wait_for_torch() -> None:
    code = "import sys, pipelines.cli, pipelines.evaluate_moments; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
