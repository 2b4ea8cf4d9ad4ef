"""What an archive holds, in one SQLite file: its videos, the lines said in them, and the words of every window.

One transaction takes the archive from one generation to the next, so whoever reads meanwhile sees the one or the
other. Window numbers are never used again: an index of windows that is one generation old stays true, but for
windows that are gone, which are passed over.

Windows of a video are `window` seconds long and start every `stride` seconds; the last one ends with the video. So
they are counted, not stored: window i of a video is number `first_window + i`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.errors import InputError

DATABASE = "archive.sqlite"
SCHEMA_VERSION = 2
# Porter's stemmer finds `sliced` by `slicing`; it knows English and leaves other languages nearly alone.
TOKENIZER = "porter unicode61 remove_diacritics 2"
SCHEMA = f"""
CREATE TABLE settings(name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE videos(
    number INTEGER PRIMARY KEY AUTOINCREMENT, video_id TEXT NOT NULL UNIQUE, path TEXT NOT NULL, folder TEXT NOT NULL,
    size INTEGER NOT NULL, modified INTEGER NOT NULL, digest TEXT NOT NULL, seconds INTEGER NOT NULL,
    duration REAL NOT NULL, language TEXT NOT NULL, first_window INTEGER NOT NULL, block TEXT NOT NULL,
    window_row INTEGER NOT NULL, second_row INTEGER NOT NULL);
CREATE TABLE lines(video INTEGER NOT NULL, start REAL NOT NULL, stop REAL NOT NULL, text TEXT NOT NULL);
CREATE INDEX lines_of_video ON lines(video, start);
CREATE VIRTUAL TABLE words USING fts5(text, content='', tokenize='{TOKENIZER}', prefix='3');
CREATE VIRTUAL TABLE vocabulary USING fts5vocab(words, row);
CREATE TABLE frequent(term TEXT PRIMARY KEY, windows INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Line:
    """What was said from `start` to `end`, in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Video:
    """One video of the archive. `seconds`: rows of tokens; `modified`: nanoseconds, of the file when it was indexed.

    `block` names the file of its vectors, `window_row` and `second_row` where they begin in it.
    """

    number: int
    video_id: str
    path: str
    folder: str
    size: int
    modified: int
    digest: str
    seconds: int
    duration: float
    language: str
    first_window: int
    block: str
    window_row: int
    second_row: int

    def state(self) -> str:
        """ "" if the file is as it was indexed, else what happened to it, in words."""
        if not self.path:
            return "the archive does not know this video's file; index with --videos"
        try:
            found = Path(self.path).stat()
        except OSError:
            return "its file is gone or was renamed; run videoclip index again"
        if (found.st_size, found.st_mtime_ns) != (self.size, self.modified):
            return "its file was replaced since it was indexed; run videoclip index again"
        return ""


VIDEO_COLUMNS = ", ".join(Video.__dataclass_fields__)


def window_starts(seconds: int, window: int, stride: int) -> np.ndarray:
    """int64: where the windows of a video begin; each is `window` seconds long, or the whole of a shorter video."""
    if seconds <= window:
        return np.zeros(1, np.int64)
    starts = np.arange(0, seconds - window + 1, stride)
    return starts if starts[-1] + window == seconds else np.append(starts, seconds - window)


def window_count(seconds: int, window: int, stride: int) -> int:
    """How many windows a video has: the length of `window_starts`."""
    return 1 if seconds <= window else (seconds - window) // stride + 1 + ((seconds - window) % stride != 0)


class Store:
    """The SQLite file of an archive's folder. Every thread has its own, or they take turns.

    Raises InputError if there is none, or one of another version.
    """

    def __init__(self, folder: Path, create: bool = False) -> None:
        self.folder = Path(folder)
        path = self.folder / DATABASE
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
        elif not path.is_file():
            raise InputError(f"{self.folder}: no such index ({DATABASE} is missing); make one with `videoclip index`")
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        try:
            if create:
                self.connection.execute("PRAGMA journal_mode=WAL")  # readers go on while a run writes
            if not self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] and create:
                self.connection.executescript(f"BEGIN; {SCHEMA} COMMIT;")
                self.set("schema_version", SCHEMA_VERSION)
            version = self.get("schema_version", 0)
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path}: is damaged ({error}); remove the folder and run `videoclip index`") from None
        if version != SCHEMA_VERSION:
            raise InputError(f"{path}: version {version}, this reads {SCHEMA_VERSION}; run `videoclip index` anew")

    def close(self) -> None:
        """Let the file go."""
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that the block writes becomes true at once, or not at all."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.connection.execute("ROLLBACK")
            raise
        self.connection.execute("COMMIT")

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, a JSON value."""
        row = self.connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else default

    def set(self, name: str, value: Any) -> None:
        """Keep a setting."""
        self.connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value)))

    def videos(self) -> list[Video]:
        """All videos, by number."""
        rows = self.connection.execute(f"SELECT {VIDEO_COLUMNS} FROM videos ORDER BY number")
        return [Video(*row) for row in rows]

    def lines(self, number: int, start: float = 0.0, end: float = 1e9) -> list[Line]:
        """What is said in a video from `start` to `end`, in its order."""
        rows = self.connection.execute(
            "SELECT start, stop, text FROM lines WHERE video = ? AND start < ? AND stop > ? ORDER BY start, rowid",
            (number, end, start),
        )
        return [Line(*row) for row in rows]

    def spoken(self) -> frozenset[int]:
        """Numbers of the videos in which anything is said."""
        rows = self.connection.execute(
            "SELECT number FROM videos WHERE EXISTS (SELECT 1 FROM lines WHERE lines.video = videos.number)"
        )
        return frozenset(int(row[0]) for row in rows)

    def line_count(self) -> int:
        """How many lines there are in all."""
        return int(self.connection.execute("SELECT count(*) FROM lines").fetchone()[0])

    def some_lines(self, count: int) -> list[str]:
        """Up to `count` lines, spread evenly over all."""
        last = self.connection.execute("SELECT max(rowid) FROM lines").fetchone()[0]
        if last is None:
            return []
        found = []
        for row in np.unique(np.linspace(1, last, count).astype(int)).tolist():
            line = self.connection.execute("SELECT text FROM lines WHERE rowid >= ? LIMIT 1", (row,)).fetchone()
            found.append(line[0])
        return found
