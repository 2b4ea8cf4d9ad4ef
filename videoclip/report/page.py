"""A run's results as one self-contained HTML page: tables beside chance, and what was found, with frames."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from videoclip.data.qvhighlights import CLIP_SECONDS, MomentQuery
from videoclip.data.video import FrameFormat, decode_seconds, find_videos
from videoclip.errors import InputError
from videoclip.evaluation.moments import MomentPrediction, overlap
from videoclip.files import write_text

FRAME_SIZE = 72  # pixels
FRAMES_SHOWN = 8
BLUE, ORANGE, GREEN, GREY = "#2f6db3", "#d9822b", "#3a9a5b", "#8a8f98"


@dataclass(frozen=True)
class Table:
    """`rows` of cells, each as many as `head`; `note` stands under it."""

    title: str
    head: list[str]
    rows: list[list[Any]]
    note: str = ""


@dataclass(frozen=True)
class Example:
    """One query: an SVG figure, a line of text, and frames as data URIs with captions."""

    title: str
    note: str
    figure: str = ""
    frames: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """Examples under one heading."""

    title: str
    note: str
    examples: list[Example]


def render_report(
    path: Path, title: str, summary: str, tables: list[Table], figures: list[tuple[str, str]], sections: list[Section]
) -> None:
    """Write the page. `figures` are (caption, SVG). Everything from outside is escaped; nothing is loaded."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("videoclip.report", "."), autoescape=True)
    environment.filters["svg"] = Markup  # figures are drawn here, by matplotlib, which escapes the text in them
    template = environment.get_template("report.html.jinja")
    write_text(path, template.render(title=title, summary=summary, tables=tables, figures=figures, sections=sections))


