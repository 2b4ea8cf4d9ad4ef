"""How well an archive finds described moments, and which weights of its two channels find most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from videoclip.data.qvhighlights import read_qvhighlights
from videoclip.data.youcook2 import read_youcook2
from videoclip.errors import InputError
from videoclip.evaluation.moments import overlap
from videoclip.search.answers import Answer
from videoclip.search.archive import Archive
from videoclip.search.fusion import Fit, FusionConfig, fit
from videoclip.search.request import Request

RIGHT = 0.5  # intersection over union with a true window
LOOKED_AT = 5  # answers


@dataclass(frozen=True)
class Described:
    """A held-out description: `windows` float64 [G, 2], seconds, are where its video shows it."""

    query: str
    video_id: str
    windows: np.ndarray


def read_described(path: Path) -> list[Described]:
    """Descriptions with their moments: QVHighlights' jsonl, or YouCook2's json (its validation subset).

    Raises InputError if the file is neither, or says nowhere where the moments are.
    """
    if path.suffix.lower() == ".jsonl":
        queries = read_qvhighlights(path)
        found = [Described(q.query, q.video_id, q.windows) for q in queries if q.windows is not None]
    else:
        found = [
            Described(sentence, clip.video_id, np.array([[clip.start, clip.end]], np.float64))
            for clip in read_youcook2(path, "validation")
            if clip.end is not None
            for sentence in clip.sentences
        ]
    if not found:
        raise InputError(f"{path}: no description here has a moment to be fitted to")
    return found


def score_answers(archive: Archive, described: Sequence[Described], by: str = "both") -> dict[str, float]:
    """R@1 and R@5 in percent: a true window among the first answers of the whole archive, IoU at least 0.5."""
    requests = [Request(item.query, by, LOOKED_AT) for item in described]
    return _score(described, archive.search(requests, archive.embed([item.query for item in described])))


def _score(described: Sequence[Described], answers: Sequence[Sequence[Answer]]) -> dict[str, float]:
    firsts = []
    for item, found in zip(described, answers):
        right = [
            answer.video_id == item.video_id
            and float(overlap(np.array([answer.start, answer.end]), item.windows).max()) >= RIGHT
            for answer in found
        ]
        firsts.append(right.index(True) if True in right else LOOKED_AT)
    ranks = np.array(firsts)
    return {f"R@{k}": round(100 * float((ranks < k).mean()), 2) for k in (1, LOOKED_AT)}


def fit_fusion(archive: Archive, described: Sequence[Described]) -> Fit:
    """The weights whose answers score best, by the mean of R@1 and R@5.

    Raises InputError if none of the described videos is in the archive.
    """
    known = {video.video_id for video in archive.videos()}
    inside = [item for item in described if item.video_id in known]
    if not inside:
        raise InputError(f"none of the {len(described)} described videos is in {archive.folder}")
    if not archive.has_words:
        raise InputError(f"{archive.folder}: nothing is said in it, so that there is nothing to weigh")

    requests = [Request(item.query, "both", LOOKED_AT) for item in inside]
    texts = archive.embed([item.query for item in inside])
    ranked = archive.rank(requests, texts)  # once: weights change how ranks are joined, not the ranks

    def score(config: FusionConfig) -> float:
        archive.weigh(config)
        answers = [archive.answer(*each) for each in zip(requests, texts, ranked)]
        return float(np.mean(list(_score(inside, answers).values())))

    before = archive.fusion
    try:
        return fit(score)
    finally:
        archive.weigh(before)
