"""Lists of entities, and the captions that ALPRO is pretrained on."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videoclip.errors import InputError
from videoclip.files import read_json, read_json_lines

TO_CONVERT = "pandas.read_pickle(path).to_csv('train.csv', index=False)"
CAPTION_COLUMNS = ("video_id", "text")


def check_entities(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Raises InputError if the list is empty, an entity is, or one stands twice: its share would be halved."""
    cleaned = tuple(name.strip() for name in names)
    if not cleaned or not all(cleaned):
        raise InputError(f"{where}: entity {cleaned.index('') + 1 if cleaned else 1} is empty")
    seen: dict[str, int] = {}
    for number, name in enumerate(cleaned, 1):
        if name.lower() in seen:
            raise InputError(f"{where}: {name!r} stands twice, as entity {seen[name.lower()]} and {number}")
        seen[name.lower()] = number
    return cleaned


def read_entities(path: Path, limit: int = 1000) -> tuple[str, ...]:
    """Nouns of a file, one a line, "noun" or "noun count" as in the release's `unigrams.txt`; the first `limit`.

    Raises InputError, with the file, if it is missing or empty, or names an entity twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of entities")
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    names = [line.rpartition(" ")[0] if line.rpartition(" ")[2].isdigit() and " " in line else line for line in lines]
    return check_entities(names[:limit], str(path))


def frequent_nouns(captions: Iterable[str], nouns: Collection[str], limit: int = 1000) -> tuple[str, ...]:
    """The most frequent of `nouns` in captions; ties in alphabetical order. Which words are nouns, the caller says."""
    known = {noun.lower() for noun in nouns}
    counts = Counter(word for caption in captions for word in caption.lower().split() if word in known)
    return tuple(word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit])


@dataclass(frozen=True)
class Captioned:
    """A video or picture and what is said of it; `path` is relative to the folder of the data."""

    path: str
    caption: str
    kind: str


def read_captioned(path: Path, longest: int = 30) -> list[Captioned]:
    """Pretraining pairs: WebVid's table (csv, parquet or jsonl with `video_id`, `text`, and `txt_len` if known) or
    CC3M's json (a list of {"image", "caption"}, of several captions the first).

    Captions of `longest` words or more are left out, as in the release, where `txt_len` is given.
    Raises InputError, with the row, if the file has another form. The release's own `train.pkl` is a pickled
    DataFrame, which could run anything: it is refused, with the line that converts it.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pickle"):
        raise InputError(f"{path}: a pickle may run code and is not read; convert it where you trust it: {TO_CONVERT}")
    if suffix == ".json":
        rows = read_json(path)
        if not isinstance(rows, list):
            raise InputError(f'{path}: expected a list of {{"image": path, "caption": text}}')
        return [_picture(path, number, row) for number, row in enumerate(rows)]
    pairs = []
    for where, row in _rows(path, suffix):
        name, text = row.get("video_id"), row.get("text")
        if name in (None, "") or not isinstance(text, str) or not text.strip():
            raise InputError(f"{path}: {where}: needs a video_id and a text")
        length = row.get("txt_len")
        if length in (None, "") or int(length) < longest:
            pairs.append(Captioned(f"{name}.mp4", text.strip(), "video"))
    return pairs


def _picture(path: Path, number: int, row: Any) -> Captioned:
    caption = row.get("caption") if isinstance(row, dict) else None
    caption = caption[0] if isinstance(caption, list) and caption else caption
    if not isinstance(caption, str) or not isinstance(row.get("image"), str):
        raise InputError(f'{path}: row {number}: expected {{"image": path, "caption": text}}')
    return Captioned(row["image"], caption.strip(), "image")


def _rows(path: Path, suffix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if suffix == ".jsonl":
        yield from ((f"row {number}", row) for number, row in enumerate(read_json_lines(path), 1))
    elif suffix == ".csv":
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.DictReader(file)
            _check_columns(path, reader.fieldnames or [])
            yield from ((f"row {number}", row) for number, row in enumerate(reader, 2))
    elif suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        try:
            table = parquet.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
        _check_columns(path, table.column_names)
        yield from ((f"row {number}", row) for number, row in enumerate(table.to_pylist()))
    else:
        raise InputError(f"{path}: captions are read from csv, parquet, jsonl or CC3M's json, not from {suffix!r}")


def _check_columns(path: Path, columns: Iterable[str]) -> None:
    missing = [name for name in CAPTION_COLUMNS if name not in set(columns)]
    if missing:
        raise InputError(f"{path}: lacks the columns {', '.join(missing)}")
