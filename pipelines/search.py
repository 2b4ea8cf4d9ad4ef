"""`videoclip search`: the moments of an archive that answer a description, by what is seen and what is said."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from videoclip.errors import InputError
from videoclip.evaluation.inputs import is_frozen, open_model
from videoclip.files import read_json, write_text
from videoclip.search.answers import Answer, to_csv, to_edl, to_lines
from videoclip.search.archive import Archive
from videoclip.search.request import MAX_COUNT, Filter, Request
from videoclip.search.reranking import rerank_answers


@dataclass(frozen=True)
class ArchiveConfig:
    """Which archive is searched, and with which model."""

    model: Path
    """Folder of the model that made the index, or `frozen`."""
    index: Path = Path("runs/index")
    """Folder that `videoclip index` wrote."""


@dataclass(frozen=True)
class SearchConfig:
    """Print the moments, or the videos, that answer a description best."""

    query: Annotated[str, Positional]
    """What to look for, in quotes; "inner quotes" for words that must be said so, a star* for beginnings."""
    model: Path
    """Folder of the model that made the index, or `frozen`."""
    index: Path = Path("runs/index")
    by: str = "both"
    """picture, words (that were said), or both."""
    count: int = 10
    """How many answers."""
    videos: bool = False
    """Each video once, by its best moment."""
    folder: str = ""
    """Only videos below this folder of the archive."""
    shortest: float = 0.0
    """Only videos of at least so many seconds."""
    longest: float = float("inf")
    """Only videos of at most so many seconds."""
    json: bool = False
    """Print one JSON object an answer instead."""
    csv: bool = False
    """Print a table for spreadsheets instead."""
    rerank: int = 0
    """So many of the best answers are put in order by matching, by a model that has it (recipe fusion); 0: none."""
    shards: Path | None = None
    """With --rerank: the shards that the index is of, since matching reads a moment's tokens."""
    edl: Path | None = None
    """Also write the moments as an edit decision list, for editing programs."""


def open_archive(model: Path, index: Path) -> Archive:
    """An archive with the model that made it.

    Raises InputError if there is no index, it is damaged, or another model made it.
    """
    shards = None
    if is_frozen(model):
        made_from = read_json(index / "index.json")["configuration"]["shards"]
        shards = None if made_from is None else Path(made_from)
    return Archive(index, *open_model(model, shards))


def search(config: SearchConfig) -> list[Answer]:
    """Answer one query and print the answers, best first.

    Raises InputError if the archive cannot be searched, or the query is empty.
    """
    if config.json and config.csv:
        raise InputError("choose --json or --csv, not both")
    if config.rerank and not config.count <= config.rerank <= MAX_COUNT:
        raise InputError(f"--rerank {config.rerank}: must be 0 (none), or from --count {config.count} to {MAX_COUNT}")
    if config.rerank and config.shards is None:
        raise InputError("--rerank reads the moments' tokens: give --shards, the folder that the index is of")
    where = Filter(config.folder, config.shortest, config.longest)
    request = Request(config.query, config.by, config.rerank or config.count, where, config.videos)
    archive = open_archive(config.model, config.index)
    (answers,) = archive.search([request])
    if config.rerank and config.shards is not None and archive.model is not None:
        answers = rerank_answers(archive.model, config.query, answers, config.shards)[: config.count]
    if config.json:
        print("\n".join(json.dumps(answer.as_json(), ensure_ascii=False) for answer in answers))
    elif config.csv:
        print(to_csv(answers), end="")
    else:
        print(to_lines(answers) if answers else "nothing found")
    if config.edl is not None:
        write_text(config.edl, to_edl(answers, config.query))
    return answers
