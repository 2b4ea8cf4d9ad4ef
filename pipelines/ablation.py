"""`videoclip demo --ablate`: what each of the paper's choices is worth on the embedded corpus."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.experiment import Corpus, evaluate, prepare_corpus, pretraining
from pipelines.pretrain import PretrainConfig, pretrain
from pipelines.ray_session import ray_session
from videoclip.files import write_json, write_text

SEEDS = 3
FIGURES = ("R@1", "R@10", "MR-full-R1@0.5", "MR-full-mAP")
VARIANTS = {
    "the paper's choices": "overlapping positives, clustered batches, shared transformer, mean pooling",
    "exact positives": "the video clip is the span of the captions",
    "random batches": "videos of a batch have nothing in common",
    "separate transformers": "one for video and one for text",
    "[CLS] pooling": "instead of the mean over all tokens",
}


def ablate(folder: Path, first_seed: int, weights: Path | None, epochs: int, address: str | None) -> dict[str, Any]:
    """Train every variant on the corpora of three seeds; write and print one table. Finished runs are kept.

    Returns {variant: {figure: [one value a seed]}}.
    """
    results: dict[str, Any] = {variant: {figure: [] for figure in FIGURES} for variant in VARIANTS}
    with ray_session(address):
        for seed in range(first_seed, first_seed + SEEDS):
            of_seed = folder / f"seed-{seed}"
            corpus = prepare_corpus(of_seed, seed, weights)
            for variant in VARIANTS:
                config = pretraining(corpus, of_seed / _folder_name(variant), seed, epochs)
                figures = _run(_vary(config, variant), corpus)
                for figure in FIGURES:
                    results[variant][figure].append(figures[figure])
    write_json(folder / "ablation.json", results)
    table = as_table(results)
    write_text(folder / "ablation.md", table)
    print(table)
    return results


def _folder_name(variant: str) -> str:
    return variant.strip("[]").replace("] ", "-").replace("'", "").replace(" ", "-").lower()


def _run(config: PretrainConfig, corpus: Corpus) -> dict[str, float]:
    retrieval, moments = evaluate(corpus, pretrain(config).model, config.output / "evaluation")
    return {**retrieval, **moments["brief"]}


def _vary(config: PretrainConfig, variant: str) -> PretrainConfig:
    if variant == "exact positives":
        return replace(config, clips=replace(config.clips, positives="exact"))
    if variant == "random batches":
        return replace(config, batches="random")
    if variant == "separate transformers":
        return replace(config, model=replace(config.model, transformer="separate"))
    if variant == "[CLS] pooling":
        return replace(config, model=replace(config.model, pooling="cls"))
    return config


def as_table(results: dict[str, Any]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = ["| | " + " | ".join(FIGURES) + " |", "|---|" + "---|" * len(FIGURES)]
    for variant, figures in results.items():
        cells = [f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" for values in figures.values()]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    seeds = len(next(iter(results.values()))["R@1"])
    return (
        "\n".join(lines)
        + f"\n\nPercent, mean and standard deviation over {seeds} seeds, each with a corpus of its own.\n"
    )
