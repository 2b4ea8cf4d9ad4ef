"""`videoclip transcribe`: speech to text for videos without subtitles, as Ray tasks, with quarantine and resume.

Writes one `<video_id>.json` a video, in Whisper's form with word times, which `--captions FOLDER` reads everywhere.
Lines that were invented are left out of what is read, and counted here.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.ray_session import ray_session, run_tasks
from pipelines.runs import Quarantine, start_run, with_absolute_paths, writes_output
from pipelines.video_files import videos_by_id
from videoclip.data.subtitle_files import BESIDE, SubtitleFiles
from videoclip.data.transcripts import segments_to_lines
from videoclip.encoders.speech import FasterWhisper, SpeechConfig, Transcriber, described
from videoclip.errors import InputError
from videoclip.files import read_json, write_json


@dataclass(frozen=True)
class TranscribeConfig:
    """Transcribe the speech of every video that has no subtitles. Run it again to go on."""

    videos: Path
    """Folder of video files."""
    output: Path = Path("runs/transcripts")
    """Folder for the transcripts; give it as --captions afterwards."""
    speech: SpeechConfig = field(default_factory=SpeechConfig)
    everything: bool = False
    """Also transcribe videos that have subtitles beside or inside them."""
    address: str | None = None
    """Ray cluster to join; without it Ray runs on this machine."""


@writes_output
def transcribe(config: TranscribeConfig, make: Callable[[SpeechConfig], Transcriber] = FasterWhisper) -> dict[str, int]:
    """Run the stage; returns how many lines were kept, and how many left out by reason.

    `make` makes the recogniser in every worker. Raises InputError if there are no videos or no recogniser.
    """
    config = with_absolute_paths(config)
    quarantine = Quarantine(config.output)
    paths = videos_by_id(config.videos, lambda video_id, reason: quarantine.add(video_id, reason, "file"))
    start_run(config.output, "transcribe", config)
    wanted = paths if config.everything else _without_subtitles(paths)
    left_out = quarantine.video_ids()
    todo = [
        (functools.partial(_transcribe, make, config.speech), video_id, path, config.output)
        for video_id, path in wanted.items()
        if video_id not in left_out and not (config.output / f"{video_id}.json").exists()
    ]
    if todo:
        with ray_session(config.address):
            run_tasks(_call, todo, len(wanted) - len(todo), len(wanted), "video", "transcribing")
    for path in sorted(config.output.glob("*.failed.json")):
        row = read_json(path)
        quarantine.add(row["video_id"], row["reason"])
        path.unlink()
    quarantine.save()
    counts = _count(config.output, wanted)
    invented = "; ".join(f"{count} {reason}" for reason, count in counts.items() if reason != "lines")
    print(
        f"{counts['lines']} lines said in {len(wanted)} videos, in {config.output}"
        f"{f' (left out: {invented})' if invented else ''}; {quarantine.summary()}"
    )
    return dict(counts)


def _without_subtitles(paths: dict[str, Path]) -> dict[str, Path]:
    subtitles = SubtitleFiles(BESIDE, paths)
    without = {}
    for video_id, path in paths.items():
        try:
            found = subtitles.find(video_id)
        except InputError:
            found = None
        if found is None or not found.lines:
            without[video_id] = path
    return without


def _call(work: Callable[[str, Path, Path], int], video_id: str, path: Path, output: Path) -> int:
    return work(video_id, path, output)


def _transcribe(
    make: Callable[[SpeechConfig], Transcriber], config: SpeechConfig, video_id: str, path: Path, output: Path
) -> int:
    """One video, to `<video_id>.json`, or the reason why not to `<video_id>.failed.json`."""
    try:
        transcript = make(config)(path)
    except InputError as error:
        write_json(output / f"{video_id}.failed.json", {"video_id": video_id, "reason": str(error)})
        return 1
    write_json(output / f"{video_id}.json", {"made_by": described(config), **transcript})
    return 1


def _count(folder: Path, wanted: dict[str, Path]) -> Counter[str]:
    counts: Counter[str] = Counter(lines=0)
    for video_id in wanted:
        path = folder / f"{video_id}.json"
        if path.exists():
            values: dict[str, Any] = read_json(path)
            lines, dropped = segments_to_lines(values["segments"])
            counts["lines"] += len(lines)
            counts.update(dropped)
    return counts
