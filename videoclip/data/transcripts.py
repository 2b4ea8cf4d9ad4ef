"""Transcripts in json: what Whisper, WhisperX and YouTube write down, and which of their lines were never said.

Whisper invents lines over silence and music: the same phrase again and again, thanks for watching, text that
compresses too well. Where a transcript carries the figures that give such lines away, they are left out and counted.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from videoclip.data.captions import Line

SPLIT_SECONDS, SPLIT_PAUSE = 8.0, 1.0  # longer segments are cut at word times: a line should lie where it was said


@dataclass(frozen=True)
class InventedLines:
    """Which lines of a speech recogniser are left out. The defaults are those of Whisper's own decoding."""

    no_speech: float = 0.6
    """Most probability of silence that a line may have, unless its words are likely."""
    log_probability: float = -1.0
    """Least mean log probability of its words."""
    compression: float = 2.4
    """Most times that its text may shrink under compression; repeats shrink a lot."""
    repeats: int = 2
    """So often may the same line follow itself."""


def read_transcript(values: Any) -> tuple[list[Line], str, Counter[str]]:
    """Lines (start, end, text), the language or "", and what was left out, of a json in one of the known forms.

    Known are Whisper's and WhisperX's `{"segments": [...]}` and YouTube's json3 `{"events": [...]}`.
    Raises ValueError for another form.
    """
    if isinstance(values, dict) and isinstance(values.get("segments"), list):
        language = values.get("language")
        lines, dropped = segments_to_lines(values["segments"])
        return lines, language if isinstance(language, str) else "", dropped
    if isinstance(values, dict) and isinstance(values.get("events"), list):
        lines, dropped = _read_json3(values["events"])
        return lines, "", dropped
    raise ValueError('neither {"segments": [...]} of Whisper nor {"events": [...]} of YouTube')


def segments_to_lines(
    segments: list[Any], invented: InventedLines = InventedLines()
) -> tuple[list[Line], Counter[str]]:
    """Whisper's segments as lines; those that were never said are left out and counted by reason."""
    lines: list[Line] = []
    dropped: Counter[str] = Counter()
    previous, times = "", 0
    for segment in segments:
        if not isinstance(segment, dict) or not isinstance(segment.get("text"), str):
            dropped["not a segment"] += 1
            continue
        text = " ".join(segment["text"].split())
        times = times + 1 if text.casefold() == previous else 1
        previous = text.casefold()
        reason = "invented: says itself again" if times > invented.repeats else _why_invented(segment, invented)
        if reason:
            dropped[reason] += 1
            continue
        lines += _split_by_words(segment, text)
    return lines, dropped


def _why_invented(segment: dict[str, Any], invented: InventedLines) -> str:
    silence, likely = _figure(segment, "no_speech_prob"), _figure(segment, "avg_logprob")
    if silence > invented.no_speech and not likely >= invented.log_probability:
        return "invented: text over silence"
    if _figure(segment, "compression_ratio") > invented.compression:
        return "invented: compresses like a repeat"
    return ""


def _figure(segment: dict[str, Any], name: str) -> float:
    value = segment.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan  # a figure that is not there decides nothing


def _split_by_words(segment: dict[str, Any], text: str) -> list[Line]:
    """A segment as lines of at most SPLIT_SECONDS, cut between words, or whole where words have no times."""
    start, end = segment.get("start"), segment.get("end")
    words = _timed_words(segment.get("words"))
    if not words or (words[-1][1] - words[0][0] <= SPLIT_SECONDS and _longest_pause(words) <= SPLIT_PAUSE):
        return [(start, end, text)]
    lines: list[Line] = []
    held: list[tuple[float, float, str]] = []
    for word in words:
        if held and (word[1] - held[0][0] > SPLIT_SECONDS or word[0] - held[-1][1] > SPLIT_PAUSE):
            lines.append(_join(held))
            held = []
        held.append(word)
    return [*lines, _join(held)]


def _timed_words(words: Any) -> list[tuple[float, float, str]]:
    """Words with their times; WhisperX leaves out those of numbers, which then stand where the word before ended."""
    timed: list[tuple[float, float, str]] = []
    for word in words if isinstance(words, list) else []:
        text = word.get("word") if isinstance(word, dict) else None
        if not isinstance(text, str):
            continue
        start, end = word.get("start"), word.get("end")
        if not all(isinstance(time, (int, float)) and math.isfinite(time) for time in (start, end)):
            if not timed:
                return []
            start = end = timed[-1][1]
        timed.append((float(start), float(end), text.strip()))
    return timed


def _longest_pause(words: list[tuple[float, float, str]]) -> float:
    return max((after[0] - before[1] for before, after in pairwise(words)), default=0.0)


def _join(words: list[tuple[float, float, str]]) -> Line:
    return words[0][0], words[-1][1], " ".join(word[2] for word in words if word[2])


def _read_json3(events: list[Any]) -> tuple[list[Line], Counter[str]]:
    """YouTube's json3: an event holds pieces of a line; one marked `aAppend` only breaks the line on the screen."""
    dropped: Counter[str] = Counter()
    lines: list[Line] = []
    for event in events:
        pieces = event.get("segs") if isinstance(event, dict) else None
        if not isinstance(pieces, list):
            continue  # windows and pens: how captions look, not what was said
        text = "".join(str(piece.get("utf8", "")) for piece in pieces if isinstance(piece, dict))
        if not text.strip():
            dropped["line break on the screen"] += 1
            continue
        start, length = event.get("tStartMs"), event.get("dDurationMs", 0)
        if not isinstance(start, (int, float)) or not isinstance(length, (int, float)):
            dropped["start or end is not a number"] += 1
            continue
        lines.append((start / 1000, (start + length) / 1000, " ".join(text.split())))
    return _end_at_the_next(lines), dropped


def _end_at_the_next(lines: list[Line]) -> list[Line]:
    """YouTube keeps a line on the screen while the next is said: let each end where the next begins."""
    starts = [*(line[0] for line in lines[1:]), math.inf]
    return [
        (start, min(end, after) if after > start else end, text) for (start, end, text), after in zip(lines, starts)
    ]
