"""Captions of one video: what was said when. Reading, checking and removing rolling-caption repeats."""

from __future__ import annotations

import math
import zlib
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


def captions_of_video(
    raw: object, seconds: int, video_id: str, seed: int = 0, keep_rolling_repeats: bool = False
) -> tuple[Captions, Counter[str]]:
    """What is said over a video's `seconds` tokens, freed of rolling repeats: what a shard holds, however it is made.

    No caption starts after the last token or ends behind it. The counter says how many lines were left out, by reason.
    `seed` and `video_id` decide on which side a partial repeat stays, so that every road to a shard does the same.
    Raises ValueError if `raw` is not of the form that `read_captions` takes.
    """
    captions, rejected = read_captions(raw, float(seconds))
    if not keep_rolling_repeats:
        generator = np.random.default_rng([seed, zlib.crc32(video_id.encode())])
        captions = remove_rolling_repeats(captions, generator)
    return captions, rejected


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
        times = _as_seconds(start), _as_seconds(end)
        reason = _why_unusable(*times, text, duration)
        if reason:
            rejected[reason] += 1
        else:
            kept.append((times[0], min(times[1], duration), " ".join(text.split())))
    kept.sort(key=lambda line: line[:2])
    start, end = (np.array([line[i] for line in kept], np.float32) for i in (0, 1))
    return Captions(start, end, [line[2] for line in kept]), rejected


def _as_seconds(time: Any) -> float:
    """The value as a shard will hold it, rounded to float32, so that what is checked is what is stored; else NaN."""
    if not isinstance(time, (int, float)) or not abs(time) < float(np.finfo(np.float32).max):
        return math.nan
    return float(np.float32(time))


def _why_unusable(start: float, end: float, text: Any, duration: float) -> str:
    if not isinstance(text, str):
        return "text is not a string"
    if not text.strip():
        return "text is empty"
    if not (math.isfinite(start) and math.isfinite(end)):
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
