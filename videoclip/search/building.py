"""An archive grows and shrinks: what is new is embedded, what is gone is taken out, in one transaction.

Killed at any moment, the archive is as it was before, blocks that were finished are used by the next run, and
whoever searches meanwhile is answered from the generation before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from videoclip.data.captions import Captions
from videoclip.errors import InputError
from videoclip.search.store import Store, Video, window_count, window_starts
from videoclip.search.vectors import BLOCKS, KINDS, Vectors, WindowConfig
from videoclip.search.windows import WindowIndex, choose_kind
from videoclip.search.words import count_frequent, spaced

GIGABYTE = 2**30


@dataclass(frozen=True)
class NewVideo:
    """A video to be added: what it is, where its vectors are, and what is said in it."""

    video_id: str
    digest: str
    seconds: int
    duration: float
    captions: Captions
    block: str
    window_row: int
    second_row: int
    path: str = ""
    folder: str = ""
    size: int = 0
    modified: int = 0
    language: str = ""


@dataclass(frozen=True)
class Changes:
    """What a run has to do, by video id: `added` are new or changed, `removed` gone or changed."""

    added: list[str]
    removed: list[Video]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed)


def find_changes(store: Store, digests: dict[str, str]) -> Changes:
    """Compare what there is, digests by video id, with what the archive holds."""
    known = {video.video_id: video for video in store.videos()}
    added = [name for name, digest in digests.items() if name not in known or known[name].digest != digest]
    removed = [video for name, video in known.items() if digests.get(name) != video.digest]
    return Changes(added, removed)


def block_name(model_digest: str, digests: Sequence[str], config: WindowConfig) -> str:
    """A block's name says what it was made of, so that a later run can tell whether it is the one it wants."""
    text = "\n".join([model_digest, str(config), *digests])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def apply_changes(
    store: Store,
    changes: Changes,
    added: Sequence[NewVideo],
    config: WindowConfig,
    budget: float,
    texts: np.ndarray | None,
    factory: str = "",
) -> WindowIndex:
    """Bring the archive to its next generation: videos, lines, words, and the index of windows.

    `texts`: embedded descriptions [Q, H] that the index is tuned to, best the archive's own captions; `factory`: a
    Faiss index string instead of the kind that `budget` bytes of memory choose.
    Raises InputError if nothing would be left, or no index fits the budget.
    """
    before = {video.number for video in store.videos()}
    generation = store.get("generation", 0) + 1
    with store.transaction():
        old = Vectors(store.folder, [*store.videos()], config) if before else None
        for video in changes.removed:
            _remove(store, video, config)
        _add(store, added, config)
        videos = store.videos()
        if not videos:
            raise InputError("no video would be left to search")
        vectors = Vectors(store.folder, videos, config)
        index = _grown(store, old, vectors, changes, budget, factory)
        index.tune(vectors, texts)
        name = f"windows-{generation:06d}.faiss"
        store.set("index", {"file": name, **index.save(store.folder / name)})
        store.set("tuned_by", "texts" if texts is not None and len(texts) else "windows")
        store.set("generation", generation)
        store.set("windowing", {"window": config.window, "stride": config.stride})
        count_frequent(store.connection)
    _sweep(store, name)
    return index


def _grown(
    store: Store, old: Vectors | None, vectors: Vectors, changes: Changes, budget: float, factory: str
) -> WindowIndex:
    """The index with only what changed, or a new one where it has outgrown its kind or what it was trained on."""
    kind = choose_kind(len(vectors), vectors.width, budget)
    if factory:
        kind = type(kind)(factory, kind.size)
    settings = store.get("index")
    if old is None or settings is None or not (store.folder / settings["file"]).is_file():
        return WindowIndex.build(vectors, kind)
    index = WindowIndex.load(store.folder / settings["file"], settings)
    if index.outgrown(kind, len(vectors)):
        return WindowIndex.build(vectors, kind)
    gone = {video.number for video in changes.removed}
    index.remove(old.numbers_of(place for place, video in enumerate(old.videos) if video.number in gone))
    known = {video.number for video in old.videos}
    index.add(vectors, [place for place, video in enumerate(vectors.videos) if video.number not in known])
    return index


def _remove(store: Store, video: Video, config: WindowConfig) -> None:
    documents = _documents(store, video.number, video.seconds, config)
    store.connection.executemany(
        "INSERT INTO words(words, rowid, text) VALUES ('delete', ?, ?)",
        [(video.first_window + place, text) for place, text in documents],
    )
    store.connection.execute("DELETE FROM lines WHERE video = ?", (video.number,))
    store.connection.execute("DELETE FROM videos WHERE number = ?", (video.number,))


def _add(store: Store, added: Sequence[NewVideo], config: WindowConfig) -> None:
    first = store.get("next_window", 1)
    for new in added:
        cursor = store.connection.execute(
            "INSERT INTO videos(video_id, path, folder, size, modified, digest, seconds, duration, language, "
            "first_window, block, window_row, second_row) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (new.video_id, new.path, new.folder, new.size, new.modified, new.digest, new.seconds, new.duration)
            + (new.language, first, new.block, new.window_row, new.second_row),
        )
        number = cursor.lastrowid
        assert number is not None
        spoken = zip(new.captions.start.tolist(), new.captions.end.tolist(), new.captions.text)
        store.connection.executemany("INSERT INTO lines VALUES (?, ?, ?, ?)", [(number, *line) for line in spoken])
        store.connection.executemany(
            "INSERT INTO words(rowid, text) VALUES (?, ?)",
            [(first + place, text) for place, text in _documents(store, number, new.seconds, config)],
        )
        first += window_count(new.seconds, config.window, config.stride)
    store.set("next_window", first)


def _documents(store: Store, number: int, seconds: int, config: WindowConfig) -> list[tuple[int, str]]:
    """(window inside its video, words) of every window in which something is said."""
    lines = store.lines(number)
    if not lines:
        return []
    starts = window_starts(seconds, config.window, config.stride)
    begin, end = (np.array([getattr(line, name) for line in lines]) for name in ("start", "end"))
    documents = []
    for place, start in enumerate(starts.tolist()):
        inside = np.flatnonzero((begin < start + config.window) & (end > start))
        if len(inside):
            documents.append((place, spaced(" ".join(lines[i].text for i in inside))))
    return documents


def _sweep(store: Store, current: str) -> None:
    """Remove files that no generation needs any more; whoever has them open keeps what was read."""
    for path in store.folder.glob("windows-*.faiss"):
        if path.name != current:
            path.unlink(missing_ok=True)
    needed = {video.block for video in store.videos()}
    for path in (store.folder / BLOCKS).glob("*.npy"):
        if path.name.split(".")[0] not in needed and path.name.split(".")[1] in KINDS:
            path.unlink(missing_ok=True)
