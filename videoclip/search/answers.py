"""Answers written down: for people, for programs (json, csv), and for editors (EDL)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

EDL_RATE = 25  # frames a second of the cuts; an editor conforms them to its own


@dataclass(frozen=True)
class Answer:
    """One moment. Times in seconds; `window_start` and `window_end` are what was found before the ends were refined.

    `score`: the cosine of query and window; `channels`: those that found it, with its rank in each; `said`: the line
    said there that has most of the query; `state`: "" or why the file cannot be played as it was indexed.
    """

    number: int
    video_id: str
    path: str
    folder: str
    start: float
    end: float
    score: float
    channels: dict[str, int]
    said: str
    said_at: float
    duration: float
    window_start: float
    window_end: float
    state: str = field(default="")

    @property
    def time(self) -> str:
        """`h:mm:ss` of the start."""
        return clock(self.start)

    @property
    def link(self) -> str:
        """A link to the moment in the file, which players and browsers understand; "" without a file."""
        return f"{Path(self.path).as_uri()}#t={self.start:g},{self.end:g}" if self.path else ""

    def as_json(self) -> dict[str, Any]:
        """All fields, and the start as a clock shows it."""
        return {**asdict(self), "time": self.time, "link": self.link}


def clock(seconds: float) -> str:
    """`h:mm:ss`, fractions of a second cut off."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def to_lines(answers: Sequence[Answer]) -> str:
    """For people: place, score, times, who found it, the file, and the line said."""
    rows = []
    for place, answer in enumerate(answers, 1):
        found = "+".join(answer.channels)
        where = answer.link or answer.video_id
        rows.append(
            f"{place:3d}  {answer.score:6.3f}  {answer.time} - {clock(math.ceil(answer.end))}  {found:13s}  {where}"
        )
        if answer.said:
            rows.append(f"{'':37s}“{answer.said}”")
        if answer.state and answer.path:
            rows.append(f"{'':37s}({answer.state})")
    return "\n".join(rows)


def to_csv(answers: Sequence[Answer]) -> str:
    """A table with a head line; cells that a spreadsheet would take for a formula are made text."""
    names = ("video_id", "path", "time", "start", "end", "score", "channels", "said", "link")
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(names)
    for answer in answers:
        row = {**answer.as_json(), "channels": "+".join(answer.channels)}
        writer.writerow([_as_text(row[name]) for name in names])
    return buffer.getvalue()


def _as_text(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def to_edl(answers: Sequence[Answer], title: str, rate: int = EDL_RATE) -> str:
    """A CMX 3600 edit decision list: the moments one after another, as cuts that editing programs import."""
    rows = [f"TITLE: {' '.join(title.split())[:70]}", "FCM: NON-DROP FRAME", ""]
    record = 3600.0  # tapes begin at one hour, and so do editors' timelines
    for place, answer in enumerate(answers[:999], 1):
        length = answer.end - answer.start
        times = " ".join(timecode(t, rate) for t in (answer.start, answer.end, record, record + length))
        rows.append(f"{place:03d}  AX       V     C        {times}")
        rows.append(f"* FROM CLIP NAME: {Path(answer.path).name or answer.video_id}")
        if answer.said:
            rows.append(f"* COMMENT: {' '.join(answer.said.split())[:200]}")
        rows.append("")
        record += round(length * rate) / rate
    return "\n".join(rows)


def timecode(seconds: float, rate: int) -> str:
    """`hh:mm:ss:ff`."""
    frames = round(seconds * rate)
    whole = frames // rate
    return f"{whole // 3600:02d}:{whole % 3600 // 60:02d}:{whole % 60:02d}:{frames % rate:02d}"


def media_fragment(path: str, start: float, end: float) -> str:
    """`path#t=12,17`, quoted as a part of a link."""
    return f"{quote(path)}#t={start:g},{end:g}"
