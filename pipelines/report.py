"""`videoclip report`: what evaluation and training left behind, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videoclip.data.qvhighlights import read_qvhighlights
from videoclip.errors import InputError
from videoclip.evaluation.moments import read_predictions
from videoclip.files import read_json, read_json_lines
from videoclip.report.page import (
    Section,
    Table,
    batch_curve,
    choose_examples,
    moment_example,
    render_report,
    retrieval_example,
    training_curve,
    videos_by_id,
)

MOMENT_ROWS = (
    "MR-full-R1@0.5",
    "MR-full-R1@0.7",
    "MR-full-mAP",
    "MR-full-mAP@0.5",
    "MR-full-mAP@0.75",
    "HL-min-VeryGood-mAP",
    "HL-min-VeryGood-Hit1",
)


@dataclass(frozen=True)
class ReportConfig:
    """Tables, the training curve, and examples with frames, failures first. Give what there is."""

    output: Path = Path("runs/report.html")
    title: str = "VideoCLIP"
    retrieval: Path | None = None
    """Folder where `videoclip evaluate youcook2`, `msrvtt` or `didemo` left metrics.json and predictions.jsonl."""
    moments: Path | None = None
    """Folder where `videoclip evaluate qvhighlights` left metrics.json and predictions.jsonl."""
    annotations: Path | None = None
    """The QVHighlights annotation file that belongs to --moments."""
    training: Path | None = None
    """Run folder of `videoclip pretrain`, for its metrics.jsonl."""
    others: tuple[Path, ...] = ()
    """Folders of other evaluations (coin, crosstask, msrvtt-qa, mteb), whose metrics.json becomes a table."""
    videos: Path | None = None
    """Folder of the videos, for frames."""
    examples: int = 8
    """Queries shown of each kind."""


def report(config: ReportConfig, summary: str = "", extra: tuple[Table, ...] = ()) -> None:
    """Write the page. `summary` and `extra` tables are for callers that know more of a run.

    Raises InputError if there is nothing to show, or a file is missing or damaged.
    """
    if config.retrieval is None and config.moments is None and config.training is None and not config.others:
        raise InputError("nothing to report: give --retrieval, --moments, --others or --training")
    videos = videos_by_id(config.videos)
    tables: list[Table] = []
    sections: list[Section] = []
    figures: list[tuple[str, str]] = []
    if config.retrieval is not None:
        tables.append(retrieval_table(read_json(config.retrieval / "metrics.json")))
        sections.append(_retrieval_section(config, videos))
    if config.moments is not None:
        tables.append(moment_table(read_json(config.moments / "metrics.json")))
        sections.insert(0, _moment_section(config, videos))
    tables += [metrics_table(folder.name, read_json(folder / "metrics.json")) for folder in config.others]
    if config.training is not None:
        rows = read_json_lines(config.training / "metrics.jsonl")
        figures.append(("Training", training_curve(rows)))
        batches = batch_curve(rows)
        if batches:
            figures.append(("Batches", batches))
    render_report(config.output, config.title, summary, [*tables, *extra], figures, sections)
    print(f"report in {config.output}")


def retrieval_table(metrics: Mapping[str, Any]) -> Table:
    """R@K and median rank beside chance."""
    clips = metrics.get("clips", metrics["queries"])  # fewer than queries where a video has several captions
    chance, queries = metrics["chance_R@1"], metrics["queries"]
    return Table(
        "Finding clips by description",
        ["", "R@1", "R@5", "R@10", "median rank"],
        [
            ["VideoCLIP", metrics["R@1"], metrics["R@5"], metrics["R@10"], metrics["MedR"]],
            ["chance", chance, round(min(100, 5 * chance), 2), round(min(100, 10 * chance), 2), (clips + 1) / 2],
        ],
        f"{queries} captions, each with its clip among all; percent.",
    )


def metrics_table(title: str, metrics: Mapping[str, Any]) -> Table:
    """Any evaluation's figures; where they are grouped (by task, for instance), a line for each group."""
    groups = {name: value for name, value in metrics.items() if isinstance(value, dict)}
    if len(groups) == len(metrics) and groups:
        columns = list(dict.fromkeys(name for group in groups.values() for name in group))
        return Table(title, ["", *columns], [[name, *(of.get(c, "") for c in columns)] for name, of in groups.items()])
    return Table(title, ["", ""], [[name, value] for name, value in metrics.items() if name not in groups])


def moment_table(metrics: Mapping[str, Any]) -> Table:
    """The main QVHighlights figures, beside the query-blind baseline where there is one."""
    brief, baseline = metrics["brief"], metrics.get("baseline")
    head = ["", "VideoCLIP"] + (["query-blind"] if baseline else [])
    rows = [[name, brief[name]] + ([baseline[name]] if baseline else []) for name in MOMENT_ROWS if name in brief]
    note = "Percent, as QVHighlights computes them."
    if baseline:
        note += " Query-blind: the fixed windows that do best on training videos."
    return Table("Finding moments inside videos", head, rows, note)


def _moment_section(config: ReportConfig, videos: dict[str, Path]) -> Section:
    if config.annotations is None or config.moments is None:
        raise InputError("--moments needs --annotations, the file that its queries come from")
    predictions = read_predictions(config.moments / "predictions.jsonl")
    chosen = choose_examples(predictions, read_qvhighlights(config.annotations), config.examples)
    return Section(
        "Moments over time, failures first",
        "Green: the true windows. Blue: similarity with the query. Orange: the first three windows found.",
        [moment_example(query, prediction, videos.get(query.video_id)) for query, prediction in chosen],
    )


def _retrieval_section(config: ReportConfig, videos: dict[str, Path]) -> Section:
    assert config.retrieval is not None
    rows = sorted(read_json_lines(config.retrieval / "predictions.jsonl"), key=lambda row: -row["rank"])
    count = min(config.examples, len(rows))
    places = sorted({round(i * (len(rows) - 1) / max(1, count - 1)) for i in range(count)})
    return Section(
        "Retrieval, failures first",
        "The middle frame of the right clip, then of the first clips found.",
        [retrieval_example(rows[place], videos) for place in places],
    )
