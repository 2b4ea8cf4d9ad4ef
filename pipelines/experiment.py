"""Experiments on the cooking channel: its corpus as shards, a small pretraining on it, and what it is worth."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.evaluate_moments import MomentConfig, evaluate_moments
from pipelines.evaluate_retrieval import RetrievalConfig, evaluate_retrieval
from pipelines.extract import ExtractConfig, extract
from pipelines.pretrain import PretrainConfig
from pipelines.ray_session import run_tasks
from pipelines.runs import Stopwatch
from videoclip.data.clips import ClipConfig
from videoclip.recipes.videoclip import Options
from videoclip.synthetic.kitchen import KitchenConfig, KitchenVideo, plan_kitchen, render_video, write_annotations
from videoclip.training import OptimizerConfig

EPOCHS = 40


@dataclass(frozen=True)
class Corpus:
    """Where the embedded corpus and its tokens are, and how long they took, in seconds."""

    folder: Path
    videos: list[KitchenVideo]
    train_shards: Path
    test_shards: Path
    stopwatch: Stopwatch = field(default_factory=Stopwatch)


def prepare_corpus(folder: Path, seed: int, weights: Path | None = None) -> Corpus:
    """Render the corpus of a seed and extract its tokens, unless they are there."""
    corpus_folder = folder / "corpus"
    kitchen = KitchenConfig(seed=seed)
    corpus = Corpus(corpus_folder, plan_kitchen(kitchen), folder / "tokens" / "train", folder / "tokens" / "test")
    with corpus.stopwatch.measure("corpus"):
        _render(corpus)
        write_annotations(corpus.videos, kitchen, corpus_folder)
    with corpus.stopwatch.measure("extract"):
        encoder = "x3d-s" if weights else "x3d-tiny"
        train = ExtractConfig(
            corpus_folder / "train" / "videos",
            corpus.train_shards,
            str(corpus_folder / "train" / "raw_caption.json"),
            encoder,
            weights,
            seed=seed,
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


def pretraining(corpus: Corpus, output: Path, seed: int, epochs: int = EPOCHS) -> PretrainConfig:
    """The demo's pretraining: a transformer that two cores can train in a few minutes, on clips of short videos."""
    return PretrainConfig(
        shards=corpus.train_shards,
        output=output,
        epochs=epochs,
        videos_per_batch=16,
        vocabulary=1000,
        model=Options(width=128, layers=2, video_layers=2, heads=4, dropout=0.3),
        clips=ClipConfig(clips_per_video=8, min_words=4, max_words=32, min_seconds=3, max_seconds=20),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50),
        topics=corpus.folder / "train" / "HowTo100M_v1.csv",
        seed=seed,
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
