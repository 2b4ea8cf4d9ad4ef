"""Localisation methods side by side on the embedded corpus, and the time that a two-hour video takes.

Needs a finished demo (`make demo`, or `videoclip demo --seed N --output DIR`).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from pipelines.evaluate import load_model_and_shards
from videoclip.data.qvhighlights import read_qvhighlights
from videoclip.evaluation.localization import LocalizationConfig, find_moments, localize
from videoclip.evaluation.moments import moment_metrics

FIGURES = ("MR-full-R1@0.5", "MR-full-R1@0.7", "MR-full-mAP", "HL-min-VeryGood-Hit1")


def main() -> None:
    """Print a table of both methods, their ratio, and seconds for two hours and 100 queries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    demo = parser.parse_args().demo
    if not (demo / "model").exists():
        print(f"{demo}: no finished demo here; run `make demo` first. Skipped.")
        sys.exit(0)
    model, shards = load_model_and_shards(demo / "model", demo / "tokens" / "test")
    queries = read_qvhighlights(demo / "corpus" / "qvhighlights_val.jsonl")
    figures = {}
    print(f"{'':12s}" + "".join(f"{name:>22s}" for name in FIGURES))
    for method in ("sliding", "threshold"):
        predictions, _ = localize(model, shards, queries, LocalizationConfig(method))
        figures[method] = moment_metrics(predictions, queries)["brief"]
        print(f"{method:12s}" + "".join(f"{figures[method][name]:22.2f}" for name in FIGURES))
    ratios = (figures["threshold"][name] / figures["sliding"][name] for name in FIGURES)
    print(f"{'ratio':12s}" + "".join(f"{ratio:22.2f}" for ratio in ratios))
    tokens = np.concatenate([shards.tokens(row) for row in range(len(shards))])
    tokens = np.tile(tokens, (2 * 3600 // len(tokens) + 1, 1))[: 2 * 3600]
    texts = model.encode_text([query.query for query in queries[:100]]).numpy()
    start = time.perf_counter()
    find_moments(model, tokens, texts)
    print(f"two hours of tokens, {len(texts)} queries: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
