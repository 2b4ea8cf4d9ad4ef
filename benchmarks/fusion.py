"""What fusion is worth over VideoCLIP on the demo's tokens: matching, masked words, re-ranking.

Needs a finished demo (`make demo`) for its tokens. Five models a seed, all with the same towers and the same clips:
VideoCLIP, then with masked words, with matching, with both, at equal steps; and VideoCLIP once more for as many
seconds as the dearest of them took. Seconds are those of the processor, on one thread, so that other programs do not
count. Prints the table of docs/systems.md: retrieval of the held-out clips by contrast, and with the best 10 and 128
put in order by matching.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from videoclip.checkpoints import TrainingState
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.shards import Shards
from videoclip.data.words import train_wordpiece
from videoclip.data.youcook2 import read_youcook2
from videoclip.embedding import embed_videos
from videoclip.evaluation.retrieval import retrieve_clips
from videoclip.files import read_json, write_json
from videoclip.recipes import fusion
from videoclip.retrieval import BatchOptions, make_clustering
from videoclip.retrieval.false_negatives import FalseNegativeConfig
from videoclip.training import EpochBatches, OptimizerConfig, make_optimizer, spread_batches, train_epoch

CLIPS = ClipConfig(clips_per_video=8, min_words=4, max_words=32, min_seconds=3, max_seconds=20)
SCHEDULE = OptimizerConfig(learning_rate=1e-3, warmup_steps=50)
RULES = FalseNegativeConfig()
ARMS = {
    "VideoCLIP": ("vtc",),
    "+ masked words": ("vtc", "mlm"),
    "+ matching": ("vtc", "vtm"),
    "+ both": ("vtc", "vtm", "mlm"),
}
AS_LONG = "VideoCLIP, as many seconds"
BEST = (10, 128)
VIDEOS_PER_BATCH = 8  # 64 pairs
RECLUSTER_EVERY = 3  # epochs
WANTED = BatchOptions(VIDEOS_PER_BATCH, duplicate_similarity=RULES.duplicate_similarity)


def train(
    sampler: ClipSampler, options: fusion.Options, tokenizer: object, epochs: int, seed: int
) -> tuple[fusion.Recipe, dict[str, float]]:
    """A trained model; seconds of the processor, steps, and the figures of its last step."""
    torch.manual_seed(seed)
    model = fusion.build(options, sampler.shards.manifest, tokenizer)  # type: ignore[arg-type]
    optimizer, state, rows = make_optimizer(model, SCHEDULE), TrainingState(), sampler.usable_rows()
    start, figures = time.process_time(), {}
    while state.epoch < epochs:
        torch.manual_seed(1000 * seed + state.epoch)
        if state.epoch % RECLUSTER_EVERY == 0:
            embeddings = embed_videos(model, sampler, rows, seed, state.epoch)
            clustering = make_clustering(embeddings, WANTED, state.epoch, rows)
            steps = spread_batches(clustering.batches, 1)
        drawn = EpochBatches(sampler, steps, seed, state.epoch, 0, RULES, clustering.duplicates)
        figures = [noted for _, noted in train_epoch(model, optimizer, drawn, state, epochs * len(steps), SCHEDULE)][-1]
    return model.eval(), {**figures, "cpu_seconds": time.process_time() - start, "steps": state.step}


def measure(model: fusion.Recipe, demo: Path) -> dict[str, float]:
    """R@1 and R@10 by contrast and, where the model matches, re-ranked."""
    shards, clips = (
        Shards(demo / "tokens" / "test"),
        read_youcook2(demo / "corpus" / "youcookii_annotations_trainval.json"),
    )
    plain = retrieve_clips(model, shards, clips)[0]
    found = {"queries": plain["queries"], "chance": plain["chance_R@1"], "R@1": plain["R@1"], "R@10": plain["R@10"]}
    for best in BEST if "vtm" in model.config.losses else ():
        again = retrieve_clips(model, shards, clips, best=best)[0]
        found |= {f"R@1 of {best}": again["R@1"], f"R@10 of {best}": again["R@10"]}
    return found


def run(arm: str, epochs: int, seed: int, options: argparse.Namespace, sampler: ClipSampler, tokenizer: object) -> dict:
    """The figures of one model, read from disk where it was trained before."""
    path = options.output / f"{arm.replace(' ', '-')}-{seed}.json"
    if path.exists():
        return read_json(path)
    size = {"width": options.width, "layers": 2, "heads": 4, "dropout": 0.3, "fusion_layers": 1}
    limits = {"max_seconds": CLIPS.max_seconds, "max_words": CLIPS.max_words}
    chosen = fusion.Options(**size, **limits, losses=ARMS.get(arm, ("vtc",)))
    model, figures = train(sampler, chosen, tokenizer, epochs, seed)
    figures |= measure(model, options.demo)
    write_json(path, figures)
    print(arm, seed, {name: round(value, 2) for name, value in figures.items()}, flush=True)
    return figures


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row an arm, means over seeds, ± deviation where there are several."""
    columns = ["steps", "cpu_seconds", "R@1", "R@10", *(f"R@{k} of {best}" for best in BEST for k in (1, 10))]
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for arm, seeds in results.items():
        cells = []
        for name in columns:
            values = [figures[name] for figures in seeds if name in figures]
            digits = 0 if name in ("steps", "cpu_seconds") else 1
            spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 and digits else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}" if values else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--output", type=Path, default=Path("runs/fusion"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    if not (options.demo / "tokens").exists():
        print("needs a finished demo (`make demo`). Skipped.")
        sys.exit(0)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    shards = Shards(options.demo / "tokens" / "train")
    tokenizer = train_wordpiece((text for video in shards for text in video.captions.text), vocabulary=1000)
    sampler = ClipSampler(shards, tokenizer, CLIPS, options.output)
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in (*ARMS, AS_LONG)}
    for seed in range(options.seed, options.seed + options.seeds):
        for arm in ARMS:
            results[arm].append(run(arm, options.epochs, seed, options, sampler, tokenizer))
        ratio = results["+ both"][-1]["cpu_seconds"] / results["VideoCLIP"][-1]["cpu_seconds"]
        results[AS_LONG].append(run(AS_LONG, round(options.epochs * ratio), seed, options, sampler, tokenizer))
        print(f"\n{table(results)}\n", flush=True)


if __name__ == "__main__":
    main()
