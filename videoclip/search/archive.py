"""An archive that answers: pictures and words searched together, moments with their ends, the lines said in them."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from videoclip.embedding import embed_texts
from videoclip.errors import InputError
from videoclip.evaluation.localization import (
    LocalizationConfig,
    candidate_windows,
    excess_over_threshold,
    suppress_overlaps,
)
from videoclip.retrieval.index import unit
from videoclip.search.answers import Answer
from videoclip.search.fusion import Fused, FusionConfig, fuse
from videoclip.search.request import Filter, Request
from videoclip.search.store import Line, Store, Video
from videoclip.search.vectors import Vectors, WindowConfig
from videoclip.search.windows import WindowIndex
from videoclip.search.words import WordSearch

if TYPE_CHECKING:
    from videoclip.embedding import TwoTowers

PER_CHANNEL = 100  # windows a channel hands to fusion, or more for many answers
AROUND = 90  # seconds to either side of a window in which the ends of its moment are looked for


@dataclass(frozen=True)
class Generation:
    """What one generation of the archive needs in memory."""

    number: int
    vectors: Vectors
    index: WindowIndex
    by_number: dict[int, int]
    spoken: np.ndarray
    """bool, by place of a video: whether anything is said in it."""
    fusion: FusionConfig

    @property
    def has_words(self) -> bool:
        """Whether anything is said in the archive."""
        return bool(self.spoken.any())


class Archive:
    """The index folder that `videoclip index` keeps, open for searching; follows it when it grows.

    Many threads may search at once. Raises InputError if there is no index, it is damaged, or `model_digest` (SHA-256
    of the model's weights) is another's.
    """

    def __init__(self, folder: Path, model: TwoTowers | None = None, model_digest: str = "") -> None:
        self.folder = Path(folder)
        self.model = model
        self._local = threading.local()
        self._lock = threading.Lock()
        store = self._store()
        if not store.get("generation", 0):
            raise InputError(f"{self.folder}: holds no finished index yet; run `videoclip index` to the end")
        made_by = store.get("model")
        if model_digest and made_by != model_digest:
            raise InputError(f"{self.folder}: was made by another model; run `videoclip index` with this one")
        windowing = store.get("windowing")
        self.windowing = WindowConfig(windowing["window"], windowing["stride"])
        self._generation = self._load()

    # --- Answers --------------------------------------------------------------------------------------------------

    def search(self, requests: Sequence[Request], texts: np.ndarray | None = None) -> list[list[Answer]]:
        """Answer several requests at once, best answers first. `texts`: the queries' vectors, if they are known."""
        if texts is None:
            texts = self.embed([request.query for request in requests])
        return [self.answer(r, text, ranked) for r, text, ranked in zip(requests, texts, self.rank(requests, texts))]

    def rank(self, requests: Sequence[Request], texts: np.ndarray) -> list[dict[str, Sequence[int]]]:
        """Windows by channel, best first, for each request; `texts`: the queries' vectors [Q, H]."""
        now = self.current()
        pictures = self._ranked_by_picture(now, requests, texts)
        ranked: list[dict[str, Sequence[int]]] = []
        for request, picture in zip(requests, pictures):
            ranked.append({"picture": picture} if request.by != "words" else {})
            if request.by != "picture" and (now.has_words or request.by == "words"):
                ranked[-1]["words"] = self._ranked_by_words(now, request)
        return ranked

    def answer(self, request: Request, text: np.ndarray, ranked: dict[str, Sequence[int]]) -> list[Answer]:
        """The moments of a request whose windows were ranked, both channels fused."""
        now = self.current()
        config = now.fusion if request.by == "both" else FusionConfig(1, 1, now.fusion.k)
        numbers = np.array(ranked.get("picture", ()), np.int64)
        places, _ = now.vectors.places(numbers)
        silent = numbers[(places >= 0) & ~now.spoken[places]]
        return self._moments(now, request, text, fuse(ranked, config, set(silent.tolist())))

    def embed(self, queries: Sequence[str]) -> np.ndarray:
        """Unit vectors of queries, float32 [Q, H]."""
        if self.model is None:
            raise InputError("the archive was opened without its model, so that it cannot read a query")

        return unit(embed_texts(self.model, queries))

    def like(self, number: int, start: float, end: float, count: int = 10) -> list[Answer]:
        """Moments of other places that look like [start, end) of a video, by picture alone."""
        now = self.current()
        place = self._place(now, number)
        text = self._mean_of(now, place, start, end)
        ((numbers, _),) = now.index.search(text[None], PER_CHANNEL + count, now.vectors)
        places, begins, ends = now.vectors.spans(numbers)
        itself = (places == place) & (begins < end) & (ends > start)
        fused = fuse({"picture": numbers[~itself].tolist()})
        return self._moments(now, Request("-", "picture", count), text, fused, refined=False)

    def curve(self, number: int, query: str) -> tuple[np.ndarray, list[tuple[float, float, float]]]:
        """Similarity of a query with every second of a video, float32 [T], and its moments (start, end, score)."""
        now = self.current()
        curve = self._curve(now, self._place(now, number), self.embed([query])[0])
        config = LocalizationConfig()
        windows = candidate_windows(len(curve), config)
        scores = excess_over_threshold(curve[None], windows, config.threshold)[0]
        kept = suppress_overlaps(windows, scores, 0.0, keep=5)
        return curve, [(float(windows[i, 0]), float(windows[i, 1]), float(scores[i])) for i in kept if scores[i] > 0]

    def transcript(self, number: int) -> list[Line]:
        """What is said in a video."""
        self.video(number)
        return self._store().lines(number)

    def video(self, number: int) -> Video:
        """One video by its number.

        Raises InputError if there is none.
        """
        now = self.current()
        return now.vectors.videos[self._place(now, number)]

    def videos(self) -> list[Video]:
        """All videos."""
        return self.current().vectors.videos

    @property
    def has_words(self) -> bool:
        """Whether anything is said in the archive."""
        return self.current().has_words

    @property
    def fusion(self) -> FusionConfig:
        """The weights that answers are fused with."""
        return self.current().fusion

    def weigh(self, config: FusionConfig) -> None:
        """Fuse with other weights from now on, in this process."""
        self._generation = replace(self.current(), fusion=config)

    # --- The generation -------------------------------------------------------------------------------------------

    def current(self) -> Generation:
        """The generation that the folder holds now; read again when a run has finished one."""
        if self._store().get("generation", 0) == self._generation.number:
            return self._generation
        if self._lock.acquire(blocking=False):  # one thread reads; the others answer from what they have
            try:
                self._generation = self._load()
            finally:
                self._lock.release()
        return self._generation

    def _load(self, attempts: int = 3) -> Generation:
        store = self._store()
        while True:
            store.connection.execute("BEGIN")
            try:
                return self._load_snapshot(store)
            except (InputError, RuntimeError, OSError) as error:
                attempts -= 1  # a run that finishes in this moment removes files of the generation before
                if not attempts:
                    raise InputError(f"{self.folder}: is damaged ({error}); run `videoclip index` again") from None
            finally:
                store.connection.execute("COMMIT")

    def _load_snapshot(self, store: Store) -> Generation:
        settings = store.get("index")
        path = self.folder / settings["file"]
        if not path.is_file():
            raise InputError(f"{path.name} is missing")
        vectors = Vectors(self.folder, store.videos(), self.windowing)
        index = WindowIndex.load(path, settings)
        if len(index) != len(vectors):
            raise InputError(f"{path.name} holds {len(index)} windows where the archive has {len(vectors)}")
        return Generation(
            store.get("generation"),
            vectors,
            index,
            {video.number: place for place, video in enumerate(vectors.videos)},
            np.isin([video.number for video in vectors.videos], list(store.spoken())),
            FusionConfig(**store.get("fusion", {})),
        )

    def _store(self) -> Store:
        if not hasattr(self._local, "store"):
            self._local.store = Store(self.folder)
            self._local.words = WordSearch(self._local.store.connection)
        return self._local.store

    def _words(self) -> WordSearch:
        self._store()
        return self._local.words

    def _place(self, now: Generation, number: int) -> int:
        if number not in now.by_number:
            raise InputError(f"the archive has no video number {number}; it may have been removed")
        return now.by_number[number]

    # --- Finding --------------------------------------------------------------------------------------------------

    def _ranked_by_picture(self, now: Generation, requests: Sequence[Request], texts: np.ndarray) -> list[list[int]]:
        """Windows of each request by cosine. Requests without a filter are searched together."""
        ranked: list[list[int]] = [[] for _ in requests]
        groups: dict[Any, list[int]] = {}
        for place, request in enumerate(requests):
            if request.by != "words":
                groups.setdefault(request.where, []).append(place)
        for where, places in groups.items():
            count = max(PER_CHANNEL, *(8 * requests[place].count for place in places))
            allowed = None if where == Filter() else self._allowed(now, where)
            if allowed is not None and not len(allowed):
                continue
            found = now.index.search(texts[places], count, now.vectors, allowed)
            for place, (numbers, _) in zip(places, found):
                ranked[place] = numbers.tolist()
        return ranked

    def _allowed(self, now: Generation, where: Filter) -> np.ndarray:
        return now.vectors.numbers_of(i for i, video in enumerate(now.vectors.videos) if where.passes(video))

    def _ranked_by_words(self, now: Generation, request: Request) -> list[int]:
        wanted = max(PER_CHANNEL, 8 * request.count)
        filtered = request.where != Filter()
        try:
            found = self._words().search(request.query, wanted * (20 if filtered else 1))
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self.folder}: its words are damaged ({error}); run `videoclip index` anew") from None
        numbers = np.array([window for window, _ in found], np.int64)
        places, _ = now.vectors.places(numbers)
        keep = [
            number
            for number, place in zip(numbers.tolist(), places.tolist())
            if place >= 0 and (not filtered or request.where.passes(now.vectors.videos[place]))
        ]
        return keep[:wanted]

    def _moments(
        self, now: Generation, request: Request, text: np.ndarray, fused: list[Fused], refined: bool = True
    ) -> list[Answer]:
        """The best windows as moments: refined, no two of one place, with the line said."""
        numbers = np.array([item.window for item in fused], np.int64)
        places, starts, ends = now.vectors.spans(numbers)
        answers: list[Answer] = []
        taken: dict[int, list[tuple[float, float]]] = {}
        for item, place, start, end in zip(fused, places.tolist(), starts.tolist(), ends.tolist()):
            before = taken.setdefault(place, [])
            if place < 0 or (request.one_a_video and before) or any(a < end and start < b for a, b in before):
                continue
            anchor = self._anchor(now, request, place, item, start, end)
            moment = self._refine(now, place, text, *anchor) if refined else anchor
            if any(a < moment[1] and moment[0] < b for a, b in before):
                continue  # refined, it is one that was found already
            before.append(moment)
            channels = _channels(item, fused, places, starts, ends, place, moment)
            answers.append(self._as_answer(now, request, text, place, moment, (start, end), item, channels))
            if len(answers) == request.count:
                break
        return answers

    def _anchor(
        self, now: Generation, request: Request, place: int, item: Fused, start: int, end: int
    ) -> tuple[float, float]:
        """What a moment has to overlap: its window, or of one that was only heard the line that says most of it."""
        if "picture" in item.ranks:
            return float(start), float(end)
        number = now.vectors.videos[place].number
        line = self._words().best_line(self._store().lines(number, start, end), request.query, start, end)
        return (line.start, line.end) if line else (float(start), float(end))

    def _refine(self, now: Generation, place: int, text: np.ndarray, start: float, end: float) -> tuple[float, float]:
        """Begin and end of the moment that lies around [start, end): the localiser's best that overlaps it."""
        low = max(0, int(start) - AROUND)
        curve = self._curve(now, place, text)[low : int(end) + AROUND]
        config = LocalizationConfig()
        windows = _candidates(len(curve))
        windows = windows[(windows[:, 0] + low < end) & (windows[:, 1] + low > start)]
        scores = excess_over_threshold(curve[None], windows, config.threshold)[0]
        best = int(scores.argmax())
        if not scores[best] > 0:
            return float(start), float(end)
        return float(windows[best, 0] + low), float(windows[best, 1] + low)

    def _curve(self, now: Generation, place: int, text: np.ndarray) -> np.ndarray:
        return now.vectors.seconds_of(place).astype(np.float32) @ text

    def _mean_of(self, now: Generation, place: int, start: float, end: float) -> np.ndarray:
        """float32 [H], unit: the mean of the windows of a video that lie in [start, end), or of the nearest one."""
        numbers = now.vectors.numbers_of([place])
        _, begins, ends = now.vectors.spans(numbers)
        inside = np.minimum(ends, end) - np.maximum(begins, start)
        chosen = numbers[inside >= min(inside.max(), 0.5 * self.windowing.window)]
        return unit(now.vectors.windows(chosen).mean(0, keepdims=True))[0]

    def _as_answer(
        self,
        now: Generation,
        request: Request,
        text: np.ndarray,
        place: int,
        moment: tuple[float, float],
        window: tuple[int, int],
        item: Fused,
        channels: dict[str, int],
    ) -> Answer:
        video = now.vectors.videos[place]
        line = None
        if now.has_words:
            span = (min(moment[0], window[0]), max(moment[1], window[1]))
            line = self._words().best_line(self._store().lines(video.number, *span), request.query, *span)
        score = float(now.vectors.windows(np.array([item.window]))[0] @ text)
        return Answer(
            video.number,
            video.video_id,
            video.path,
            video.folder,
            moment[0],
            min(moment[1], max(video.duration, moment[0] + 0.1)),
            round(score, 4),
            channels,
            line.text if line else "",
            line.start if line else 0.0,
            video.duration,
            float(window[0]),
            float(window[1]),
            video.state(),
        )


def _channels(
    item: Fused,
    fused: list[Fused],
    places: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    place: int,
    moment: tuple[float, float],
) -> dict[str, int]:
    """Which channels found a moment, and their best rank: also by another window that lies in it."""
    ranks = dict(item.ranks)
    touching = (places == place) & (starts < moment[1]) & (ends > moment[0])
    for other in np.flatnonzero(touching).tolist():
        for channel, rank in fused[other].ranks.items():
            ranks[channel] = min(rank, ranks.get(channel, rank))
    return dict(sorted(ranks.items()))


@lru_cache(maxsize=2 * AROUND + 64)
def _candidates(seconds: int) -> np.ndarray:
    """int64 [W, 2]: where a moment may begin and end, counted once for every length."""
    return candidate_windows(seconds, LocalizationConfig())
