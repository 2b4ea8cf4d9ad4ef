"""Embed every video of a folder of shards with a trained model and group them into batches of similar videos.

Pretraining does this by itself every epoch; the stage stands alone for looking at the groups, or for using them
elsewhere. It leaves `embeddings.npy` (float16 [N, H], memory-mappable), `video_ids.json` in the same order, and
`batches.json`, lists of video ids; `cluster.json` beside them says how similar the batches are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pipelines.ray_session import ray_session
from pipelines.runs import Quarantine, embed_parts, start_run, with_absolute_paths, writes_output
from videoclip.data.clips import ClipSampler
from videoclip.data.howto100m import read_topics
from videoclip.data.shards import Shards
from videoclip.data.words import CaptionWords
from videoclip.embedding import TwoTowers, clips_of, embed_videos
from videoclip.errors import InputError
from videoclip.evaluation.inputs import load_model_and_shards
from videoclip.files import atomic_path, write_arrays, write_json
from videoclip.retrieval.clustering import Mode, Skip, check_options
from videoclip.retrieval.epochs import BatchOptions, make_clustering
from videoclip.retrieval.figures import describe_in_words
from videoclip.retrieval.index import finite_rows


@dataclass(frozen=True)
class ClusterConfig:
    """Group videos into batches of similar ones."""

    model: Path
    """Folder of a trained model."""
    shards: Path
    """Folder that `videoclip extract` wrote."""
    output: Path = Path("runs/clusters")
    videos_per_batch: int = 32
    mode: Mode = "cover"
    """How videos are grouped: cover (clusters of similar ones, each in one batch), random, or paper (Algorithm 1)."""
    clusters_per_batch: int | None = None
    """Of `cover`: a batch is so many clusters from all over the corpus; by default clusters have four videos."""
    skip: Skip = field(default_factory=Skip)
    """Of `cover`: similar videos that are kept out of each other's clusters."""
    faiss_index: str = ""
    """Of `paper`: a Faiss index string such as IVF4096,Flat; by default chosen by size."""
    topics: Path | None = None
    """HowTo100M_v1.csv, or a JSON object {video_id: topic}: how pure the batches are is reported then."""
    clips_per_video: int = 16
    """Clips whose mean embedding stands for a video."""
    seed: int = 0
    address: str | None = None
    """Ray cluster to join; without it Ray runs on this machine."""


@writes_output
def cluster(config: ClusterConfig) -> list[list[str]]:
    """Run the stage; returns the batches as lists of video ids.

    Raises InputError if model and shards do not fit each other. Videos without captions are left out.
    """
    config = with_absolute_paths(config)
    check_options(
        config.videos_per_batch, config.mode, config.clusters_per_batch
    )  # now rather than after the embedding
    topics = None if config.topics is None else read_topics(config.topics)
    model, shards = load_model_and_shards(config.model, config.shards)
    all_ids = shards.video_ids()  # fails if two videos share one
    start_run(config.output, "cluster_run", config)
    quarantine = Quarantine(config.output)
    with ray_session(config.address):
        rows = _embed(config, model, shards, quarantine)
    video_ids = [all_ids[row] for row in rows]
    write_json(config.output / "video_ids.json", video_ids)
    embeddings = np.load(config.output / "embeddings.npy", mmap_mode="r")
    options = BatchOptions(
        config.videos_per_batch, config.mode, config.clusters_per_batch, config.skip, config.faiss_index
    )
    of_videos = None if topics is None else [topics.get(video_id) for video_id in video_ids]
    clustering = make_clustering(embeddings, options, config.seed, topics=of_videos)
    named = [[video_ids[row] for row in batch] for batch in clustering.batches]
    write_json(config.output / "batches.json", named)
    write_json(config.output / "cluster.json", clustering.figures)
    print(f"{describe_in_words(clustering.figures)}; {quarantine.summary()}")
    return named


def _embed(config: ClusterConfig, model: TwoTowers, shards: Shards, quarantine: Quarantine) -> np.ndarray:
    """Embed part by part, as Ray tasks, into `embeddings.npy`; parts that are there already are kept.

    Returns the videos' rows in the shards, int64 [N]. Videos whose embedding is not finite go to quarantine.
    """
    CaptionWords(shards, model.tokenizer(), config.output)  # once, for all tasks to find
    settings = f"{config.clips_per_video}-{config.seed}"
    paths = embed_parts(_embed_some, config, shards, "embedded", settings, "embedding")
    return _join(config, shards, paths, model.config.width, quarantine)


def _join(config: ClusterConfig, shards: Shards, paths: list[Path], width: int, quarantine: Quarantine) -> np.ndarray:
    """Put the parts into one memory-mappable array, one part in memory at a time."""
    kept, bad = [], []
    for path in paths:
        with np.load(path) as part:
            good = finite_rows(part["embeddings"])
            kept.append(part["rows"][good])
            bad.append(np.delete(part["rows"], good))
    video_ids = shards.video_ids()
    for row in np.concatenate(bad):
        quarantine.add(video_ids[row], "its embedding is not finite")
    quarantine.save()
    rows = np.concatenate(kept)
    if not len(rows):
        raise InputError(f"{config.shards}: no video has captions and a finite embedding; nothing to cluster")
    with atomic_path(config.output / "embeddings.npy") as temporary:
        joined = np.lib.format.open_memmap(temporary, "w+", np.float16, (len(rows), width))
        first = 0
        for path in paths:
            with np.load(path) as part:
                embeddings = part["embeddings"][finite_rows(part["embeddings"])]
            joined[first : first + len(embeddings)] = embeddings
            first += len(embeddings)
        joined.flush()
    return rows


def _embed_some(config: ClusterConfig, parts: list[tuple[int, Path]]) -> int:
    """Embed the videos of several parts, each into its file; the shards' other parts are not opened."""
    torch.set_num_threads(1)  # one task a CPU
    model, shards = load_model_and_shards(config.model, config.shards)
    clips = clips_of(model, config.clips_per_video)
    sampler = ClipSampler(shards, model.tokenizer(), clips, config.output)
    for number, path in parts:
        rows = sampler.usable_rows_of_part(number)
        embeddings = embed_videos(model, sampler, rows, config.seed, 0).astype(np.float16)
        write_arrays(path, rows=rows, embeddings=embeddings)
    return len(parts)
