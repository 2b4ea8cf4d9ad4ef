"""Stage one: video files to shards of tokens and captions, by a pool of Ray actors that hold the frozen encoder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.ray_session import cluster_processors, ray_session
from pipelines.runs import Quarantine, start_run, with_absolute_paths
from videoclip.data.captions import NO_CAPTIONS, Captions, captions_of_video
from videoclip.data.howto100m import read_raw_captions
from videoclip.data.shards import MANIFEST, Manifest, Shards, ShardWriter, VideoRecord, check_encoder
from videoclip.data.video import find_videos
from videoclip.errors import InputError

VIDEOS_AT_ONCE = 4096  # handed to Ray together; a dataset of a million one-video blocks would swamp its scheduler
ATTEMPTS = 3  # a video that takes its worker down this often goes to quarantine


@dataclass(frozen=True)
class ExtractConfig:
    """Turn a folder of videos into shards of tokens. Run it again to go on where it stopped."""

    videos: Path
    """Folder of video files, searched recursively; a file's name without its suffix is its video id."""
    output: Path = Path("runs/tokens")
    """Folder for the shards."""
    captions: Path | None = None
    """HowTo100M raw_caption.json, or a folder of <video_id>.csv; needed for training only."""
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
    videos_per_part: int = 64
    """Videos in one Arrow file; this many at most are encoded again after a crash."""
    workers: int = 0
    """Encoder processes; 0 for one a CPU."""
    seed: int = 0
    address: str | None = None
    """Ray cluster to join, for instance "auto" or ray://head:10001; without it Ray runs on this machine."""


def extract(config: ExtractConfig) -> Shards:
    """Run the stage; returns the finished shards.

    Raises InputError if nothing can be done at all. Videos that cannot be used go to `quarantine.jsonl`.
    """
    from tqdm import tqdm

    config = with_absolute_paths(config)
    quarantine = Quarantine(config.output)
    paths = _videos_by_id(config.videos, quarantine)
    captions = read_raw_captions(config.captions) if config.captions else {}
    _note_captions_without_video(captions, paths, quarantine)
    encoder = _prepare_encoder(config, list(paths.values()))
    manifest = Manifest(encoder.name, encoder.fingerprint(), encoder.dimension)
    if (config.output / MANIFEST).exists():
        stored = Manifest.read(config.output)
        check_encoder(stored, manifest.fingerprint, manifest.encoder, config.output)
        done = set(Shards(config.output).video_ids()) if stored.parts else set()
        missing = [video_id for video_id in done if video_id not in paths]
        if missing:
            raise InputError(
                f"{config.output}: holds the tokens of other videos, for instance {missing[0]!r}; "
                "choose another --output"
            )
    else:
        done = set()
    start_run(config.output, "extract", config)
    todo = [(i, p) for i, p in paths.items() if i not in done and i not in quarantine.video_ids()]
    if todo or not _is_complete(config.output):
        writer = ShardWriter(config.output, manifest, config.videos_per_part)
        with ray_session(config.address), tqdm(total=len(paths), initial=len(paths) - len(todo), unit="video") as bar:
            bar.set_description(f"tokens by {manifest.encoder}")
            for row in _encode(todo, config):
                bar.update()
                if row["reason"]:
                    quarantine.add(row["video_id"], row["reason"])
                    quarantine.save()
                    continue
                writer.add(_record(row, captions, config, quarantine, manifest.dimension))
        quarantine.save()
        if not writer.close().parts:
            raise InputError(f"{config.videos}: none of the {len(paths)} videos could be used; see {quarantine.path}")
    shards = Shards(config.output)
    hours = shards.seconds().sum() / 3600
    print(f"{len(shards)} videos, {hours:.2f} hours of tokens in {config.output}; {quarantine.summary()}")
    return shards


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


def _note_captions_without_video(captions: dict[str, Any], paths: dict[str, Path], quarantine: Quarantine) -> None:
    for video_id in captions:
        if video_id not in paths:
            unsafe = os.sep in video_id or video_id in ("", ".", "..")
            reason = "an id that is a path cannot be a video's" if unsafe else "captions of a video that is not there"
            quarantine.add(video_id, reason, "captions")


