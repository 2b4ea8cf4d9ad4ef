"""Does leaving false negatives out of the loss help, and from what similarity on? A world knows the truth.

A world where attributes have 4 values, not 40, is full of videos of the same topic and attributes: what is said of a
step of one is as true of the other. They are what should be left out. The rows of docs/batches.md differ in what is:
nothing; clips of the same words; these, and videos whose embeddings have some cosine; these, and the truth. Precision
and recall are of pairs of videos in one batch, in the last epoch. Some 35 minutes for three seeds on one idle core;
finished runs are kept in --output and not repeated.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from batches import Variant, train

from videoclip.files import read_json, write_json
from videoclip.retrieval.epochs import Clustering
from videoclip.retrieval.false_negatives import FalseNegativeConfig
from videoclip.synthetic.world import World, WorldConfig, videos_of

WORLD = WorldConfig(values=4)
ROWS = {
    "nothing": FalseNegativeConfig(False, None),
    "same words": FalseNegativeConfig(True, None),
    "and videos from 0.98 on (default)": FalseNegativeConfig(),
    "and videos from 0.9 on": FalseNegativeConfig(True, 0.9),
    "and videos from 0.8 on": FalseNegativeConfig(True, 0.8),
    "and videos from 0.7 on": FalseNegativeConfig(True, 0.7),
    "and the truth": FalseNegativeConfig(),
}
COLUMNS = ("one domain", "all", "precision", "recall")


def same_in_truth(config: WorldConfig) -> np.ndarray:
    """int64 [videos]: a label that training videos of the same topic and attributes share."""
    shown = [(video.topic, *video.attributes.tolist()) for video in videos_of(World(config), "train")]
    return np.unique(shown, axis=0, return_inverse=True)[1].reshape(-1)


def agreement(batches: list[np.ndarray], labels: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """Precision and recall in percent of the pairs of one batch that `labels` calls the same."""
    found = right = wanted = 0
    for batch in batches:
        rows, others = np.triu_indices(len(batch), 1)
        called = labels[batch][rows] == labels[batch][others]
        same = truth[batch][rows] == truth[batch][others]
        found, right, wanted = found + called.sum(), right + (called & same).sum(), wanted + same.sum()
    return {"precision": 100 * float(right / found) if found else None, "recall": 100 * float(right / wanted)}


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, float | None]:
    """A finished run's figures, or those of a new one."""
    config = replace(WORLD, seed=seed, videos=options.videos)
    output = options.output / f"{name.replace(' ', '-')}-{config.videos}-{options.epochs}-{seed}"
    if (output / "figures.json").exists():
        return read_json(output / "figures.json")
    truth = same_in_truth(config)
    variant = Variant(negatives=ROWS[name], duplicates=truth if name == "and the truth" else None)
    figures: dict[str, float | None] = {}
    figures |= train(options.output / f"world-{config.videos}-{seed}", config, variant, output, options.epochs)
    last = Clustering.load(output / "batches" / f"clustering-{options.epochs - 1:04d}.npz")
    by_videos = ROWS[name].duplicate_similarity is not None
    labels = variant.duplicates if variant.duplicates is not None else last.duplicates
    figures |= agreement(last.batches, labels if by_videos else np.arange(len(truth)), truth)
    write_json(output / "figures.json", figures)
    return figures


def main() -> None:
    """Train what is missing, and print mean and standard deviation over the seeds, one line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/false-negatives"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    for seed in range(options.seeds):
        for name in ROWS:
            print(f"{name}, seed {seed}: {run(name, seed, options)}", flush=True)
    print("\n| left out | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for name in ROWS:
        figures = [run(name, seed, options) for seed in range(options.seeds)]
        cells = []
        for column in COLUMNS:
            values = [value for of_seed in figures if (value := of_seed[column]) is not None]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}" if values else "-")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
