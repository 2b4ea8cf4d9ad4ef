"""`videoclip index`: an archive that can be searched, kept up to date with a folder of shards or of videos.

The folder holds `archive.sqlite` (videos, lines, words), `windows-N.faiss`, and `blocks/` of vectors. A run embeds
what is new or changed, takes out what is gone, and ends with one transaction; killed before that it has changed
nothing, and the next run uses the blocks it finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.ray_session import ray_session, run_tasks
from pipelines.runs import Quarantine, start_run, with_absolute_paths, writes_output
from pipelines.video_files import videos_by_id
from videoclip.data.captions import NO_CAPTIONS, Captions
from videoclip.data.shards import Shards
from videoclip.data.subtitle_files import BESIDE, SubtitleFiles
from videoclip.data.video import probe
from videoclip.embedding import embed_texts
from videoclip.errors import InputError
from videoclip.evaluation.inputs import load_model_and_shards, open_model
from videoclip.files import read_json, write_json
from videoclip.recipes import from_pretrained
from videoclip.retrieval.index import load_faiss
from videoclip.search.archive import Archive
from videoclip.search.building import (
    GIGABYTE,
    Changes,
    NewVideo,
    apply_changes,
    block_name,
    find_changes,
)
from videoclip.search.fitting import fit_fusion, read_described
from videoclip.search.store import Store, window_count
from videoclip.search.vectors import BLOCKS, WindowConfig, block_finished, write_block

VIDEOS_PER_BLOCK = 64
TUNING_TEXTS = 256


@dataclass(frozen=True)
class IndexConfig:
    """Make videos searchable by picture and by word. Run it again after videos came, went or changed."""

    model: Path
    """Folder of a trained model; or `frozen`: the two-tower model that made the shards, with no training at all."""
    shards: Path | None = None
    """Folder that `videoclip extract` wrote; its captions are the words."""
    videos: Path | None = None
    """Folder of the video files, for playing them; without --shards they are read and encoded here."""
    output: Path = Path("runs/index")
    captions: str | None = None
    """What is said: beside, a folder of subtitles, or a file; left out, that of the shards, or beside the videos."""
    language: str = ""
    """Two letters, where videos have subtitles in several languages."""
    window: int = 8
    """Seconds of an indexed window; a shorter video is one window."""
    stride: int = 4
    """Seconds between the starts of two windows."""
    memory: float = 2.0
    """GB that the index of windows may take in memory; chooses how exact it is."""
    faiss_index: str = ""
    """A Faiss index string such as IVF4096,SQ8, in place of the one that --memory chooses."""
    fit: Path | None = None
    """Held-out descriptions with their moments (QVHighlights' jsonl, YouCook2's json): fit the channels' weights."""
    address: str | None = None
    """Ray cluster to join; without it Ray runs on this machine."""


@dataclass(frozen=True)
class Source:
    """Where one video's tokens come from: a row of the shards, or its file. `digest` changes when they do."""

    video_id: str
    digest: str
    row: int = -1
    path: str = ""

    @property
    def pictures(self) -> str:
        """The part of the digest that the vectors depend on; behind the bar is what the words do."""
        return self.digest.partition("|")[0]


@writes_output
def build_index(config: IndexConfig) -> None:
    """Run the stage.

    Raises InputError if model, shards and index do not fit each other, or the options make no windows.
    """
    load_faiss()  # before all videos are embedded for an index that cannot be made
    config = with_absolute_paths(config)
    if config.shards is None and config.videos is None:
        raise InputError("give --shards, a folder that `videoclip extract` wrote, or --videos, a folder of videos")
    windowing = WindowConfig(config.window, config.stride)
    model, digest = open_model(config.model, config.shards)
    if config.window > model.config.max_seconds:
        raise InputError(f"a window may have at most {model.config.max_seconds} seconds with this model")
    store = Store(config.output, create=True)
    _refuse_other(store, digest, windowing)
    quarantine = Quarantine(config.output)
    files = _files(config.videos, quarantine)
    sources = _from_shards(config, files) if config.shards else _from_files(config, files)
    by_id = {source.video_id: source for source in sources}
    changes = find_changes(store, {source.video_id: source.digest for source in sources})
    if changes:
        start_run(config.output, "index", config)
        new = [by_id[video_id] for video_id in changes.added]
        for video_id in {row["video_id"] for row in quarantine.rows if row["what"] != "file"} & {*changes.added}:
            quarantine.forget(video_id=video_id)  # it is tried again, and may be well by now
        added = _embed(config, windowing, digest, new, quarantine)
        added = _with_files(_with_captions(config, added, files, quarantine), files, config)
        _update(config, windowing, digest, store, changes, added, model)
    _locate(store, files, config)
    print(_summary(store, changes, quarantine))
    quarantine.save()
    if config.fit is not None:
        _fit(config, store, model, digest)