def training_curve(rows: list[dict[str, Any]]) -> str:
    """SVG of the loss, and of the share of pairs whose own text is nearest, over the steps of `metrics.jsonl`."""
    from matplotlib.figure import Figure

    steps = np.array([row["step"] for row in rows])
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, name, label, colour in (
        (left, "loss", "contrastive loss", BLUE),
        (right, "accuracy", "own text nearest (share of batch)", ORANGE),
    ):
        values = np.array([row[name] for row in rows])
        width = max(1, len(values) // 40)
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(steps[width - 1 :], smooth, color=colour, linewidth=1.8)
        axis.set_xlabel("step")
        axis.set_title(label, fontsize=9)
        _plain(axis)
    return _svg(figure)


def batch_curve(rows: list[dict[str, Any]]) -> str:
    """SVG of how similar the videos of a batch were, clustering by clustering, beside random batches.

    `rows` of `metrics.jsonl`; bands are the 10th to 90th percentile of the batches. Empty where nothing was recorded.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if "batches/cosine" in row]
    if not rows:
        return ""
    pure = "batches/purity" in rows[0]
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    panels = figure.subplots(1, 2 if pure else 1, squeeze=False)[0]
    epochs = [row["epoch"] for row in rows]
    for prefix, name, colour in (("", "clustered", BLUE), ("random_", "random", GREY)):
        low, middle, high = ([row[f"batches/{prefix}cosine{end}"] for row in rows] for end in ("_p10", "", "_p90"))
        panels[0].fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
        panels[0].plot(epochs, middle, color=colour, linewidth=1.8, label=name)
        if pure:
            panels[1].plot(epochs, [row[f"batches/{prefix}purity"] for row in rows], color=colour, linewidth=1.8)
    panels[0].set_title("cosine inside a batch", fontsize=9)
    panels[0].legend(fontsize=8, frameon=False)
    if pure:
        panels[1].set_title("videos of a batch with its most frequent topic (%)", fontsize=9)
    for axis in panels:
        axis.set_xlabel("epoch")
        _plain(axis)
    return _svg(figure)


def moment_example(query: MomentQuery, prediction: MomentPrediction, video: Path | None) -> Example:
    """Similarity over time, the true windows, the first three found, and a few frames."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.9), layout="constrained")
    axis = figure.subplots()
    saliency = prediction.saliency if prediction.saliency is not None else np.zeros(1)
    times = (np.arange(len(saliency)) + 0.5) * CLIP_SECONDS
    low, high = float(saliency.min()), float(saliency.max())
    span = max(high - low, 1e-6)
    for start, end in query.windows if query.windows is not None else []:
        axis.axvspan(start, end, color=GREEN, alpha=0.25, linewidth=0)
    axis.plot(times, saliency, color=BLUE, linewidth=1.8)
    for place, (start, end, _) in enumerate(prediction.windows[:3]):
        axis.plot(
            [start, end], [low - (0.12 + 0.1 * place) * span] * 2, color=ORANGE, linewidth=4, alpha=1 - 0.3 * place
        )
    axis.set_xlim(0, query.duration)
    axis.set_ylim(low - 0.45 * span, high + 0.1 * span)
    axis.set_xlabel("seconds")
    axis.set_ylabel("similarity")
    _plain(axis)
    found = prediction.windows[0, :2]
    reached = float(overlap(found, query.windows).max()) if query.windows is not None else float("nan")
    note = f"{query.video_id}: first window {found[0]:.0f} to {found[1]:.0f} s, overlap with the truth {reached:.2f}"
    frames = frames_between(video, 0, query.duration) if video else []
    return Example(query.query, note, _svg(figure), frames)


def choose_examples(
    predictions: list[MomentPrediction], queries: list[MomentQuery], count: int
) -> list[tuple[MomentQuery, MomentPrediction]]:
    """Failures first: the worst answered queries, then some from the middle, then the best; one of a video."""
    by_id = {query.query_id: query for query in queries}
    scored = []
    for prediction in predictions:
        query = by_id.get(prediction.query_id)
        if query is not None and query.windows is not None and len(prediction.windows):
            scored.append((float(overlap(prediction.windows[0, :2], query.windows).max()), query, prediction))
    scored.sort(key=lambda item: item[0])
    chosen, seen = [], set()
    for place in np.linspace(0, len(scored) - 1, min(4 * count, len(scored))).astype(int):
        _, query, prediction = scored[place]
        if query.video_id not in seen:
            seen.add(query.video_id)
            chosen.append((query, prediction))
    keep: Any = np.unique(np.linspace(0, len(chosen) - 1, min(count, len(chosen))).astype(int)) if chosen else []
    return [chosen[i] for i in keep]


def retrieval_example(row: dict[str, Any], videos: dict[str, Path]) -> Example:
    """One query of retrieval's `predictions.jsonl`: the right clip and the first ones found, by their middle frames."""
    shown = [("right", row), *((f"{place}.", found) for place, found in enumerate(row["found"], 1))]
    frames = []
    for label, clip in shown:
        path = videos.get(clip["video_id"])
        if path:
            middle = (clip["start"] + clip["end"]) / 2
            frames += [
                (image, f"{label} {clip['video_id']}, {time}")
                for image, time in frames_between(path, middle, middle + 1, 1)
            ]
    return Example(row["sentence"], f"rank {row['rank']:g}", "", frames)


def videos_by_id(folder: Path | None) -> dict[str, Path]:
    """Video files by id (the name without its suffix); empty without a folder."""
    return {path.stem: path for path in find_videos(folder)} if folder else {}


def frames_between(path: Path, start: float, end: float, count: int = FRAMES_SHOWN) -> list[tuple[str, str]]:
    """Up to `count` evenly spaced frames of [start, end) seconds as (JPEG data URI, time); none of a damaged file."""
    try:
        frames = [second[0] for second in decode_seconds(path, FrameFormat(1, FRAME_SIZE), float(int(start)), end)]
    except InputError:
        return []  # the page is about results; extraction has named the file already
    places = np.unique(np.linspace(0, len(frames) - 1, count).astype(int))
    return [(_data_uri(frames[i]), f"{int(start) + i} s") for i in places]


def _data_uri(frame: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.xaxis.label.set_size(8)
    axis.yaxis.label.set_size(8)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
