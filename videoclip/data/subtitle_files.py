"""Which subtitles belong to which video: files beside it or in a folder, tracks inside it, and in which language."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from videoclip.data.caption_table import CaptionTable
from videoclip.data.captions import Captions, Line, captions_of_video, read_captions
from videoclip.data.howto100m import read_csv_captions
from videoclip.data.subtitles import (
    SUBTITLE_SUFFIXES,
    Subtitles,
    language_of_name,
    read_subtitles,
    read_tracks,
)
from videoclip.errors import InputError
from videoclip.files import sha256
from videoclip.storage import cache_folder

BESIDE = "beside"


@dataclass(frozen=True)
class Understood:
    """What was understood of one video's subtitles, checked against its length in seconds."""

    video_id: str
    source: str
    language: str
    captions: Captions
    dropped: Counter[str]
    note: str
    duration: float

    @property
    def coverage(self) -> float:
        """Percent of the video during which something is said."""
        if not len(self.captions) or self.duration <= 0:
            return 0.0
        total, reached = 0.0, 0.0
        for start, end in zip(self.captions.start.tolist(), self.captions.end.tolist()):
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return 100 * total / self.duration


class SubtitleFiles:
    """Subtitles by video, read when they are asked for.

    `captions` is `beside` (files named like the video, next to it, else tracks inside it), a folder of such files, one
    file, or HowTo100M's `raw_caption.json` or folder of csv. `language` (two letters) picks among several; without it
    a file whose name has no language is taken first.
    Raises InputError if `captions` is nothing of these.
    """

    def __init__(self, captions: Path | str, videos: Mapping[str, Path], language: str = "") -> None:
        self.videos = videos
        self.language = language.lower()
        self.beside = str(captions) == BESIDE
        self._database: Mapping[str, object] | None = None
        self._table: Path | None = None
        self._files: dict[str, list[Path]] = {}
        path = Path(captions)
        if self.beside:
            folders = {video.parent for video in videos.values()}
            self._collect(sorted(file for folder in folders for file in folder.iterdir()), by_folder=True)
        elif path.is_dir():
            self._collect(sorted(path.rglob("*")))
            if not self._files:
                kinds = ", ".join((*SUBTITLE_SUFFIXES, ".csv"))
                raise InputError(f"{path}: no subtitles here (looked for {kinds}, named like their videos)")
        elif path.suffix.lower() == ".json" and not _is_transcript(path):
            self._database = CaptionTable.make(path, cache_folder() / "captions")
            self._table = path
        elif path.is_file() and path.suffix.lower() in SUBTITLE_SUFFIXES:
            ids = [video_id for video_id in videos if _belongs(path, video_id)] or list(videos)
            if len(ids) != 1:
                raise InputError(f"{path}: named like none of {len(videos)} videos; give it its video's name")
            self._files = {ids[0]: [path]}
        else:
            raise InputError(f"{path}: no such captions; give a file, a folder, or the word {BESIDE}")

    def ids(self) -> set[str]:
        """Ids of all videos that there are subtitles for, also of videos that are not there."""
        return set(self._database if self._database is not None else self._files)

    def digest(self, video_id: str) -> str:
        """Changes when a video's subtitles do: sizes and times of its files, or a checksum of its lines in a table."""
        if self._database is not None:
            raw = json.dumps(self._database.get(video_id), sort_keys=True, default=str)
            return hashlib.sha256(raw.encode()).hexdigest()[:16]
        stats = [(file.name, file.stat()) for file in self._choose(self._files.get(video_id, []))]
        text = f"{self.language} {[(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of all files that could be read, with their names and the language; tracks inside
        videos, which belong to the videos, are left out."""
        if self._table is not None:
            return sha256(self._table)
        files = sorted({file for files in self._files.values() for file in files})
        text = "".join(f"{file.name}\0{sha256(file)}\n" for file in files) + (self.language or "")
        return hashlib.sha256(text.encode()).hexdigest()

    def find(self, video_id: str) -> Subtitles | None:
        """The subtitles of one video, or None where there are none in that language.

        Raises InputError, naming the file, if they cannot be read.
        """
        if self._database is not None:
            return _of_database(self._database[video_id], video_id) if video_id in self._database else None
        found = [_read(path) for path in self._choose(self._files.get(video_id, []))]
        if not found and self.beside:
            found = [track for track in read_tracks(self.videos[video_id]) if self._fits(track.language)]
        found.sort(key=lambda subtitles: (subtitles.language != self.language, subtitles.language))
        return next((subtitles for subtitles in found if subtitles.lines), found[0] if found else None)

    def understand(self, video_id: str, duration: float) -> Understood | None:
        """`find`, with every line checked against the video's length in seconds."""
        subtitles = self.find(video_id)
        if subtitles is None:
            return None
        if subtitles.rolling and math.isfinite(duration):
            captions, rejected = captions_of_video(subtitles.raw, int(duration), video_id)
        else:
            captions, rejected = read_captions(subtitles.raw, duration)
        dropped = subtitles.dropped + rejected
        note = "; ".join(filter(None, (subtitles.note, self._also(video_id, subtitles.language))))
        return Understood(video_id, subtitles.source, subtitles.language, captions, dropped, note, duration)

    def _collect(self, files: list[Path], by_folder: bool = False) -> None:
        suffixes = (*SUBTITLE_SUFFIXES, *(() if by_folder else (".csv",)))
        known = {(video.parent, video_id) for video_id, video in self.videos.items()}
        for file in files:
            if file.suffix.lower() not in suffixes or not file.is_file():
                continue
            names = [file.stem, re.sub(r"\.[^.]*$", "", file.stem)]
            own = [name for name in names if ((file.parent, name) in known if by_folder else name in self.videos)]
            table = file.suffix.lower() == ".json" and not own and not _is_transcript(file)  # of many videos, or none
            if own or not (by_folder or table):
                stem = own[0] if own else names[-1 if language_of_name(file) else 0]
                self._files.setdefault(stem, []).append(file)

    def _choose(self, files: list[Path]) -> list[Path]:
        """Of several files of a video those to be read: in the language, else without one in their names."""
        if self.language:
            exact = [file for file in files if language_of_name(file) == self.language]
            return exact or [file for file in files if not language_of_name(file)]
        return sorted(files, key=lambda file: (language_of_name(file) != "", file.name))[:1]

    def _also(self, video_id: str, language: str) -> str:
        """Which other languages a video's files have, where none was asked for."""
        others = {language_of_name(file) for file in self._files.get(video_id, [])} - {language, ""}
        return f"also in {', '.join(sorted(others))}: --language chooses" if others and not self.language else ""

    def _fits(self, language: str) -> bool:
        return not self.language or language in ("", self.language)


def _read(path: Path) -> Subtitles:
    if path.suffix.lower() != ".csv":
        return read_subtitles(path)
    return _of_database(read_csv_captions(path), path.stem, str(path))


def _of_database(raw: object, video_id: str, source: str = "") -> Subtitles:
    """One video of HowTo100M's forms."""
    try:
        read_captions(raw)
    except ValueError as error:
        raise InputError(f"its captions cannot be used: {error}") from None
    assert isinstance(raw, dict)  # `read_captions` has looked
    lines: list[Line] = list(zip(raw["start"], raw["end"], raw["text"]))
    return Subtitles(source or f"captions of {video_id}", lines, rolling=True)


def _belongs(file: Path, video_id: str) -> bool:
    return video_id in (file.stem, re.sub(r"\.[^.]*$", "", file.stem))


def _is_transcript(path: Path) -> bool:
    """Whether a json is one video's transcript rather than HowTo100M's table of many: decided by its beginning."""
    if not path.is_file():
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        start = file.read(4096)
    return bool(
        re.match(r'\s*\{\s*"(segments|events|text|language|wireMagic|word_segments|made_by)"\s*:\s*["\[{]', start)
    )
