"""What an actor of `extract` does: videos into tokens, tokens into parts. Light to import; torch comes with `ready`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from videoclip.data.captions import Captions
from videoclip.data.pictures import picture_clip, read_bytes
from videoclip.data.shards import Part, VideoRecord, check_tokens, write_part
from videoclip.data.video import clips_of_seconds, decode_seconds, probe
from videoclip.data.video_lists import ListedVideo, local_path
from videoclip.errors import InputError

if TYPE_CHECKING:
    from videoclip.encoders.stretches import Seam, Stretch
    from videoclip.encoders.video_encoder import VideoEncoder

WRITE, ENCODE = "write", "encode"  # groups of threads of an actor


@dataclass(frozen=True)
class Work:
    """One video, or with `stretch` a stretch of it, or with `cut` off all of it however long it is."""

    video: ListedVideo
    stretch: Stretch | None = None
    cut: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of it: tokens of so many seconds, or the `stretches` that it should be cut into, or why not.

    `duration` in seconds, as the file says; `kind` as in the quarantine list.
    """

    seconds: int = 0
    duration: float = 0.0
    reason: str = ""
    kind: str = "input"
    stretches: tuple[Stretch, ...] = ()
    seam: Seam | None = None


@dataclass(frozen=True)
class PartRow:
    """One row of a part: its tokens are those at `pieces`, (place of an argument, place in it), end to end."""

    video_id: str
    duration: float
    captions: Captions
    pieces: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class WorkerOptions:
    """What an actor is told: where encoder and shards are, and how it works.

    `threads` decode at once and share batches of `batch` clips on a GPU; on a CPU there is one.
    """

    folder: Path
    decoder: str = "auto"
    compile: bool = False
    threads: int = 1
    batch: int = 0
    expects_gpu: bool = False


class ExtractionWorker:
    """A Ray actor. Calls of `encode` come from as many threads as it was told."""

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options

    def ready(self) -> str:
        """Load the encoder; returns the device that it is on. Raises InputError if that cannot be."""
        import torch

        from videoclip.encoders.catalog import load_video_encoder
        from videoclip.encoders.decoders import make_decoder
        from videoclip.encoders.shared_batches import SharedBatches
        from videoclip.encoders.video_encoder import CLIPS_AT_ONCE_ON_GPU

        torch.set_num_threads(1)  # one actor a CPU, or many threads that decode; more of them would fight
        self.encoder: VideoEncoder = load_video_encoder(self.options.folder)
        on_gpu = self.options.expects_gpu and torch.cuda.is_available()
        if on_gpu:
            self.encoder.to("cuda").half()
        device = "cuda" if on_gpu else "cpu"
        self.decode = make_decoder(self.options.decoder, device)
        self.encode_all = self.encoder.encode_all
        if on_gpu or self.options.threads > 1:
            size = self.options.batch or CLIPS_AT_ONCE_ON_GPU
            backend = "inductor" if self.options.compile and on_gpu else ""
            self.encode_all = SharedBatches(self.encoder, size, backend).encode_all
        return device

    def encode(self, work: list[Work]) -> tuple[list[Outcome], list[np.ndarray | None]]:
        """One outcome for each, and its tokens, float16 [seconds, D], where there are any."""
        results = [self._encode_one(one) for one in work]
        return [outcome for outcome, _ in results], [tokens for _, tokens in results]

    def _encode_one(self, work: Work) -> tuple[Outcome, np.ndarray | None]:
        where = describe(work)
        try:
            return self._tokens(work)
        except InputError as error:
            return Outcome(reason=str(error)), None
        except Exception as error:  # memory, a disk, a decoder's bug: it costs this video, not the archive
            self._recover()
            return Outcome(reason=f"{where}: {describe_crash(error)}", kind="crashed"), None

    def _tokens(self, work: Work) -> tuple[Outcome, np.ndarray | None]:
        from videoclip.encoders.stretches import Seam, cut, stretch_clips

        video, encoder, seam = work.video, self.encoder, Seam()
        path = local_path(video.location)
        duration = 1.0 if video.is_picture else _duration(video, probe(path).duration)
        if work.stretch is not None:
            take = work.stretch, seam, video.start, video.end, self.decode
            clips = stretch_clips(path, encoder.frame_format, encoder.frame_offsets, *take)
        else:
            stretches = cut(duration) if work.cut else []
            if len(stretches) > 1:
                return Outcome(duration=duration, stretches=tuple(stretches)), None
            clips = clips_of(video, encoder, self.decode)
        tokens = self.encode_all(clips)
        if work.stretch is None or len(tokens):
            check_tokens(tokens, encoder.dimension, video.video_id)
        return Outcome(len(tokens), duration or float(len(tokens)), seam=seam), tokens

    def write_part(self, folder: Path, name: str, dimension: int, rows: list[PartRow], *tokens: Any) -> Part:
        """Write a part of rows whose tokens are in `tokens`, each the second answer of a call of `encode`."""
        records = []
        for row in rows:
            pieces = [tokens[argument][place] for argument, place in row.pieces]
            joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            records.append(VideoRecord(row.video_id, row.duration, joined, row.captions))
        return write_part(folder, name, records, dimension)

    def _recover(self) -> None:
        """Free the GPU's memory. Where the GPU no longer answers, nothing works in this process any more: it ends, the
        pool starts another, and the death counts."""
        import torch

        if torch.cuda.is_available():
            try:
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)


def clips_of(video: ListedVideo, encoder: VideoEncoder, decode: Any = decode_seconds) -> Iterator[np.ndarray]:
    """One clip a second of a listed video, the clip of it that is meant, or the one clip of a picture."""
    path = local_path(video.location)
    if video.is_picture:
        data = read_bytes(path, video.offset, video.size)
        yield picture_clip(data, f"{video.video_id} ({path})", encoder.frame_format, len(encoder.frame_offsets))
        return
    yield from clips_of_seconds(decode(path, encoder.frame_format, video.start, video.end), encoder.frame_offsets)


def _duration(video: ListedVideo, of_file: float) -> float:
    """Seconds of the clip, as far as the file's header knows; 0 if it does not."""
    end = of_file if video.end is None else min(video.end, of_file or video.end)
    return max(0.0, end - video.start)


def describe(work: Work) -> str:
    """File, and stretch of it, for a person."""
    if work.stretch is None:
        return work.video.location
    last = "the end" if work.stretch.last is None else str(work.stretch.last)
    return f"{work.video.location}, seconds {work.stretch.first} to {last}"


def describe_crash(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def actor_options(cpus: float, gpus: float, threads: int) -> dict[str, Any]:
    """What Ray is told of such an actor: its share of a machine, and its threads by group. It is not restarted by Ray:
    the pool makes another, and counts."""
    groups = {ENCODE: threads, WRITE: 1}
    return {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "concurrency_groups": groups}
