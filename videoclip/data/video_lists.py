"""Which videos there are: a folder, or a list of `video_id, path or URI[, start, end][, caption columns]`.

A list is csv, tsv, parquet or jsonl, read row by row. Known as they were published are HowTo100M's csv (ids alone: the
files are named like them), WebVid's (`videoid, name, page_dir`) and Conceptual Captions' tsv (caption and place,
without a header); tars of pictures or videos are read as webdataset lays them out. An id is data: it becomes a file
name only where a publication has nothing else to name the file by, and then it must not be a path.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videoclip.data.video import VIDEO_SUFFIXES, find_videos
from videoclip.errors import InputError
from videoclip.remote import RemoteReader, StorageError, absolute, is_remote, list_files, look
from videoclip.storage import local_copy

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
LIST_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".tar")
ANY_SUFFIX = ".*"  # behind a location: the file that is there, whichever container it is
LONGEST_TEXT = 1 << 20  # bytes of a caption or of a table's field; a stranger's list must not fill the memory

IDS = ("video_id", "videoid", "id")
PLACES = ("path", "uri", "file", "video", "image")
TEXTS = ("caption", "text", "title")
TIMED = "captions"  # {"start": […], "end": […], "text": […]}, in seconds from the clip's start


@dataclass(frozen=True)
class ListedVideo:
    """One row: which video, where it is, which seconds of it, and what its list says about it.

    `location` is a path or URI; `offset` and `size` are the bytes of it that are meant, where it is a tar. `said` is a
    caption for the whole clip, or timed captions as JSON, or None.
    """

    video_id: str
    location: str
    start: float = 0.0
    end: float | None = None
    said: str | None = None
    offset: int | None = None
    size: int | None = None

    @property
    def is_picture(self) -> bool:
        """A picture is a clip of one token."""
        return self.location.lower().endswith(PICTURE_SUFFIXES) or self.offset is not None

    def captions(self, seconds: int) -> dict[str, list[Any]] | None:
        """Raw captions of so many seconds of tokens, as `captions_of_video` takes them."""
        if self.said is None:
            return None
        if self.said.startswith("{"):
            try:
                return dict(json.loads(self.said))
            except json.JSONDecodeError:
                pass  # a sentence that begins with a brace
        return {"start": [0.0], "end": [float(seconds)], "text": [self.said]}


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: what names it, and why."""

    name: str
    reason: str


Row = ListedVideo | BadRow


