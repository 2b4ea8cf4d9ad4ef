"""The whole system on the embedded corpus, with the stages that a cluster would run and nothing else."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.ablation import ablate
from pipelines.experiment import EPOCHS, Corpus, evaluate, prepare_corpus, pretraining
from pipelines.index import IndexConfig, build_index
from pipelines.pretrain import PretrainResult, pretrain
from pipelines.ray_session import ray_session
from pipelines.report import MOMENT_ROWS, ReportConfig, report
from pipelines.runs import writes_output
from videoclip.data.shards import Manifest
from videoclip.errors import InputError
from videoclip.files import read_json, write_json, write_text
from videoclip.model import VideoCLIP
from videoclip.pretrained import ModelCard
from videoclip.report.page import Table


@dataclass(frozen=True)
class DemoConfig:
    """Generate a small cooking channel, learn from its narration, and find steps in videos never seen."""

    seed: int = 0
    """Of the corpus and of the training; another seed is another corpus."""
    output: Path = Path("runs/demo")
    weights: Path | None = None
    """Published X3D-S weights; without them the encoder is a small X3D with random weights."""
    epochs: int = EPOCHS
    ablate: bool = False
    """Compare the paper's choices instead: overlap, clustering, sharing and pooling, three seeds each. Half an hour."""
    address: str | None = None
    """Ray cluster to join; without it Ray runs on this machine."""


@writes_output
def demo(config: DemoConfig) -> dict[str, Any]:
    """Run corpus, extraction, pretraining, evaluation and report; returns what `report.json` holds."""
    if config.ablate:
        return ablate(config.output / "ablation", config.seed, config.weights, config.epochs, config.address)
    _refuse_other_seed(config)
    start = time.perf_counter()
    with ray_session(config.address):
        corpus = prepare_corpus(config.output, config.seed, config.weights)
        with corpus.stopwatch.measure("pretrain"):
            result = pretrain(pretraining(corpus, config.output / "pretrain", config.seed, config.epochs))
        corpus.stopwatch.seconds["pretrain"] -= result.cluster_seconds
        corpus.stopwatch.seconds["cluster"] = result.cluster_seconds
        with corpus.stopwatch.measure("evaluate"):
            retrieval, moments = evaluate(corpus, result.model, config.output / "evaluation")
        with corpus.stopwatch.measure("index"):
            _index(corpus, result.model, config.output / "index")
    publish_model(result, config.output / "model", corpus, config, retrieval)
    corpus.stopwatch.seconds["total"] = time.perf_counter() - start
    numbers = _numbers(config, corpus, retrieval, moments)
    write_json(config.output / "report.json", numbers)
    _write_page(config, corpus, numbers)
    _print_summary(numbers)
    model, index = config.output / "model", config.output / "index"
    print(f"See it: videoclip serve --model {model} --index {index}, then open the address that it prints")
    return numbers


def _index(corpus: Corpus, model: Path, output: Path) -> None:
    """Make the test videos searchable, by picture and by what is said in them."""
    said = str(corpus.folder / "test" / "raw_caption.json")
    videos = corpus.folder / "test" / "videos"
    build_index(IndexConfig(model, corpus.test_shards, videos, output, captions=said))


def _refuse_other_seed(config: DemoConfig) -> None:
    path = config.output / "demo.json"
    asked = {"seed": config.seed, "weights": str(config.weights or "")}
    if path.exists() and read_json(path) != asked:
        raise InputError(f"{config.output}: holds a demo of another seed or encoder; choose another --output")
    write_json(path, asked)


def publish_model(
    result: PretrainResult, target: Path, corpus: Corpus, config: DemoConfig, retrieval: dict[str, Any]
) -> None:
    """Let `runs/demo/model` name the finished model, and its card its scores."""
    manifest = Manifest.read(corpus.train_shards)
    card = ModelCard(
        f"the embedded kitchen corpus, seed {config.seed}",
        f"{manifest.encoder} ({manifest.fingerprint[:12]})",
        scores=tuple((f"held-out steps, {name}", retrieval[name]) for name in ("R@1", "R@5", "R@10", "chance_R@1")),
    )
    write_text(result.model / "README.md", card.render(VideoCLIP.from_pretrained(result.model).config.describe()))
    if not target.exists():
        target.symlink_to(Path("pretrain") / "model", target_is_directory=True)


def _numbers(config: DemoConfig, corpus: Corpus, retrieval: dict[str, Any], moments: dict[str, Any]) -> dict[str, Any]:
    seconds = corpus.stopwatch.seconds
    return {
        "corpus": {
            "seed": config.seed,
            "train_videos": sum(video.split == "train" for video in corpus.videos),
            "test_videos": sum(video.split == "test" for video in corpus.videos),
            "hours": round(sum(video.duration for video in corpus.videos) / 3600, 2),
        },
        "retrieval": {name: retrieval[name] for name in ("queries", "R@1", "R@5", "R@10", "MedR", "chance_R@1")},
        "moments": {**moments["brief"], "baseline": moments["baseline"]},
        "seconds": {
            name: round(seconds[name], 1)
            for name in ("corpus", "extract", "pretrain", "cluster", "evaluate", "index", "total")
        },
    }


def _print_summary(numbers: dict[str, Any]) -> None:
    retrieval, moments = numbers["retrieval"], numbers["moments"]
    chance = retrieval["chance_R@1"]
    print(
        f"\nFinding {retrieval['queries']} held-out steps by description:\n"
        f"  R@1  {retrieval['R@1']:6.2f}   (chance {chance:.2f})\n"
        f"  R@5  {retrieval['R@5']:6.2f}   (chance {5 * chance:.2f})\n"
        f"  R@10 {retrieval['R@10']:6.2f}   (chance {10 * chance:.2f})\n"
        f"  median rank {retrieval['MedR']:g} of {retrieval['queries']}\n"
        "Finding moments in held-out videos (beside the best answer that never looks at the query):"
    )
    for name in MOMENT_ROWS:
        print(f"  {name:22s}{moments[name]:6.2f}   (query-blind {moments['baseline'][name]:.2f})")
    print(f"{numbers['seconds']['total']:.0f} seconds in all")


def _write_page(config: DemoConfig, corpus: Corpus, numbers: dict[str, Any]) -> None:
    encoder = "published X3D-S weights" if config.weights else "a small X3D with random weights"
    summary = (
        f"Seed {config.seed}: {numbers['corpus']['train_videos']} training and {numbers['corpus']['test_videos']} test "
        f"videos, {numbers['corpus']['hours']} hours, seen through {encoder}. No label was used in training, and no "
        "test video."
    )
    page = ReportConfig(
        config.output / "report.html",
        "VideoCLIP demo",
        retrieval=config.output / "evaluation" / "youcook2",
        moments=config.output / "evaluation" / "qvhighlights",
        annotations=corpus.folder / "qvhighlights_val.jsonl",
        training=config.output / "pretrain",
        videos=corpus.folder / "test" / "videos",
    )
    report(page, summary, (Table("Seconds", list(numbers["seconds"]), [list(numbers["seconds"].values())]),))
