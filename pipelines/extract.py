"""Stage one: video files to shards of tokens and captions, by a pool of Ray actors that hold the frozen encoder."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray.data
import torch
from tqdm import tqdm

from pipelines.caption_source import CaptionSource
from pipelines.ray_session import cluster_processors, missing_resources, ray_session, refuse_missing
from pipelines.runs import (
    IDENTITY,
    Quarantine,
    configuration_before,
    refuse_other_run,
    start_run,
    with_absolute_paths,
    writes_output,
)
from videoclip.data.shards import MANIFEST, Manifest, Shards, ShardWriter, VideoRecord, check_encoder
from videoclip.data.video import clips_of_seconds, decode_seconds, find_videos, probe
from videoclip.encoders.catalog import load_video_encoder, make_video_encoder
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.encoders.x3d import X3D
from videoclip.errors import InputError
from videoclip.files import sha256

VIDEOS_AT_ONCE = 4096  # handed to Ray together; a dataset of a million one-video blocks would swamp its scheduler
ATTEMPTS = 3  # a video that takes its worker down this often in one run goes to quarantine
ATTEMPTS_FOLDER = ".attempts"  # a mark for each video that is being encoded; it outlives a worker that dies


@dataclass(frozen=True)
class ExtractConfig:
    """Turn a folder of videos into shards of tokens. Run it again to go on where it stopped."""

    streams_videos: ClassVar[bool] = True  # they may be in a store

    videos: Path
    """Folder of video files, searched recursively; a file's name without its suffix is its video id."""
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
    calibration_clips: int = 400
    """Clips that random weights are calibrated on, where there are no published ones."""
    keep_rolling_repeats: bool = False
    """Leave captions as they are, instead of removing what rolling captions repeat."""
    videos_per_part: int = 256
    """Videos in one Arrow file; this many at most are encoded again after a crash."""
    retry_crashed: bool = False
    """Try videos again that are in quarantine because the work on them crashed (memory, disk, a decoder's bug)."""
    workers: int = 0
    """Encoder processes, at most one a CPU; 0 for as many as that."""
    seed: int = 0
    language: str = ""
    """Two letters, where videos have subtitles in several languages."""
    address: str | None = None
    """Ray cluster to join, for instance "auto" or ray://head:10001; without it Ray runs on this machine."""


@writes_output
def extract(config: ExtractConfig) -> Shards:
    """Run the stage; returns the finished shards.

    Raises InputError if nothing can be done at all, or if the folder holds the work of other options. Videos that
    cannot be used, or over which a worker fails, go to `quarantine.jsonl`.
    """
    config = with_absolute_paths(config)
    quarantine = Quarantine(config.output)
    paths = _videos_by_id(config.videos, quarantine)
    captions = CaptionSource(
        config.captions, config.keep_rolling_repeats, config.seed, quarantine, paths, config.language
    )
    encoder = _prepare_encoder(config, list(paths.values()))
    manifest = Manifest(encoder.name, encoder.fingerprint(), encoder.dimension)
    identity = _identity(config)
    before = configuration_before(config.output, "extract")
    if config.encoder_from is None:  # where it is given, the fingerprint says all
        refuse_other_run(config.output, identity, _identity_before(config, before))
    done = _done(config.output, manifest, paths)
    captions.refuse_left_out(config.output, bool(before.get("captions")))
    start_run(config.output, "extract", config, None if (config.output / IDENTITY).exists() else identity)
    if not (config.output / MANIFEST).exists():
        encoder.save(config.output)
    captions.update_shards(config.output)
    captions.note_unused(paths)
    if config.retry_crashed:
        quarantine.forget(kind="crashed")
    quarantine.save()
    left_out = quarantine.video_ids() | done
    todo = [(video_id, path) for video_id, path in paths.items() if video_id not in left_out]
    if todo or not _is_complete(config.output):
        _encode_all(todo, len(paths), config, manifest, captions)
    if not Manifest.read(config.output).parts:
        raise InputError(f"{config.videos}: none of the {len(paths)} videos could be used; see {quarantine.path}")
    shards = Shards(config.output)
    hours = shards.seconds().sum() / 3600
    print(f"{len(shards)} videos, {hours:.2f} hours of tokens in {config.output}; {quarantine.summary()}")
    return shards


def _encode_all(
    todo: list[tuple[str, Path]], total: int, config: ExtractConfig, manifest: Manifest, captions: CaptionSource
) -> None:
    """Encode what is missing into the shards, under a progress bar."""
    quarantine = captions.quarantine
    with ray_session(config.address), tqdm(total=total, initial=total - len(todo), unit="video") as bar:
        refuse_missing(config.workers, missing_resources(config.workers))
        writer = ShardWriter(config.output, manifest, config.videos_per_part)
        bar.set_description(f"tokens by {manifest.encoder}")
        for row in _encode(todo, config):
            bar.update()
            if row["reason"]:
                quarantine.add(row["video_id"], row["reason"], kind=row["kind"])
            else:
                tokens = np.frombuffer(row["tokens"], np.float16).reshape(-1, manifest.dimension)
                of_video = captions.of_video(row["video_id"], len(tokens))
                try:
                    writer.add(VideoRecord(row["video_id"], row["duration"], tokens, of_video))
                except InputError as error:
                    quarantine.add(row["video_id"], str(error))
            quarantine.save()
    writer.close()