def read_videos(source: Path, root: Path | None = None) -> Iterator[Row]:
    """Every row of a folder or list, in its order, in constant memory (but for the names in a folder).

    Paths of a list that are not absolute start from `root`, or else from the list's own folder.
    Raises InputError if there is no such folder or list, or it has no columns that name videos.
    """
    source = Path(source)
    if source.is_dir() or (is_remote(source) and source.suffix.lower() not in LIST_SUFFIXES):
        tars = _tars(source)
        yield from itertools.chain.from_iterable(map(_of_tar, tars)) if tars else map(_of_file, find_videos(source))
        return
    suffix = source.suffix.lower()
    if suffix not in LIST_SUFFIXES:
        raise InputError(f"{source}: no such folder of videos, and no list of them ({', '.join(LIST_SUFFIXES)})")
    if not (look(source) if is_remote(source) else source.is_file()):
        raise InputError(f"{source}: no such list of videos")
    if suffix == ".tar":
        yield from _of_tar(source)
        return
    reader = {".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows, ".jsonl": _json_rows}[suffix]
    folder = absolute(source.parent) if root is None else root
    for number, values in reader(local_copy(source)):
        where = f"{source}:{number}"
        if isinstance(values, BadRow):
            yield values
            continue
        try:
            yield _listed(values, folder, where)
        except InputError as error:
            yield BadRow(str(_first(values, IDS) or where)[:200], str(error))


def _tars(folder: Path) -> list[Path]:
    paths = [file.path for file in list_files(folder)] if is_remote(folder) else folder.glob("*.tar")
    return sorted(path for path in paths if path.suffix == ".tar" and path.parent == folder)


def _of_file(path: Path) -> ListedVideo:
    return ListedVideo(path.stem, str(path))


def _listed(values: Mapping[str, Any], folder: Path, where: str) -> ListedVideo:
    """One row of a table by its columns. Raises InputError if it names no video."""
    video_id = _first(values, IDS)
    place = _first(values, PLACES)
    if not video_id and place:
        video_id = Path(str(place)).stem
    if not video_id:
        raise InputError(f"{where}: no video id")
    video_id = str(video_id)
    if not place:
        inside = str(values.get("page_dir") or "")
        if _is_path(video_id) or (inside and any(_is_path(part) for part in inside.split("/"))):
            raise InputError(f"{where}: an id that is a path cannot name a file; add a column `path`")
        suffix = ".mp4" if "page_dir" in values else ANY_SUFFIX
        place = os.path.join(inside, f"{video_id}{suffix}")
    start, end = _seconds(values.get("start"), where), _seconds(values.get("end"), where)
    if (start or 0.0) < 0 or (end is not None and end <= (start or 0.0)):
        raise InputError(f"{where}: the end of a clip ({end} s) must lie after its start ({start} s), both from 0 on")
    return ListedVideo(video_id, _place(str(place), folder), start or 0.0, end, _said(values, where))


def _is_path(name: str) -> bool:
    return name in ("", ".", "..") or "/" in name or os.sep in name or "\0" in name


def _place(location: str, folder: Path) -> str:
    return location if "://" in location else os.path.join(folder, location)


def _said(values: Mapping[str, Any], where: str) -> str | None:
    """The caption of a row: a text for the whole clip, or timed captions as JSON."""
    timed = values.get(TIMED)
    if isinstance(timed, str) and timed.lstrip().startswith("{"):
        return _not_too_long(timed.strip(), where)
    if isinstance(timed, Mapping):
        return _not_too_long(json.dumps(timed, ensure_ascii=False), where)
    text = _first(values, TEXTS)
    if text is None and "page_dir" in values:
        text = values.get("name")
    return None if text is None else _not_too_long(" ".join(str(text).split()), where)


def _not_too_long(text: str, where: str) -> str:
    if len(text) > LONGEST_TEXT:
        raise InputError(f"{where}: a caption of {len(text)} letters")
    return text


def _first(values: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((values[name] for name in names if values.get(name) not in (None, "")), None)


def _seconds(value: Any, where: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {str(value)[:50]!r} is not a time in seconds") from None
    if not math.isfinite(seconds):
        raise InputError(f"{where}: {seconds} is not a time in seconds")
    return seconds


Table = Iterator[tuple[int, dict[str, Any] | BadRow]]


def _csv_rows(path: Path) -> Table:
    """Line numbers and values by lower-case column. A tsv without known columns holds a caption and a place."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(LONGEST_TEXT)
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        lines = csv.reader(
            file, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        )
        first = next(lines, [])
        header = [name.strip().lower() for name in first]
        if not set(header) & {*IDS, *PLACES}:
            if delimiter != "\t" or len(first) != 2:
                raise InputError(f"{path}: has no column that names videos ({', '.join((*IDS, *PLACES))})")
            header = ["caption", "path"]
            yield 1, dict(zip(header, first))
        while True:
            try:
                values = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                yield lines.line_num, BadRow(f"{path}:{lines.line_num}", f"{path}:{lines.line_num}: {error}")
                continue
            if values:
                yield lines.line_num, dict(zip(header, values))


def _json_rows(path: Path) -> Table:
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield number, row
            else:
                yield number, BadRow(f"{path}:{number}", f"{path}:{number}: not a JSON object")


def _parquet_rows(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = {name: name.lower() for name in file.schema_arrow.names}
            wanted = {*IDS, *PLACES, *TEXTS, TIMED, "start", "end", "page_dir", "name"}
            if not set(columns.values()) & {*IDS, *PLACES}:
                raise InputError(f"{path}: has no column that names videos ({', '.join((*IDS, *PLACES))})")
            kept = [name for name, lower in columns.items() if lower in wanted]
            number = 0
            for batch in file.iter_batches(4096, columns=kept):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {columns[name]: value for name, value in row.items()}
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a parquet file that can be read ({str(error).splitlines()[0]})") from None


def _of_tar(path: Path) -> Iterator[Row]:
    """The pictures of a tar as webdataset lays them out: members of one key follow each other, `000.jpg`, `000.txt`
    (a caption) and `000.json` (`{"caption": …}`). The id is the tar's name and the key."""
    try:
        with RemoteReader(path) if is_remote(path) else open(path, "rb") as file, tarfile.open(None, "r:", file) as tar:
            for key, members in itertools.groupby((m for m in tar if m.isfile()), lambda m: _key(m.name)):
                yield _of_members(tar, path, key, {Path(m.name).suffix.lower(): m for m in members})
    except StorageError:
        raise  # what is behind it would be missing, and nobody would know
    except (tarfile.TarError, OSError, EOFError) as error:
        yield BadRow(path.name, f"{path}: not a tar that can be read to its end ({error})")


def _key(name: str) -> str:
    return name[: -len(suffix)] if (suffix := Path(name).suffix) else name


def _of_members(tar: tarfile.TarFile, path: Path, key: str, members: Mapping[str, tarfile.TarInfo]) -> Row:
    name = f"{path.stem}/{key}"
    picture = next((members[suffix] for suffix in PICTURE_SUFFIXES if suffix in members), None)
    if picture is None:
        return BadRow(name, f"{path}: {key} holds no picture ({', '.join(PICTURE_SUFFIXES)})")
    said: str | None = None
    if (text := members.get(".txt") or members.get(".json")) is not None and text.size <= LONGEST_TEXT:
        file = tar.extractfile(text)
        content = "" if file is None else file.read().decode("utf-8", "replace")
        if text.name.endswith(".json"):
            try:
                values = json.loads(content)
            except (json.JSONDecodeError, RecursionError):
                values = None
            content = str(_first(values, TEXTS) or "") if isinstance(values, dict) else ""
        said = " ".join(content.split()) or None
    return ListedVideo(name, str(absolute(path)), 0.0, None, said, picture.offset_data, picture.size)


def local_path(location: str) -> Path:
    """The file that a location of a list means, on this machine or in a store: the one place where a location becomes
    something to open.

    Raises InputError if there is none, or it is a URI of a kind that cannot be read.
    """
    if location.startswith("file://"):
        location = location.removeprefix("file://")
    elif "://" in location and not is_remote(location):
        raise InputError(f"{location}: only files and s3, gs and hdfs can be read; download it first")
    if location.endswith(ANY_SUFFIX):
        stem = location.removesuffix(ANY_SUFFIX)
        candidates = (Path(stem + suffix) for suffix in VIDEO_SUFFIXES)
        found = next((path for path in candidates if (look(path) if is_remote(path) else path.is_file())), None)
        if found is None:
            raise InputError(f"{stem}: no such video file (looked for {', '.join(VIDEO_SUFFIXES)})")
        return found
    return Path(location)
