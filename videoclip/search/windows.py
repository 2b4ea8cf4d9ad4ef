"""The nearest windows of a query: a Faiss index that grows and shrinks, of a kind that fits a budget of memory.

What Faiss proposes from shortened vectors is scored again with the stored ones, so that scores are cosines and little
is lost. How many inverted lists are probed is set by texts, not by windows: descriptions lie elsewhere in the space
than pictures do, and an index tuned by pictures finds four in five of what it promises (docs/search.md).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.errors import InputError
from videoclip.files import atomic_path
from videoclip.retrieval.index import EXACT_BELOW, load_faiss, unit
from videoclip.search.vectors import Vectors

RECALL, RECALL_AT = 0.95, 10  # what the number of probed lists is raised for
PROPOSED = 10  # windows that Faiss proposes, for each that is wanted, to be scored again
TRAINING_ROWS = 40  # for each inverted list; Faiss asks for 39
GROWN = 2.0  # an index is trained anew when it holds this many times the windows it was trained on
TUNING_TEXTS = 256
PARAMETERS = ("SearchParameters", "SearchParametersIVF")


@dataclass(frozen=True)
class Kind:
    """A Faiss index string, and about how many bytes of memory the index takes."""

    factory: str
    size: int


def choose_kind(count: int, width: int, budget: float) -> Kind:
    """The most exact kind of index for `count` windows of `width` numbers that fits `budget` bytes.

    Exact search over few; else inverted lists of plain vectors, of one byte a number, of one byte for 2, 4 or 8.
    Raises InputError if even the smallest does not fit.
    """
    if count < EXACT_BELOW and 4 * count * width <= budget:
        return Kind("Flat", 4 * count * width)
    lists = max(1, int(4 * np.sqrt(count)))
    overhead = 8 * count + 4 * lists * width  # numbers of the windows, and the lists' centres
    kinds = [(f"IVF{lists},Flat", 4 * width), (f"IVF{lists},SQ8", width)]
    kinds += [(f"IVF{lists},PQ{width // per}", width // per) for per in (2, 4, 8) if width % per == 0]
    for factory, row in kinds:
        if count * row + overhead <= budget:
            return Kind(factory, count * row + overhead)
    least = (count * kinds[-1][1] + overhead) / 2**30
    raise InputError(f"{count} windows need at least {least:.2f} GB of memory; raise --memory")


class WindowIndex:
    """A Faiss index by window number. `trained_on`: how many windows it was fitted to; `recall`: of what it answers.

    `recall` is that of texts against exact search, or of windows where the archive has no captions to ask with.
    """

    def __init__(self, index: Any, factory: str, trained_on: int, recall: float = 1.0) -> None:
        self.index = index
        self.factory = factory
        self.trained_on = trained_on
        self.recall = recall

    @classmethod
    def build(cls, vectors: Vectors, kind: Kind) -> WindowIndex:
        """Train on a sample and add every window."""
        faiss = load_faiss()

        count = len(vectors)
        try:
            index = faiss.index_factory(vectors.width, kind.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].rpartition(": ")[2]
            raise InputError(f"Faiss cannot build {kind.factory!r}: {reason}") from None
        if not index.is_trained:
            lists = faiss.extract_index_ivf(index).nlist
            every = max(1, count // max(TRAINING_ROWS * lists, 16384))
            sample = np.sort(np.random.default_rng(0).permutation(len(vectors.videos))[::every])
            index.train(unit(np.concatenate([rows for _, rows in vectors.pieces(sample.tolist())])))
        else:
            index = faiss.IndexIDMap(index)
        made = cls(index, kind.factory, count)
        made.add(vectors, range(len(vectors.videos)))
        return made

    @classmethod
    def load(cls, path: Path, settings: dict[str, Any]) -> WindowIndex:
        """Read what `save` wrote. Faiss trusts its files: check where one comes from before reading it."""
        faiss = load_faiss()

        made = cls(faiss.read_index(str(path)), settings["factory"], settings["trained_on"], settings["recall"])
        if settings["probes"]:
            made._lists().nprobe = settings["probes"]
        return made

    def save(self, path: Path) -> dict[str, Any]:
        """Write the index to a file; returns what `load` needs besides."""
        faiss = load_faiss()

        with atomic_path(path) as temporary:
            faiss.write_index(self.index, str(temporary))
        lists = self._lists()
        return {
            "factory": self.factory,
            "trained_on": self.trained_on,
            "recall": self.recall,
            "probes": int(lists.nprobe) if lists is not None else 0,
        }

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def add(self, vectors: Vectors, places: Any) -> None:
        """Add all windows of the videos at some places of `vectors.videos`."""
        for numbers, rows in vectors.pieces(places):
            self.index.add_with_ids(unit(rows), numbers)

    def remove(self, numbers: np.ndarray) -> None:
        """Take windows out."""
        if len(numbers):
            self.index.remove_ids(np.asarray(numbers, np.int64))

    def outgrown(self, kind: Kind, count: int) -> bool:
        """Whether an index of `count` windows should rather be made anew than grown."""
        return kind.factory.split(",")[1:] != self.factory.split(",")[1:] or (
            kind.factory != "Flat" and not self.trained_on / GROWN <= count <= GROWN * self.trained_on
        )

    def search(
        self, queries: np.ndarray, count: int, vectors: Vectors, allowed: np.ndarray | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Unit queries float32 [Q, H] -> windows int64 [N] and their cosines float32 [N], best first, for each.

        N is at most `count`. `allowed`: numbers of the only windows that may answer.
        """
        faiss = load_faiss()

        wanted = min(PROPOSED * count if self._shortened else count, max(len(self), 1))
        options: dict[str, Any] = {}
        if allowed is not None:
            # Their real constructors take names, which the stubs of Faiss do not know.
            parameters, parameters_of_lists = (getattr(faiss, name) for name in PARAMETERS)
            selector = faiss.IDSelectorBatch(allowed)
            lists = self._lists()
            # Few windows may lie in lists that would not be probed: with a filter all of them are.
            few = lists is not None and len(allowed) < 0.2 * len(self)
            options["params"] = (
                parameters_of_lists(sel=selector, nprobe=lists.nlist if few else lists.nprobe)
                if lists is not None
                else parameters(sel=selector)
            )
        scores, numbers = self.index.search(np.ascontiguousarray(queries, np.float32), wanted, **options)
        return [self._score_again(q, s, n, count, vectors) for q, s, n in zip(queries, scores, numbers)]

    def _score_again(
        self, query: np.ndarray, scores: np.ndarray, numbers: np.ndarray, count: int, vectors: Vectors
    ) -> tuple[np.ndarray, np.ndarray]:
        there = numbers >= 0
        numbers, scores = numbers[there], scores[there]
        if self.factory != "Flat":
            scores = vectors.windows(numbers) @ query
        place, _ = vectors.places(numbers)
        numbers, scores = numbers[place >= 0], scores[place >= 0]  # gone since the index was read
        order = np.argsort(-scores, kind="stable")[:count]
        return numbers[order], scores[order]

    def tune(self, vectors: Vectors, texts: np.ndarray | None) -> None:
        """Probe as few lists as questions need to find ten windows with recall 0.95, to an eighth; note the recall.

        Questions are made of what is said in the archive, `texts` [Q, H]. The truth is exact search over the stored
        vectors.
        """
        lists = self._lists()
        if lists is None:
            self.recall = 1.0
            return
        queries = _questions(texts) if texts is not None and len(texts) else _some_windows(vectors)
        truth = exact_search(queries, vectors, RECALL_AT)
        low, probes = 0, 1  # too few, and perhaps enough
        self.recall = self._recall_with(probes, queries, truth, vectors)
        while self.recall < RECALL and probes < lists.nlist:
            low, probes = probes, min(2 * probes, lists.nlist)
            self.recall = self._recall_with(probes, queries, truth, vectors)
        while self.recall >= RECALL and probes - low > max(1, probes // 8):  # every list costs each query
            middle = (low + probes) // 2
            recall = self._recall_with(middle, queries, truth, vectors)
            if recall >= RECALL:
                probes, self.recall = middle, recall
            else:
                low = middle
        lists.nprobe = probes
        logging.getLogger(__name__).info("%s: %d of %d lists probed", self.factory, probes, lists.nlist)

    def _recall_with(self, probes: int, queries: np.ndarray, truth: np.ndarray, vectors: Vectors) -> float:
        """What share of `truth` [Q, RECALL_AT] is found with so many lists, which stay set."""
        self._lists().nprobe = probes
        found = self.search(queries, RECALL_AT, vectors)
        return float(np.mean([len(np.intersect1d(a, b[0])) / len(a) for a, b in zip(truth, found)]))

    def described(self, by: str) -> str:
        """One line: kind, probed lists, and the recall that was measured, `by` texts or windows."""
        lists = self._lists()
        if lists is None:
            return f"exact search over {len(self)} windows"
        return (
            f"{self.factory} over {len(self)} windows, {lists.nprobe} of {lists.nlist} lists probed, "
            f"recall@{RECALL_AT} of {by} {self.recall:.3f}"
        )

    @property
    def _shortened(self) -> bool:
        """Whether the index holds less than the vectors, so that it can only propose."""
        return self.factory.rpartition(",")[2] != "Flat"

    def _lists(self) -> Any:
        faiss = load_faiss()

        return faiss.try_extract_index_ivf(self.index)


def _questions(texts: np.ndarray) -> np.ndarray:
    """Unit rows half way between two of the texts: nobody asks in the words of a caption, which lie right among their
    own windows and need far fewer lists."""
    rows = unit(texts)
    return unit(rows + np.roll(rows, len(rows) // 2, 0))


def exact_search(queries: np.ndarray, vectors: Vectors, count: int) -> np.ndarray:
    """int64 [Q, count]: the truly nearest windows of unit queries [Q, H], read piece by piece."""
    best_scores = np.full((len(queries), 0), 0, np.float32)
    best = np.zeros((len(queries), 0), np.int64)
    for numbers, rows in vectors.pieces(range(len(vectors.videos))):
        scores = np.concatenate([best_scores, queries @ rows.T], 1)
        numbers = np.concatenate([best, np.broadcast_to(numbers, (len(queries), len(numbers)))], 1)
        keep = min(count, scores.shape[1])
        top = np.argpartition(-scores, keep - 1, 1)[:, :keep]
        best_scores, best = np.take_along_axis(scores, top, 1), np.take_along_axis(numbers, top, 1)
    order = np.argsort(-best_scores, 1, kind="stable")
    return np.take_along_axis(best, order, 1)


def _some_windows(vectors: Vectors) -> np.ndarray:
    numbers = vectors.numbers_of(np.unique(np.linspace(0, len(vectors.videos) - 1, TUNING_TEXTS).astype(int)).tolist())
    return unit(vectors.windows(numbers[:: max(1, len(numbers) // TUNING_TEXTS)]))
