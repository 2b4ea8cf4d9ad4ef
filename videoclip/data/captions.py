"""Captions of one video: what was said when. Reading, checking and removing rolling-caption repeats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Line = tuple[Any, Any, str]  # start, end, text as a file gives them; `read_captions` checks the times


@dataclass(frozen=True)
class Captions:
    """`start`, `end`: float32 [N], seconds; `text`: N strings. Sorted by start."""

    start: np.ndarray
    end: np.ndarray
    text: list[str]

    def __len__(self) -> int:
        return len(self.text)


NO_CAPTIONS = Captions(np.zeros(0, np.float32), np.zeros(0, np.float32), [])


def read_captions(raw: Any, duration: float = math.inf) -> tuple[Captions, Counter[str]]:
    """Turn one video's `{"start": […], "end": […], "text": […]}` into captions within [0, duration) seconds.

    Lines that cannot be used are left out; the counter says how many, by reason.
    Raises ValueError if `raw` has another form altogether.
    """
    if not isinstance(raw, dict) or not all(isinstance(raw.get(key), list) for key in ("start", "end", "text")):
        raise ValueError('captions must be {"start": [...], "end": [...], "text": [...]}')
    if not len(raw["start"]) == len(raw["end"]) == len(raw["text"]):
        raise ValueError("captions have unequal numbers of starts, ends and texts")
    rejected: Counter[str] = Counter()
    kept = []
    for start, end, text in zip(raw["start"], raw["end"], raw["text"]):
        reason = _why_unusable(start, end, text, duration)
        if reason:
            rejected[reason] += 1
        else:
            kept.append((float(start), min(float(end), duration), " ".join(text.split())))
    kept.sort(key=lambda line: line[:2])
    start, end = (np.array([line[i] for line in kept], np.float32) for i in (0, 1))
    return Captions(start, end, [line[2] for line in kept]), rejected


def _why_unusable(start: Any, end: Any, text: Any, duration: float) -> str:
    if not isinstance(text, str):
        return "text is not a string"
    if not text.strip():
        return "text is empty"
    if not all(isinstance(time, (int, float)) and math.isfinite(time) for time in (start, end)):
        return "start or end is not a number"
    if end <= start:
        return "end is not after start"
    if start < 0 or start >= duration:
        return "outside the video"
    return ""


def remove_rolling_repeats(captions: Captions, generator: np.random.Generator) -> Captions:
    """Undo what rolling captions repeat (the rules of the public release's caption deduplication).

    A line contained in the tail of its predecessor is merged into it; a line that begins with all of its
    predecessor replaces it; a partial overlap (the predecessor's last words are the line's first) stays on one
    side, at random. Times are kept, so that a merged line spans both.
    """
    lines: list[tuple[float, float, list[str]]] = []
    for start, end, text in zip(captions.start, captions.end, captions.text):
        words = text.split()
        if lines:
            previous_start, previous_end, previous = lines[-1]
            if previous[-len(words) :] == words:
                lines[-1] = (previous_start, max(previous_end, end), previous)
                continue
            if words[: len(previous)] == previous:
                lines[-1] = (previous_start, max(previous_end, end), words)
                continue
            shared = _overlap(previous, words)
            if shared and generator.random() < 0.5:
                lines[-1] = (previous_start, previous_end, previous[:-shared])
            else:
                words = words[shared:]
        lines.append((start, end, words))
    start, end = (np.array([line[i] for line in lines], np.float32) for i in (0, 1))
    return Captions(start, end, [" ".join(line[2]) for line in lines])


def _overlap(previous: Sequence[str], words: Sequence[str]) -> int:
    """How many of the last words of `previous` are the first of `words`, less than all of either."""
    for count in range(min(len(previous), len(words)) - 1, 0, -1):
        if list(previous[-count:]) == list(words[:count]):
            return count
    return 0
