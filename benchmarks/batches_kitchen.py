"""What similar videos in a batch are worth on the embedded corpus: same steps, several kinds of batches.

Three seeds, each with a corpus of its own; every run is the demo's pretraining, with its number of steps, but for its
batches. Some 35 minutes on two cores. Corpora and tokens are kept in --output and are used again, and so are finished
runs. A recipe of the corpus has 6 or 7 training videos: `--videos-per-batch 6` lets a batch be of one recipe.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.experiment import Corpus, evaluate, prepare_corpus, pretraining
from pipelines.pretrain import PretrainConfig, pretrain
from pipelines.ray_session import ray_session
from videoclip.files import read_json_lines, write_json

VARIANTS: dict[str, dict[str, Any]] = {
    "random": {"batches": "random"},
    "one cluster": {"clusters_per_batch": 1},
    "default": {},
    "default, by frozen tokens": {"similarity": "tokens"},
    "paper": {"batches": "paper"},
}
COLUMNS = ("cosine", "purity", "hard negatives", "left out", "R@1", "R@10", "MR-full-R1@0.5")


def of_size(config: PretrainConfig, videos_per_batch: int, corpus: Corpus) -> PretrainConfig:
    """The same number of steps with batches of another size."""
    videos = sum(video.split == "train" for video in corpus.videos)
    steps = config.epochs * math.ceil(videos / config.videos_per_batch)
    epochs = max(1, round(steps / math.ceil(videos / videos_per_batch)))
    return replace(config, videos_per_batch=videos_per_batch, epochs=epochs)


def of_run(config: PretrainConfig, retrieval: dict[str, Any], moments: dict[str, Any]) -> dict[str, float]:
    """One run's figures; those of training are means over its second half."""
    rows = read_json_lines(config.output / "metrics.jsonl")
    late = [row for row in rows if row["step"] >= len(rows) / 2]
    mean = {name: float(np.mean([row[name] for row in late if name in row])) for name in late[0] | rows[0]}
    return {
        "cosine": mean["batches/cosine"],
        "purity": mean["batches/purity"],
        "hard negatives": 100 * mean["hard_negatives"],
        "left out": 100 * mean["excluded"],
        "R@1": retrieval["R@1"],
        "R@10": retrieval["R@10"],
        "MR-full-R1@0.5": moments["brief"]["MR-full-R1@0.5"],
    }


def main() -> None:
    """Print mean and standard deviation over the seeds, one line a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/batches-kitchen"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="ROW")
    parser.add_argument("--videos-per-batch", type=int, default=16)
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in options.rows}
    with ray_session(None):
        for seed in range(options.seeds):
            folder = options.output / f"seed-{seed}"
            corpus = prepare_corpus(folder, seed)
            for variant in options.rows:
                name = f"{variant.replace(' ', '-').replace(',', '')}-of-{options.videos_per_batch}"
                config = of_size(pretraining(corpus, folder / name, seed), options.videos_per_batch, corpus)
                config = replace(config, **VARIANTS[variant])
                model = pretrain(config).model
                results[variant].append(of_run(config, *evaluate(corpus, model, folder / name / "evaluation")))
    write_json(options.output / f"batches-of-{options.videos_per_batch}.json", results)
    print("| batches | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for variant, runs in results.items():
        cells = []
        for column in COLUMNS:
            values = [run[column] for run in runs]
            digits = 3 if column == "cosine" else 1
            spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}")
        print(f"| {variant} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
