"""`videoclip compare A B`: two models on the same queries, with intervals, and whether the difference may be luck."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional

from videoclip.errors import InputError
from videoclip.evaluation.comparison import on_same_queries, ranks_by_query, recall_at, recall_difference
from videoclip.files import read_json_lines, write_json

PREDICTIONS = "predictions.jsonl"
PLACES = (1, 5, 10)


@dataclass(frozen=True)
class CompareConfig:
    """Compare retrieval results: R@K of both, their difference, its interval over queries, and p by permutation."""

    first: Annotated[Path, Positional]
    """Folder of a retrieval evaluation (with predictions.jsonl), or a folder of such folders, one a seed."""
    second: Annotated[Path, Positional]
    """The same of the other model, on the same annotations."""
    output: Path | None = None
    """A json file for the figures."""
    draws: int = 10_000
    """Random draws for each interval and each p."""
    level: float = 0.95
    """Share of the draws that an interval holds."""
    seed: int = 0


def compare(config: CompareConfig) -> dict[str, Any]:
    """Print the table and return its figures.

    Raises InputError if a folder holds no retrieval results, or the queries are not the same, or fewer than two.
    """
    if config.draws < 100 or not 0 < config.level < 1:
        raise InputError("an interval takes at least 100 draws and a level between 0 and 1")
    folders = [_evaluations(config.first), _evaluations(config.second)]
    names = [str(folder) for of_model in folders for folder in of_model]
    runs = [ranks_by_query(read_json_lines(Path(name) / PREDICTIONS), name) for name in names]
    ranks = on_same_queries(runs, names)
    first, second = ranks[: len(folders[0])], ranks[len(folders[0]) :]
    figures: dict[str, Any] = {"queries": ranks.shape[1], "seeds": [len(first), len(second)]}
    for k in PLACES:
        options = (k, config.seed, config.draws, config.level)
        figures[f"R@{k}"] = {
            "first": asdict(recall_at(first, *options)),
            "second": asdict(recall_at(second, *options)),
            "difference": asdict(recall_difference(first, second, *options)),
        }
    print("\n".join(_table(figures, config)))
    if config.output is not None:
        write_json(config.output, figures)
    return figures


def _evaluations(folder: Path) -> list[Path]:
    """The folder itself if it holds predictions, else those directly under it that do, in order."""
    if (folder / PREDICTIONS).is_file():
        return [folder]
    seeds = sorted(path.parent for path in folder.glob(f"*/{PREDICTIONS}"))
    if not seeds:
        raise InputError(f"{folder}: holds no {PREDICTIONS}, nor does a folder in it; run a retrieval evaluation first")
    return seeds


def _table(figures: dict[str, Any], config: CompareConfig) -> list[str]:
    """Lines of a Markdown table: a row for each seed where there are several, the means, and the difference."""
    percent = f"{100 * config.level:g}%"
    lines = [
        f"{figures['queries']} queries; intervals hold {percent} of {config.draws} draws of queries",
        "",
        "| | " + " | ".join(f"R@{k}" for k in PLACES) + " |",
        "|---|" + "---|" * len(PLACES),
    ]
    for side, name, seeds in zip(("first", "second"), (config.first, config.second), figures["seeds"]):
        of_side = [figures[f"R@{k}"][side] for k in PLACES]
        if seeds > 1:
            for number in range(seeds):
                lines.append(_row(f"{name}, run {number + 1}", [f"{one['seeds'][number]:.1f}" for one in of_side]))
        cells = []
        for one in of_side:
            spread = f" ± {np.std(one['seeds'], ddof=1):.1f}" if seeds > 1 else ""
            cells.append(f"{one['value']:.1f}{spread} [{one['low']:.1f}, {one['high']:.1f}]")
        lines.append(_row(f"{name}, mean ± deviation of {seeds} runs" if seeds > 1 else str(name), cells))
    gains = [figures[f"R@{k}"]["difference"] for k in PLACES]
    cells = [f"{one['value']:+.1f} [{one['low']:+.1f}, {one['high']:+.1f}], p {one['p']:.4f}" for one in gains]
    return [*lines, _row("second minus first", cells)]


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"
