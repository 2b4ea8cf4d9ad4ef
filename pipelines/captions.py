"""`videoclip captions`: what was understood of a folder's subtitles, before anything is made of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from pipelines.video_files import videos_by_id
from videoclip.data.subtitle_files import SubtitleFiles, Understood
from videoclip.data.video import probe
from videoclip.errors import InputError
from videoclip.files import write_json


@dataclass(frozen=True)
class CaptionsConfig:
    """Read the subtitles of every video of a folder, say what was understood, and write it where asked."""

    videos: Annotated[Path, Positional]
    """Folder of video files; a file's name without its suffix is its video id."""
    captions: str = "beside"
    """beside (files named like the videos, next to them, else tracks inside them), a folder of subtitles, or a file."""
    language: str = ""
    """Two letters, where videos have subtitles in several languages."""
    write: Path | None = None
    """Folder for one json a video, as understood, and captions.json with all of them in HowTo100M's form."""


def captions(config: CaptionsConfig) -> list[dict[str, Any]]:
    """Print one line a video: lines, percent of the video covered, language, what was dropped and why.

    Raises InputError if the folder holds no videos, or `captions` is nothing that holds subtitles.
    """
    from tqdm import tqdm

    rows: list[dict[str, Any]] = []
    paths = videos_by_id(config.videos, lambda video_id, reason: rows.append({"video_id": video_id, "reason": reason}))
    files = SubtitleFiles(config.captions, paths, config.language)
    everything: dict[str, Any] = {}
    for video_id, path in tqdm(paths.items(), unit="video", disable=len(paths) < 50):
        try:
            found = files.understand(video_id, probe(path).duration or float("inf"))
        except InputError as error:
            rows.append({"video_id": video_id, "reason": str(error)})
            continue
        rows.append(_as_row(video_id, found))
        if found is not None and len(found.captions):
            everything[video_id] = _as_raw(found)
    rows += [
        {"video_id": i, "reason": "subtitles of a video that is not there"} for i in sorted(files.ids() - {*paths})
    ]
    if config.write is not None:
        for video_id, raw in everything.items():
            write_json(config.write / f"{video_id}.json", {"language": _language(rows, video_id), **_segments(raw)})
        write_json(config.write / "captions.json", everything)
        write_json(config.write / "understood.json", rows)
    _print(rows)
    return rows


def _as_row(video_id: str, found: Understood | None) -> dict[str, Any]:
    if found is None:
        return {"video_id": video_id, "reason": "no subtitles"}
    return {
        "video_id": video_id,
        "lines": len(found.captions),
        "coverage": round(found.coverage, 1),
        "language": found.language,
        "source": found.source,
        "dropped": dict(+found.dropped),
        "note": found.note,
    }


def _as_raw(found: Understood) -> dict[str, list[Any]]:
    spoken = found.captions
    times = ([round(float(time), 3) for time in of] for of in (spoken.start, spoken.end))
    return {**dict(zip(("start", "end"), times)), "text": spoken.text}


def _segments(raw: dict[str, list[Any]]) -> dict[str, Any]:
    """Whisper's form, which `--captions FOLDER` reads again."""
    rows = zip(raw["start"], raw["end"], raw["text"])
    return {"segments": [{"start": start, "end": end, "text": text} for start, end, text in rows]}


def _language(rows: list[dict[str, Any]], video_id: str) -> str:
    return next((row["language"] for row in rows if row["video_id"] == video_id and "language" in row), "")


def _print(rows: list[dict[str, Any]]) -> None:
    width = max((len(row["video_id"]) for row in rows), default=8)
    total: Counter[str] = Counter()
    for row in rows:
        if "reason" in row:
            print(f"{row['video_id']:{width}s}  {row['reason']}")
            continue
        total.update(row["dropped"])
        dropped = "; ".join(f"{count} {reason}" for reason, count in row["dropped"].items())
        parts = [f"{row['lines']:5d} lines", f"{row['coverage']:5.1f}%", f"{row['language'] or '--':2s}"]
        ending = "; ".join(part for part in (f"dropped: {dropped}" if dropped else "", row["note"]) if part)
        print(f"{row['video_id']:{width}s}  {'  '.join(parts)}  {ending}".rstrip())
    read = [row for row in rows if row.get("lines")]
    print(f"{len(read)} of {len(rows)} videos have subtitles; {sum(row['lines'] for row in read)} lines")