def _prepare_encoder(config: ExtractConfig, videos: list[Path]) -> Any:
    """The frozen encoder, saved in the output for all workers to read; made and calibrated on the first run."""
    from videoclip.encoders.video_encoder import load_video_encoder

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
    if (config.output / MANIFEST).exists():
        check_encoder(Manifest.read(config.output), encoder.fingerprint(), encoder.name, config.output)
    encoder.save(config.output)
    return encoder


def _make_encoder(config: ExtractConfig, videos: list[Path]) -> Any:
    from videoclip.encoders.image import ImageEncoder
    from videoclip.encoders.s3d import S3D
    from videoclip.encoders.x3d import X3D

    if "/" in config.encoder:
        return ImageEncoder.from_pretrained(config.encoder)
    if config.encoder == "s3d":
        if config.weights is None:
            raise InputError("the encoder s3d needs its published weights: --weights s3d_howto100m.pth")
        return S3D.from_howto100m(config.weights)
    family, _, variant = config.encoder.partition("-")
    if family != "x3d":
        raise InputError(
            f"unknown encoder {config.encoder!r}; choose s3d, x3d-tiny, x3d-xs, x3d-s, x3d-m, x3d-l or a hub id"
        )
    encoder = X3D(variant, config.weights, config.seed)
    if config.weights is None:
        print(
            f"No weights were given: {encoder.name} has random weights, its normalisation fitted to these videos. "
            "That is enough to try things out; for real use pass --weights."
        )
        encoder.calibrate(_calibration_clips(encoder, videos, config))
    return encoder


def _calibration_clips(encoder: Any, videos: list[Path], config: ExtractConfig) -> np.ndarray:
    """Clips spread evenly over up to 40 of the videos: uint8 [N, T, H, W, 3]. Unreadable videos are passed over;
    extraction itself will name them."""
    from videoclip.data.video import clips_of_seconds, decode_seconds

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
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    attempts = str(config.output / ".attempts")
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


class EncodeVideo:
    """A Ray actor: holds the encoder, turns one video a call into tokens or into the reason why not."""

    def __init__(self, encoder_folder: str, attempts: str) -> None:
        import torch

        from videoclip.encoders.video_encoder import load_video_encoder

        torch.set_num_threads(1)  # one actor a CPU; threads of several would fight
        self.encoder = load_video_encoder(Path(encoder_folder))
        if torch.cuda.is_available():
            self.encoder.to("cuda").half()
        self.attempts = Path(attempts)
        self.attempts.mkdir(parents=True, exist_ok=True)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from videoclip.data.video import probe

        result = {"video_id": row["video_id"], "tokens": b"", "duration": 0.0, "reason": ""}
        path = Path(row["path"])
        mark = self.attempts / hashlib.sha256(row["video_id"].encode()).hexdigest()
        if self._count_attempt(mark) > ATTEMPTS:
            mark.unlink()
            return {**result, "reason": f"{path}: took its worker down {ATTEMPTS} times"}
        try:
            duration = probe(path).duration
            tokens = self.encoder.encode_video(path)
            result.update(tokens=tokens.tobytes(), duration=duration or float(len(tokens)))
        except InputError as error:
            result["reason"] = str(error)
        mark.unlink()
        return result

    def _count_attempt(self, mark: Path) -> int:
        """Note that this video was begun; the mark outlives a worker that dies over it."""
        with open(mark, "a") as file:
            file.write(".")
        return mark.stat().st_size


def _record(
    row: dict[str, Any],
    captions: dict[str, Any],
    config: ExtractConfig,
    quarantine: Quarantine,
    dimension: int,
) -> VideoRecord:
    tokens = np.frombuffer(row["tokens"], np.float16).reshape(-1, dimension)
    of_video: Captions = NO_CAPTIONS
    if row["video_id"] in captions:
        try:
            of_video, rejected = captions_of_video(
                captions[row["video_id"]], len(tokens), row["video_id"], config.seed, config.keep_rolling_repeats
            )
        except ValueError as error:
            quarantine.add(row["video_id"], f"its captions cannot be used: {error}", "captions")
        else:
            for reason, count in rejected.items():
                quarantine.add(row["video_id"], f"{count} caption lines left out: {reason}", "captions")
    return VideoRecord(row["video_id"], row["duration"], tokens, of_video)