def _done(folder: Path, manifest: Manifest, paths: dict[str, Path]) -> set[str]:
    """Ids of the videos whose tokens are in the folder.

    Raises InputError if they are of another encoder, or of videos that are not among `paths`.
    """
    if not (folder / MANIFEST).exists():
        return set()
    stored = Manifest.read(folder)
    check_encoder(stored, manifest.fingerprint, manifest.encoder, folder)
    done = set(Shards(folder).video_ids()) if stored.parts else set()
    missing = [video_id for video_id in done if video_id not in paths]
    if missing:
        raise InputError(
            f"{folder}: holds the tokens of other videos, for instance {missing[0]!r}; choose another --output"
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


def _videos_by_id(folder: Path, quarantine: Quarantine) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path in find_videos(folder):
        if path.stem in paths:
            quarantine.add(
                path.stem, f"{path}: the id is taken by {paths[path.stem]}; the second file is left out", "file"
            )
        else:
            paths[path.stem] = path
    return paths


def _prepare_encoder(config: ExtractConfig, videos: list[Path]) -> VideoEncoder:
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


def _make_encoder(config: ExtractConfig, videos: list[Path]) -> VideoEncoder:
    encoder = make_video_encoder(config.encoder, config.weights, config.seed)
    if isinstance(encoder, X3D) and config.weights is None:
        print(
            f"No weights were given: {encoder.name} has random weights, its normalisation fitted to these videos. "
            "That is enough to try things out; for real use pass --weights."
        )
        encoder.calibrate(_calibration_clips(encoder, videos, config))
    return encoder


def _calibration_clips(encoder: VideoEncoder, videos: list[Path], config: ExtractConfig) -> np.ndarray:
    """Clips spread evenly over up to 40 of the videos: uint8 [N, T, H, W, 3]. Unreadable videos are passed over;
    extraction itself will name them."""
    generator = np.random.default_rng([config.seed, 5])
    chosen = [videos[i] for i in generator.permutation(len(videos))[:40]]
    wanted = -(-config.calibration_clips // len(chosen))
    clips: list[np.ndarray] = []
    for path in chosen:
        try:
            of_video = list(
                _first_minutes(clips_of_seconds(decode_seconds(path, encoder.frame_format), encoder.frame_offsets))
            )
        except InputError:
            continue
        clips += [of_video[i] for i in np.unique(np.linspace(0, len(of_video) - 1, wanted).astype(int))]
    if not clips:
        raise InputError(f"{config.videos}: none of {len(chosen)} videos could be decoded to calibrate the encoder")
    return np.stack(clips[: config.calibration_clips])


def _first_minutes(clips: Iterator[np.ndarray], limit: int = 120) -> Iterator[np.ndarray]:
    for count, clip in enumerate(clips):
        if count == limit:
            return
        yield clip


def _is_complete(folder: Path) -> bool:
    return (folder / MANIFEST).exists() and Manifest.read(folder).complete


def _encode(todo: list[tuple[str, Path]], config: ExtractConfig) -> Iterator[dict[str, Any]]:
    """Rows of `EncodeVideo`, in the order of `todo`, whichever worker finishes first: parts come out the same."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    shutil.rmtree(config.output / ATTEMPTS_FOLDER, ignore_errors=True)  # of runs that were interrupted
    (config.output / ATTEMPTS_FOLDER).mkdir()
    # Of this run alone: a worker that outlives the run that started it must not count here.
    attempts = tempfile.mkdtemp(dir=config.output / ATTEMPTS_FOLDER)
    for first in range(0, len(todo), VIDEOS_AT_ONCE):
        rows = [{"video_id": i, "path": str(p)} for i, p in todo[first : first + VIDEOS_AT_ONCE]]
        workers = min(config.workers or cluster_processors(), len(rows))
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            EncodeVideo,  # type: ignore[arg-type]  # a class of callables is what Ray Data wants for actors
            fn_constructor_args=(str(config.output), attempts),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
        )
        yield from dataset.iter_rows()
    shutil.rmtree(config.output / ATTEMPTS_FOLDER, ignore_errors=True)


class EncodeVideo:
    """A Ray actor: holds the encoder, turns one video a call into tokens or into the reason why not."""

    def __init__(self, encoder_folder: str, attempts: str) -> None:
        torch.set_num_threads(1)  # one actor a CPU; threads of several would fight
        self.encoder = load_video_encoder(Path(encoder_folder))
        if torch.cuda.is_available():
            self.encoder.to("cuda").half()
        self.attempts = Path(attempts)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        result = {"video_id": row["video_id"], "tokens": b"", "duration": 0.0, "reason": "", "kind": "input"}
        path = Path(row["path"])
        mark = self.attempts / hashlib.sha256(row["video_id"].encode()).hexdigest()
        if self._count_attempt(mark) > ATTEMPTS:
            mark.unlink()
            return {**result, "reason": f"{path}: took its worker down {ATTEMPTS} times", "kind": "crashed"}
        try:
            duration = probe(path).duration
            tokens = self.encoder.encode_video(path)
            result.update(tokens=tokens.tobytes(), duration=duration or float(len(tokens)))
        except InputError as error:
            result["reason"] = str(error)
        except Exception as error:  # memory, a disk, a decoder's bug: it costs this video, not the archive
            result.update(reason=f"{path}: {describe_crash(error)}", kind="crashed")
            self._recover()
        mark.unlink()
        return result

    def _count_attempt(self, mark: Path) -> int:
        """Note that this video was begun; the mark outlives a worker that dies over it."""
        with open(mark, "a") as file:
            file.write(".")
        return mark.stat().st_size

    def _recover(self) -> None:
        """Free the GPU's memory. Where the GPU no longer answers, nothing works in this process any more: it ends, Ray
        starts another, and the mark counts the death."""
        if torch.cuda.is_available():
            try:
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)


def describe_crash(error: Exception) -> str:
    """Kind and first line of an error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