def _refuse_other(store: Store, model: str, windowing: WindowConfig) -> None:
    made_by, cut = store.get("model"), store.get("windowing")
    if made_by not in (None, model):
        raise InputError(f"{store.folder}: was made by another model; choose another --output for this one")
    if cut is not None and cut != asdict(windowing):
        raise InputError(f"{store.folder}: has windows of {cut['window']} s every {cut['stride']} s; keep to them")


def _files(folder: Path | None, quarantine: Quarantine) -> dict[str, Path]:
    quarantine.forget(what="file")
    if folder is None:
        return {}
    return videos_by_id(folder, lambda video_id, reason: quarantine.add(video_id, reason, "file"))


def _subtitles(config: IndexConfig, files: Mapping[str, Path]) -> SubtitleFiles | None:
    """Where the words come from; None: from the shards."""
    if config.captions is None and config.shards is not None:
        return None
    return SubtitleFiles(config.captions or BESIDE, files, config.language)


def _from_shards(config: IndexConfig, files: Mapping[str, Path]) -> list[Source]:
    assert config.shards is not None
    shards = Shards(config.shards)
    sources, row = [], 0
    ids = shards.video_ids()
    subtitles = _subtitles(config, files)
    for part in shards.manifest.parts:
        said = part.captions.sha256[:16] if part.captions else ""
        for inside in range(part.videos):
            words = said if subtitles is None else subtitles.digest(ids[row])
            sources.append(Source(ids[row], f"{part.sha256[:24]}-{inside}|{words}", row))
            row += 1
    return sources


def _from_files(config: IndexConfig, files: Mapping[str, Path]) -> list[Source]:
    subtitles = _subtitles(config, files)
    assert subtitles is not None
    sources = []
    for video_id, path in files.items():
        stat = path.stat()
        said = subtitles.digest(video_id)
        sources.append(Source(video_id, f"{stat.st_size}-{stat.st_mtime_ns}|{said}", path=str(path)))
    return sources


def _embed(
    config: IndexConfig, windowing: WindowConfig, digest: str, sources: Sequence[Source], quarantine: Quarantine
) -> list[NewVideo]:
    """Blocks of what is new, as Ray tasks; those that a run before finished are used. Broken videos are quarantined."""
    folder = config.output / BLOCKS
    groups = [sources[i : i + VIDEOS_PER_BLOCK] for i in range(0, len(sources), VIDEOS_PER_BLOCK)]
    names = [block_name(digest, [f"{s.video_id} {s.pictures}" for s in group], windowing) for group in groups]
    missing = [
        (config, windowing, group, name) for group, name in zip(groups, names) if not block_finished(folder, name)
    ]
    if missing:
        done = len(sources) - sum(len(group) for _, _, group, _ in missing)
        with ray_session(config.address):
            run_tasks(_embed_block, missing, done, len(sources), "video", "indexing")
    digests = {source.video_id: source.digest for source in sources}
    added = []
    for name in names:
        window_row = second_row = 0
        for row in read_json(folder / f"{name}.json"):
            if row["reason"]:
                quarantine.add(row["video_id"], row["reason"])
                continue
            seconds = row["seconds"]
            where = (name, window_row, second_row)
            added.append(
                NewVideo(row["video_id"], digests[row["video_id"]], seconds, row["duration"], NO_CAPTIONS, *where)
            )
            window_row += window_count(seconds, windowing.window, windowing.stride)
            second_row += seconds
    return added


