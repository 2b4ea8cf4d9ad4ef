"""The whole system on the embedded corpus, with the stages that a cluster would run and nothing else."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.evaluate_moments import MomentConfig, evaluate_moments
from pipelines.evaluate_retrieval import RetrievalConfig, evaluate_retrieval
from pipelines.extract import ExtractConfig, extract
from pipelines.pretrain import ModelSize, PretrainConfig, PretrainResult, pretrain
from pipelines.ray_session import ray_session, run_tasks
from pipelines.report import MOMENT_ROWS, ReportConfig, report
from pipelines.runs import Stopwatch
from videoclip.data.clips import ClipConfig
from videoclip.errors import InputError
from videoclip.files import read_json, write_json, write_text
from videoclip.report.page import Table
from videoclip.synthetic.kitchen import KitchenConfig, KitchenVideo, plan_kitchen, render_video, write_annotations
from videoclip.training import OptimizerConfig


@dataclass(frozen=True)
class DemoConfig:
    """Generate a small cooking channel, learn from its narration, and find steps in videos never seen."""

    seed: int = 0
    """Of the corpus and of the training; another seed is another corpus."""
    output: Path = Path("runs/demo")
    weights: Path | None = None
    """Published X3D-S weights; without them the encoder is a small X3D with random weights."""
    epochs: int = 40
    ablate: bool = False
    """Compare the paper's choices instead: overlap, clustering, sharing and pooling, three seeds each. Half an hour."""
    address: str | None = None
    """Ray cluster to join; without it Ray runs on this machine."""


@dataclass(frozen=True)
class Corpus:
    """Where the embedded corpus and its tokens are, and how long they took, in seconds."""

    folder: Path
    videos: list[KitchenVideo]
    train_shards: Path
    test_shards: Path
    stopwatch: Stopwatch = field(default_factory=Stopwatch)


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run corpus, extraction, pretraining, evaluation and report; returns what `report.json` holds."""
    if config.ablate:
        from pipelines.ablation import ablate

        return ablate(config)
    _refuse_other_seed(config)
    start = time.perf_counter()
    with ray_session(config.address):
        corpus = prepare_corpus(config, config.output)
        with corpus.stopwatch.measure("pretrain"):
            result = pretrain(pretraining(config, corpus, config.output / "pretrain"))
        corpus.stopwatch.seconds["pretrain"] -= result.cluster_seconds
        corpus.stopwatch.seconds["cluster"] = result.cluster_seconds
        with corpus.stopwatch.measure("evaluate"):
            retrieval, moments = evaluate(corpus, result.model, config.output / "evaluation")
    publish_model(result, config.output / "model", corpus, config, retrieval)
    corpus.stopwatch.seconds["total"] = time.perf_counter() - start
    numbers = _numbers(config, corpus, retrieval, moments)
    write_json(config.output / "report.json", numbers)
    _write_page(config, corpus, numbers)
    _print_summary(numbers)
    return numbers


def _refuse_other_seed(config: DemoConfig) -> None:
    path = config.output / "demo.json"
    asked = {"seed": config.seed, "weights": str(config.weights or "")}
    if path.exists() and read_json(path) != asked:
        raise InputError(f"{config.output}: holds a demo of another seed or encoder; choose another --output")
    write_json(path, asked)


def prepare_corpus(config: DemoConfig, folder: Path) -> Corpus:
    """Render the corpus and extract its tokens, unless they are there."""
    corpus_folder = folder / "corpus"
    kitchen = KitchenConfig(seed=config.seed)
    corpus = Corpus(corpus_folder, plan_kitchen(kitchen), folder / "tokens" / "train", folder / "tokens" / "test")
    with corpus.stopwatch.measure("corpus"):
        _render(corpus)
        write_annotations(corpus.videos, kitchen, corpus_folder)
    with corpus.stopwatch.measure("extract"):
        encoder = "x3d-s" if config.weights else "x3d-tiny"
        train = ExtractConfig(
            corpus_folder / "train" / "videos",
            corpus.train_shards,
            corpus_folder / "train" / "raw_caption.json",
            encoder,
            config.weights,
            seed=config.seed,
        )
        extract(train)
        extract(ExtractConfig(corpus_folder / "test" / "videos", corpus.test_shards, encoder_from=corpus.train_shards))
    return corpus


def _render(corpus: Corpus) -> None:
    def folder_of(video: KitchenVideo) -> Path:
        return (corpus.folder / video.split / "videos").resolve()

    missing = [v for v in corpus.videos if not (folder_of(v) / f"{v.video_id}.mp4").exists()]
    work = [(video, folder_of(video)) for video in missing]
    chunks = [(work[i : i + 8],) for i in range(0, len(work), 8)]
    total = len(corpus.videos)
    run_tasks(_render_some, chunks, total - len(missing), total, "video", "corpus")


def _render_some(videos: list[tuple[KitchenVideo, Path]]) -> int:
    for video, folder in videos:
        render_video(video, folder)
    return len(videos)


def pretraining(config: DemoConfig, corpus: Corpus, output: Path) -> PretrainConfig:
    """The demo's pretraining: a transformer that two cores can train in a few minutes, on clips of short videos."""
    return PretrainConfig(
        shards=corpus.train_shards,
        output=output,
        epochs=config.epochs,
        videos_per_batch=16,
        vocabulary=1000,
        model=ModelSize(width=128, layers=2, heads=4, dropout=0.3),
        clips=ClipConfig(clips_per_video=8, min_words=4, max_words=32, min_seconds=3, max_seconds=20),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50),
        topics=corpus.folder / "train" / "HowTo100M_v1.csv",
        seed=config.seed,
    )


def evaluate(corpus: Corpus, model: Path, output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Retrieval over the held-out clips and localisation of the held-out queries."""
    retrieval = evaluate_retrieval(
        RetrievalConfig(
            model,
            corpus.test_shards,
            corpus.folder / "youcookii_annotations_trainval.json",
            output / "youcook2" / "metrics.json",
        )
    )
    moments = evaluate_moments(
        MomentConfig(
            corpus.folder / "qvhighlights_val.jsonl",
            model,
            corpus.test_shards,
            train_annotations=corpus.folder / "qvhighlights_train.jsonl",
            output=output / "qvhighlights" / "metrics.json",
        )
    )
    return retrieval, moments


def publish_model(
    result: PretrainResult, target: Path, corpus: Corpus, config: DemoConfig, retrieval: dict[str, Any]
) -> None:
    """Let `runs/demo/model` name the finished model, and its card its scores."""
    from videoclip.data.shards import Manifest
    from videoclip.model import ModelCard, VideoCLIP

    manifest = Manifest.read(corpus.train_shards)
    card = ModelCard(
        f"the embedded kitchen corpus, seed {config.seed}",
        f"{manifest.encoder} ({manifest.fingerprint[:12]})",
        scores=tuple((f"held-out steps, {name}", retrieval[name]) for name in ("R@1", "R@5", "R@10", "chance_R@1")),
    )
    write_text(result.model / "README.md", card.render(VideoCLIP.from_pretrained(result.model).config))
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
            name: round(seconds[name], 1) for name in ("corpus", "extract", "pretrain", "cluster", "evaluate", "total")
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
