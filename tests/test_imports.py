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
