"""Embed every video of a folder of shards with a trained model and group them into batches of similar videos.

Pretraining does this by itself every epoch; the stage stands alone for looking at the groups, or for using them
elsewhere. It leaves `embeddings.npy` (float16 [N, H], memory-mappable), `video_ids.json` in the same order, and
`batches.json`, lists of video ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.common import ray_session, run_tasks, start_run, with_absolute_paths
from pipelines.evaluate import load_model_and_shards
from videoclip.data.clips import ClipConfig
from videoclip.errors import InputError
from videoclip.files import sha256, write_array, write_arrays, write_json


@dataclass(frozen=True)
class ClusterConfig:
    """Group videos into batches of similar ones."""

    model: Path
    """Folder of a trained model."""
    shards: Path
    """Folder that `videoclip extract` wrote."""
    output: Path = Path("runs/clusters")
    videos_per_batch: int = 32
    mode: str = "cover"
    """cover (each video in one batch), random, or paper (Algorithm 1)."""
    clips_per_video: int = 16
    """Clips whose mean embedding stands for a video."""
    seed: int = 0
    address: str | None = None
    """Ray cluster to join; without it Ray runs on this machine."""


def cluster(config: ClusterConfig) -> list[list[str]]:
    """Run the stage; returns the batches as lists of video ids.

    Raises InputError if model and shards do not fit each other. Videos without captions are left out.
    """
    from videoclip.retrieval import batch_similarity, cluster_videos

    config = with_absolute_paths(config)
    model, shards = load_model_and_shards(config.model, config.shards)
    start_run(config.output, "cluster", config)
    with ray_session(config.address):
        video_ids = _embed(config, model, shards)
    embeddings = np.load(config.output / "embeddings.npy", mmap_mode="r")
    batches = cluster_videos(embeddings, config.videos_per_batch, config.seed, config.mode)
    named = [[video_ids[row] for row in batch] for batch in batches]
    write_json(config.output / "batches.json", named)
    random = cluster_videos(embeddings, config.videos_per_batch, config.seed, "random")
    print(
        f"{len(video_ids)} videos in {len(batches)} batches; mean cosine inside a batch "
        f"{batch_similarity(embeddings, batches):.3f}, in random batches {batch_similarity(embeddings, random):.3f}"
    )
    return named


def _embed(config: ClusterConfig, model: Any, shards: Any) -> list[str]:
    """Embed part by part, as Ray tasks; parts that are there already are kept. Returns ids in row order."""
    from videoclip.data.words import CaptionWords

    made_of = sha256(config.model / "model.safetensors")[:12]
    paths = [
        config.output / f"embedded-{made_of}-{part.sha256[:12]}-{config.clips_per_video}-{config.seed}.npz"
        for part in shards.manifest.parts
    ]
    missing = [(config, number, path) for number, path in enumerate(paths) if not path.exists()]
    if missing:
        CaptionWords(shards, model.tokenizer(), config.output)  # once, for all tasks to find
    run_tasks(_embed_part, missing, len(paths) - len(missing), len(paths), "part", "embedding")
    parts = [np.load(path) for path in paths]
    rows = np.concatenate([part["rows"] for part in parts])
    if not len(rows):
        raise InputError(f"{config.shards}: no video has captions; nothing to cluster")
    write_array(config.output / "embeddings.npy", np.concatenate([part["embeddings"] for part in parts]))
    all_ids = shards.video_ids()
    video_ids = [all_ids[row] for row in rows]
    write_json(config.output / "video_ids.json", video_ids)
    return video_ids


def _embed_part(config: ClusterConfig, number: int, path: Path) -> int:
    import torch

    from videoclip.data.clips import ClipSampler
    from videoclip.training import embed_videos

    torch.set_num_threads(1)  # one task a CPU
    model, shards = load_model_and_shards(config.model, config.shards)
    clips = ClipConfig(
        clips_per_video=config.clips_per_video,
        max_seconds=model.config.max_seconds,
        max_words=model.config.max_words,
        min_words=min(8, model.config.max_words),
        min_seconds=min(3, model.config.max_seconds),
    )
    sampler = ClipSampler(shards, model.tokenizer(), clips, config.output)
    usable = sampler.usable_rows()
    rows = usable[(usable >= shards.first_rows[number]) & (usable < shards.first_rows[number + 1])]
    embeddings = embed_videos(model, sampler, rows, config.seed, 0).astype(np.float16)
    write_arrays(path, rows=rows, embeddings=embeddings)
    return 1