def _embed_block(config: IndexConfig, windowing: WindowConfig, sources: Sequence[Source], name: str) -> int:
    import torch

    torch.set_num_threads(1)  # one task a CPU
    if config.shards is not None:
        model, shards = load_model_and_shards(config.model, config.shards)
    else:
        model = from_pretrained(config.model)
    rows: list[dict[str, Any]] = []
    videos = []
    for source in sources:
        row = {"video_id": source.video_id, "seconds": 0, "duration": 0.0, "reason": ""}
        try:
            if config.shards is not None:
                record = shards.record(source.row)
                tokens, duration = np.asarray(record.tokens), record.duration
            else:
                tokens = model.frozen_video_encoder().encode_video(Path(source.path))
                duration = probe(Path(source.path)).duration
            row.update(seconds=len(tokens), duration=duration or float(len(tokens)))
            videos.append(tokens)
        except InputError as error:
            row["reason"] = str(error)
        rows.append(row)
    folder = config.output / BLOCKS
    write_json(folder / f"{name}.json", rows)
    if videos:
        write_block(model, videos, windowing, folder, name)
    return len(sources)


def _with_captions(
    config: IndexConfig, added: Sequence[NewVideo], files: Mapping[str, Path], quarantine: Quarantine
) -> list[NewVideo]:
    """The same videos with what is said in them, from the shards or from their subtitles."""
    subtitles = _subtitles(config, files)
    if subtitles is None:
        assert config.shards is not None
        shards = Shards(config.shards)
        rows = shards.rows_by_id()
        return [replace(video, captions=shards.record(rows[video.video_id]).captions) for video in added]
    spoken = []
    for video in added:
        captions: Captions = NO_CAPTIONS
        language = ""
        try:
            found = subtitles.understand(video.video_id, float(video.seconds))
            if found is not None:
                captions, language = found.captions, found.language
        except InputError as error:
            quarantine.add(video.video_id, str(error), "captions")
        spoken.append(replace(video, captions=captions, language=language))
    return spoken


def _with_files(added: Sequence[NewVideo], files: Mapping[str, Path], config: IndexConfig) -> list[NewVideo]:
    placed = []
    for video in added:
        path = files.get(video.video_id)
        if path is None:
            placed.append(video)
            continue
        stat = path.stat()
        placed.append(
            replace(video, path=str(path), folder=_folder(path, config), size=stat.st_size, modified=stat.st_mtime_ns)
        )
    return placed


def _folder(path: Path, config: IndexConfig) -> str:
    assert config.videos is not None
    inside = path.parent.relative_to(config.videos).as_posix()
    return "" if inside == "." else inside


def _update(
    config: IndexConfig,
    windowing: WindowConfig,
    digest: str,
    store: Store,
    changes: Changes,
    added: Sequence[NewVideo],
    model: Any,
) -> None:
    """Commit the next generation, tuned by captions of the archive."""
    lines = store.some_lines(TUNING_TEXTS) or [text for video in added for text in video.captions.text]
    step = max(1, len(lines) // TUNING_TEXTS)
    texts = embed_texts(model, lines[::step][:TUNING_TEXTS]) if lines else None
    store.set("model", digest)
    index = apply_changes(store, changes, added, windowing, config.memory * GIGABYTE, texts, config.faiss_index)
    print(index.described(store.get("tuned_by")))


def _locate(store: Store, files: Mapping[str, Path], config: IndexConfig) -> None:
    """Note where files are now: a folder that was moved needs no new vectors."""
    if not files:
        return
    rows = []
    for video in store.videos():
        path = files.get(video.video_id)
        if path is not None and str(path) != video.path:
            stat = path.stat()
            rows.append((str(path), _folder(path, config), stat.st_size, stat.st_mtime_ns, video.number))
    if rows:
        with store.transaction():
            store.connection.executemany(
                "UPDATE videos SET path = ?, folder = ?, size = ?, modified = ? WHERE number = ?", rows
            )
            store.set("generation", store.get("generation") + 1)


def _summary(store: Store, changes: Changes, quarantine: Quarantine) -> str:
    videos = store.videos()
    changed = {video.video_id for video in changes.removed} & set(changes.added)
    new, gone = len(changes.added) - len(changed), len(changes.removed) - len(changed)
    counts = f"{new} new, {len(changed)} changed, {gone} removed"
    return (
        f"{len(videos)} videos, {store.line_count()} lines said, in {store.folder} "
        f"({counts if changes else 'nothing new'}); {quarantine.summary()}"
    )


def _fit(config: IndexConfig, store: Store, model: Any, digest: str) -> None:
    """Fit the weights of the channels to held-out descriptions, keep them, and say what they are worth."""
    assert config.fit is not None
    found = fit_fusion(Archive(config.output, model, digest), read_described(config.fit))
    with store.transaction():
        store.set("fusion", asdict(found.config))
        store.set("generation", store.get("generation") + 1)
    print(f"fitted: {found}")
