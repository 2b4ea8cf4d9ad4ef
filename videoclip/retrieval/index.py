"""Nearest neighbours by cosine, on Faiss: exact for small sets, inverted lists for large ones; on a GPU if it can."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from videoclip.errors import InputError

BLOCK = 65536  # rows of a memory-mapped array that are read at once
EXACT_BELOW = 50_000  # rows; exact search over fewer takes milliseconds
PLAIN_BELOW = 2**32  # bytes of float32; above, rows are kept as one byte a number
COARSE_BELOW = 2**36  # bytes of float32; above, as one byte for every eight numbers
SAMPLE = 16384  # rows, at least, that inverted lists are fitted to
QUERIES = 256  # of the rows themselves, that the number of probed lists is tuned with
FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")
RECALL, RECALL_AT = 0.95, 64  # what the number of probed lists is raised for


@cache
def load_faiss() -> ModuleType:
    """The module `faiss`, which two packages own: `faiss-cpu` and `faiss-gpu`.

    Raises InputError if neither is installed, or both, which overwrite each other's files.
    """
    owners = [name for name in FAISS_PACKAGES if _is_installed(name)]
    if len(owners) > 1:
        raise InputError(
            f"{' and '.join(owners)} are both installed and overwrite each other; "
            f"pip uninstall {' '.join(owners)}, then install 'videoclip[cpu]' or 'videoclip[gpu]'"
        )
    try:
        return import_module("faiss")
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise
        raise InputError(
            "Faiss is not installed; run: pip install 'videoclip[cpu]', or 'videoclip[gpu]' for an NVIDIA GPU"
        ) from None


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


@dataclass
class SimilarityIndex:
    """A Faiss index over unit vectors; inner products are cosines. `description` says what was built."""

    index: Any
    description: str
    _searched: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._searched = on_gpu(self.index)

    @classmethod
    def build(
        cls, embeddings: np.ndarray, factory: str = "", queries: np.ndarray | None = None, asked_with: str = "texts"
    ) -> SimilarityIndex:
        """Index all rows of float [N, H], which may be memory-mapped. Zero rows are similar to nothing.

        `factory` is a Faiss index string such as "IVF4096,Flat"; by default `choose_index` picks one. Where there are
        inverted lists, the number probed is raised until 64 neighbours of a sample are found with recall 0.95. The
        sample is `queries`, float [Q, H]: some hundreds of what will be searched for, where that is not rows of the
        same kind. Texts lie elsewhere than pictures, and need more lists. `asked_with` names them in the description.
        Raises InputError if Faiss cannot make such an index of these rows.
        """
        faiss = load_faiss()

        count, width = embeddings.shape
        kind = factory or choose_index(count, width)
        try:
            index = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                lists = getattr(faiss.try_extract_index_ivf(index), "nlist", 1)
                step = max(1, count // max(40 * lists, SAMPLE))
                index.train(unit_rows(embeddings, np.arange(0, count, step)))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].rpartition(": ")[2]
            raise InputError(f"Faiss cannot build {kind!r} over {count} x {width}: {reason}") from None
        for first in range(0, count, BLOCK):
            index.add(unit_rows(embeddings, np.arange(first, min(first + BLOCK, count))))
        described = f"{kind} over {count} x {width}" + (", exact" if kind == "Flat" else "")
        inverted = faiss.try_extract_index_ivf(index)
        if inverted is not None:
            described += f": {_tune_probes(index, inverted, embeddings, queries, asked_with)}"
        built = cls(index, described)
        where = "the CPU" if built._searched is index else "a GPU"
        logging.getLogger(__name__).info("similarity index on %s: %s", where, described)
        return built

    def save(self, path: Path) -> None:
        """Write the index to a file."""
        faiss = load_faiss()

        faiss.write_index(self.index, str(path))

    @classmethod
    def load(cls, path: Path, description: str) -> SimilarityIndex:
        """Read what `save` wrote. Faiss trusts its files: check where one comes from before reading it."""
        faiss = load_faiss()

        return cls(faiss.read_index(str(path)), description)

    def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 [Q, H] -> cosines float32 [Q, count] and rows int64 [Q, count], best first; -1 where none is left."""
        return self._searched.search(np.ascontiguousarray(queries, np.float32), count)

    def search_all(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, with all inverted lists probed, on the CPU: slow, for the few queries that need it."""
        faiss = load_faiss()

        inverted = faiss.try_extract_index_ivf(self.index)
        if inverted is None:
            return self.search(queries, count)
        probed, inverted.nprobe = inverted.nprobe, inverted.nlist
        try:
            return self.index.search(np.ascontiguousarray(queries, np.float32), count)
        finally:
            inverted.nprobe = probed


def choose_index(count: int, width: int) -> str:
    """The Faiss index string for `count` rows of `width` numbers: exact, plain lists, or lists of shortened rows."""
    if count < EXACT_BELOW:
        return "Flat"
    lists = int(4 * np.sqrt(count))
    size = 4 * count * width
    if size < PLAIN_BELOW:
        return f"IVF{lists},Flat"
    return f"IVF{lists},SQ8" if size < COARSE_BELOW or width % 8 else f"IVF{lists},PQ{width // 8}"


def on_gpu(index: Any) -> Any:
    """A copy of an exact or inverted-list index on the first GPU, if Faiss is built for one; else the index itself."""
    faiss = load_faiss()

    known = isinstance(index, (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ))
    if not known or not faiss.get_num_gpus():
        return index
    copy: Any = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    if hasattr(index, "nprobe"):
        copy.nprobe = index.nprobe
    return copy


def _tune_probes(index: Any, inverted: Any, embeddings: np.ndarray, queries: np.ndarray | None, asked_with: str) -> str:
    """Double the number of probed lists until RECALL is reached; returns what was probed and reached, in words.

    Tuned with `queries`, or with evenly spaced rows; the recall of those rows is told either way.
    """
    rows = np.linspace(0, len(embeddings) - 1, QUERIES).astype(np.int64)
    of_rows = unit_rows(embeddings, rows)
    asked = of_rows if queries is None else unit(np.asarray(queries, np.float32))
    reached = _Recall(index, inverted, asked)
    probes = 1
    while reached.at(probes) < RECALL and probes < inverted.nlist:
        probes = min(2 * probes, inverted.nlist)
    recalls = [] if queries is None else [f"{reached.at(probes):.3f} of {len(asked)} {asked_with}"]
    recalls.append(f"{_Recall(index, inverted, of_rows).at(probes):.3f} of {len(of_rows)} rows")
    inverted.nprobe = probes
    return f"{probes} of {inverted.nlist} inverted lists probed, recall@{RECALL_AT} {', '.join(recalls)}"


class _Recall:
    """Recall at RECALL_AT of some queries, by the number of probed lists.

    The truth is the index's own answer with all lists probed: what shortened rows lose is not counted. Any row with
    the score of the last true one is right: among equals it is chance which are named.
    """

    def __init__(self, index: Any, inverted: Any, queries: np.ndarray) -> None:
        self.index, self.inverted = index, inverted
        self.queries = np.ascontiguousarray(queries)
        self.count = min(RECALL_AT, index.ntotal)
        inverted.nprobe = inverted.nlist
        self.lowest = index.search(self.queries, self.count)[0][:, -1:] - 1e-6  # [Q, 1]

    def at(self, probes: int) -> float:
        """The recall with `probes` lists."""
        self.inverted.nprobe = probes
        scores, found = self.index.search(self.queries, self.count)
        return float(((found >= 0) & (scores >= self.lowest)).mean())


def unit_rows(embeddings: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Chosen rows as float32 of unit length; zero rows stay zero."""
    return unit(np.asarray(embeddings[rows], np.float32))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows [N, H] scaled to unit length; zero rows stay zero."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def finite_rows(embeddings: np.ndarray) -> np.ndarray:
    """int64: numbers of the rows that hold no NaN and no infinity, read block by block."""
    good = [
        first + np.flatnonzero(np.isfinite(embeddings[first : first + BLOCK]).all(1))
        for first in range(0, len(embeddings), BLOCK)
    ]
    return np.concatenate([np.zeros(0, np.int64), *good])
