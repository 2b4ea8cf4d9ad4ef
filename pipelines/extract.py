"""Stage one: video files to shards of tokens and captions, by a pool of Ray actors that hold the frozen encoder."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray
from tqdm import tqdm

from pipelines.caption_source import CaptionSource
from pipelines.extraction import Extraction
from pipelines.extraction_plan import add_plan, part_number, read_plans, videos_in_part
from pipelines.extraction_pool import Pool, actors_that_fit, cpus_beside_a_gpu
from pipelines.extraction_worker import ExtractionWorker, WorkerOptions, actor_options, clips_of
from pipelines.ray_session import missing_resources, ray_session, refuse_missing
from pipelines.runs import (
    IDENTITY,
    Quarantine,
    configuration_before,
    refuse_other_run,
    start_run,
    with_absolute_paths,
    writes_output,
)
from videoclip.data.shards import MANIFEST, Manifest, Shards, check_encoder
from videoclip.data.stored_list import VideoList, digests_of, refuse_empty
from videoclip.data.video_lists import read_videos
from videoclip.encoders.catalog import load_video_encoder, make_video_encoder
from videoclip.encoders.decoders import NAMES as DECODERS
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.encoders.x3d import X3D
from videoclip.errors import InputError
from videoclip.files import sha256

CALIBRATION_SECONDS = 120  # of a video, from its start
Parts = list[tuple[int, list[int]]]  # numbers of parts, and the rows of the list that are still missing in each


@dataclass(frozen=True)
class ExtractConfig:
    """Turn a folder or a list of videos into shards of tokens. Run it again to go on where it stopped."""

    streams_videos: ClassVar[bool] = True  # they may be in a store

    videos: Path
    """Folder of video files, searched recursively; a file's name without its suffix is its video id. Or a list: csv,
    tsv, parquet or jsonl of video_id, path[, start, end][, caption], HowTo100M's or WebVid's csv, Conceptual Captions'
    tsv, a tar or a folder of tars with pictures."""
    output: Path = Path("runs/tokens")
    """Folder for the shards."""
    captions: str | None = None
    """beside (subtitles named like the videos, next to or inside them), a folder of subtitles (srt, vtt, ass, ttml,
    json of Whisper or YouTube, csv), or one file such as HowTo100M's raw_caption.json; needed for training only.
    They can be given or changed later: the same command with other captions makes these anew and encodes nothing
    again."""
    encoder: str = "x3d-s"
    """Frozen video encoder: x3d-tiny, x3d-xs, x3d-s, x3d-m, x3d-l, s3d (which needs --weights), or the hub id or
    folder of a Hugging Face vision model such as openai/clip-vit-base-patch32."""
    weights: Path | None = None
    """Published weights of the encoder (for X3D the file {"model_state": ...})."""
    encoder_from: Path | None = None
    """Use the encoder saved in this folder (of shards or of a model) instead; later videos need the same one."""
    videos_in: Path | None = None
    """Where the paths of a list start from; without it, its own folder."""
    calibration_clips: int = 400
    """Clips that random weights are calibrated on, where there are no published ones."""
    keep_rolling_repeats: bool = False
    """Leave captions as they are, instead of removing what rolling captions repeat."""
    videos_per_part: int = 256
    """Videos in one Arrow file at most (of pictures 32 count as one); this many are encoded again after a crash."""
    retry_crashed: bool = False
    """Try videos again that are in quarantine because the work on them crashed (memory, disk, a decoder's bug)."""
    workers: int = 0
    """Encoder processes, at most one a CPU or a GPU's share; 0 for as many as that, also where machines join later."""
    gpus_per_worker: float | None = None
    """GPUs of one encoder process: 1, a share such as 0.5, or 0 for CPUs alone. Without it 1 where Ray has GPUs."""
    decode_threads: int = 0
    """Threads that decode for one GPU, a CPU each; 0 for the CPUs that a machine has for each of its GPUs."""
    gpu_batch: int = 16
    """Clips that go through the network together on a GPU."""
    decoder: str = "auto"
    """pyav, torchcodec (NVIDIA's decoder), or auto: torchcodec where there is a GPU and it loads."""
    compile: bool = False
    """Compile the network on a GPU: a minute at the start of every worker, for long runs."""
    seed: int = 0
    language: str = ""
    """Two letters, where videos have subtitles in several languages."""
    address: str | None = None
    """Ray cluster to join, for instance "auto" or ray://head:10001; without it Ray runs on this machine."""

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise InputError(f"unknown decoder {self.decoder!r}; choose {', '.join(DECODERS)}")
        if self.videos_per_part < 1 or self.gpu_batch < 1 or self.workers < 0 or (self.gpus_per_worker or 0) < 0:
            raise InputError("sizes of parts and batches are at least 1, workers and GPUs at least 0")


@writes_output
def extract(config: ExtractConfig) -> Shards:
    """Run the stage; returns the finished shards.

    Raises InputError if nothing can be done at all, or if the folder holds the work of other options. Videos that
    cannot be used, or over which a worker fails, go to `quarantine.jsonl`.
    """
    config = with_absolute_paths(config)
    quarantine = Quarantine(config.output)
    with tempfile.TemporaryDirectory() as scratch:
        rows = read_videos(config.videos, config.videos_in)
        videos = VideoList.write(Path(scratch), rows, quarantine.add)
        refuse_empty(videos, config.videos)
        return _extract(config, videos, quarantine)


def _extract(config: ExtractConfig, videos: VideoList, quarantine: Quarantine) -> Shards:
    """`extract` of a list that was read."""
    captions = CaptionSource(
        config.captions, config.keep_rolling_repeats, config.seed, quarantine, videos, config.language, videos
    )
    encoder = _prepare_encoder(config, videos)
    manifest = Manifest(encoder.name, encoder.fingerprint(), encoder.dimension)
    identity = _identity(config)
    before = configuration_before(config.output, "extract")
    if config.encoder_from is None:  # where it is given, the fingerprint says all
        refuse_other_run(config.output, identity, _identity_before(config, before))
    done = _done(config.output, manifest, videos)
    captions.refuse_left_out(config.output, bool(before.get("captions")))
    start_run(config.output, "extract", config, None if (config.output / IDENTITY).exists() else identity)
    if not (config.output / MANIFEST).exists():
        encoder.save(config.output)
        manifest.write(config.output)
    captions.update_shards(config.output)
    if config.retry_crashed:
        quarantine.forget(kind="crashed")
    quarantine.save()
    manifest = Manifest.read(config.output)
    missing = _missing(config, manifest, videos, np.concatenate([done, digests_of(quarantine.video_ids())]))
    if missing:
        _encode(missing, config, videos, captions)
    captions.note_unused(videos)
    quarantine.save()
    _complete(config.output)
    if not Manifest.read(config.output).parts:
        raise InputError(f"{config.videos}: none of the {len(videos)} videos could be used; see {quarantine.path}")
    shards = Shards(config.output)
    hours = shards.seconds().sum() / 3600
    print(f"{len(shards)} videos, {hours:.2f} hours of tokens in {config.output}; {quarantine.summary()}")
    return shards


def _complete(folder: Path) -> None:
    manifest = Manifest.read(folder)
    if not manifest.complete:
        manifest.complete = True
        manifest.write(folder)


def _missing(config: ExtractConfig, manifest: Manifest, videos: VideoList, left_out: np.ndarray) -> Parts:
    """The parts that are not finished, each with the rows that are to be encoded for it.

    A video is part of the plan of the run that first found it (`extraction_plan.py`). `left_out` (uint64) are the ids
    that are done or in quarantine.
    """
    registered = {part_number(part.name) for part in manifest.parts}
    size = videos_in_part(config.videos_per_part, manifest.dimension)
    parts: Parts = []
    for plan in add_plan(config.output, videos, read_plans(config.output), registered, left_out, size):
        for number in plan.parts:
            if number not in registered:
                digests = plan.of_part(number)
                rows = videos.rows_of_digests(digests[~np.isin(digests, left_out)])
                parts.append((number, rows[rows >= 0].tolist()))
    return [(number, rows) for number, rows in parts if rows]


def _encode(parts: Parts, config: ExtractConfig, videos: VideoList, captions: CaptionSource) -> None:
    """Encode what is missing into the shards, by a pool of workers, under a progress bar."""
    count = sum(len(rows) for _, rows in parts)
    manifest = Manifest.read(config.output)
    with ray_session(config.address), tqdm(total=len(videos), initial=len(videos) - count, unit="video") as bar:
        bar.set_description(f"tokens by {manifest.encoder}")
        gpus, cpus = _shares(config)
        _refuse_too_many(config.workers, cpus, gpus)
        run = Extraction(config.output, manifest, videos, parts, captions, bar)
        threads = cpus if gpus else 1
        options = WorkerOptions(
            config.output, config.decoder, config.compile, threads, config.gpu_batch, expects_gpu=gpus > 0
        )
        actor: Any = ray.remote(**actor_options(cpus, gpus, threads))(ExtractionWorker)

        def wanted() -> int:
            return min(config.workers or actors_that_fit(cpus, gpus), run.waits_for())

        pool = Pool(lambda: actor.remote(options), wanted, threads)
        try:
            run.run(pool)
        finally:
            pool.close()
    if gpus and "cpu" in pool.devices_seen:
        print("Ray lends GPUs, but the workers' PyTorch sees none: the encoder ran on CPUs", file=sys.stderr)


def _shares(config: ExtractConfig) -> tuple[float, int]:
    """GPUs and CPUs of one worker."""
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    gpus = float(has_gpus) if config.gpus_per_worker is None else config.gpus_per_worker
    return gpus, (config.decode_threads or cpus_beside_a_gpu(gpus)) if gpus else 1


def _refuse_too_many(workers: int, cpus: int, gpus: float) -> None:
    """Raises InputError if so many workers never find a place."""
    refuse_missing(workers, missing_resources(workers, ("CPU",)))
    fit = actors_that_fit(cpus, gpus)
    if gpus and fit < max(1, workers):
        has = ray.cluster_resources()
        raise InputError(
            f"--workers {workers}: {max(1, workers)} of {gpus:g} GPUs and {cpus} CPUs are needed, and Ray has room for "
            f"{fit} ({has.get('GPU', 0):g} GPUs, {has.get('CPU', 0):g} CPUs); ask for fewer, or join a larger cluster"
        )


def _done(folder: Path, manifest: Manifest, videos: VideoList) -> np.ndarray:
    """uint64: digests of the ids of the videos whose tokens are in the folder.

    Raises InputError if they are of another encoder, or of videos that are not in the list.
    """
    if not (folder / MANIFEST).exists():
        return np.zeros(0, np.uint64)
    stored = Manifest.read(folder)
    check_encoder(stored, manifest.fingerprint, manifest.encoder, folder)
    ids = Shards(folder).video_ids() if stored.parts else []
    done = digests_of(ids)
    if (missing := np.flatnonzero(videos.rows_of_digests(done) < 0)).size:
        raise InputError(
            f"{folder}: holds the tokens of other videos, for instance {ids[missing[0]]!r}; choose another --output"
        )
    return done


def _identity(config: ExtractConfig) -> dict[str, Any]:
    """What decides the encoder's weights. Captions are not among it: they are made again where they change."""
    if config.encoder_from is not None:
        return {"encoder_from": "another folder"}
    calibrated = config.weights is None and config.encoder.startswith("x3d-")
    return {
        "encoder": config.encoder,
        "weights": "" if config.weights is None or not config.weights.is_file() else sha256(config.weights),
        "seed": config.seed if calibrated else None,
        "calibration_clips": config.calibration_clips if calibrated else None,
    }


def _identity_before(config: ExtractConfig, before: dict[str, Any]) -> dict[str, Any] | None:
    """The identity of a run that wrote `extract.json` alone, as runs did before there was `run.json`."""
    if not before:
        return None
    values: dict[str, Any] = {name: before[name] for name in ("encoder", "seed", "calibration_clips")}
    values |= {name: Path(before[name]) if before[name] else None for name in ("weights", "encoder_from")}
    return _identity(replace(config, **values))


def _prepare_encoder(config: ExtractConfig, videos: VideoList) -> VideoEncoder:
    """The frozen encoder: the one in the output, or on the first run a new one, calibrated but not saved yet."""
    if config.encoder_from is not None:
        encoder = load_video_encoder(config.encoder_from)
    elif (config.output / "video_encoder.json").exists():
        encoder = load_video_encoder(config.output)
        if encoder.name != config.encoder.rstrip("/").split("/")[-1]:
            raise InputError(
                f"{config.output}: holds tokens of {encoder.name}, not {config.encoder}; choose another --output"
            )
        return encoder
    else:
        encoder = _make_encoder(config, videos)
    return encoder


def _make_encoder(config: ExtractConfig, videos: VideoList) -> VideoEncoder:
    encoder = make_video_encoder(config.encoder, config.weights, config.seed)
    if isinstance(encoder, X3D) and config.weights is None:
        print(
            f"No weights were given: {encoder.name} has random weights, its normalisation fitted to these videos. "
            "That is enough to try things out; for real use pass --weights."
        )
        encoder.calibrate(_calibration_clips(encoder, videos, config))
    return encoder


def _calibration_clips(encoder: VideoEncoder, videos: VideoList, config: ExtractConfig) -> np.ndarray:
    """Clips spread evenly over up to 40 of the videos: uint8 [N, T, H, W, 3]. Unreadable videos are passed over;
    extraction itself will name them."""
    generator = np.random.default_rng([config.seed, 5])
    chosen = videos.rows(videos.good_rows[generator.permutation(len(videos))[:40]].tolist())
    wanted = -(-config.calibration_clips // len(chosen))
    clips: list[np.ndarray] = []
    for video in chosen:
        try:
            found = list(islice(clips_of(video, encoder), CALIBRATION_SECONDS))
        except InputError:
            continue
        clips += [found[i] for i in np.unique(np.linspace(0, len(found) - 1, wanted).astype(int))]
    if not clips:
        raise InputError(f"{config.videos}: none of {len(chosen)} videos could be decoded to calibrate the encoder")
    return np.stack(clips[: config.calibration_clips])
