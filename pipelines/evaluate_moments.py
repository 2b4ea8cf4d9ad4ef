"""Moments and highlights on QVHighlights: run a model, or score a file of predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.figures import Figures
from videoclip.data.qvhighlights import MomentQuery, read_qvhighlights
from videoclip.data.shards import Shards, check_encoder
from videoclip.data.templates import PLAIN
from videoclip.errors import InputError
from videoclip.evaluation.baseline import query_blind_predictions
from videoclip.evaluation.moments import moment_metrics, read_predictions
from videoclip.files import write_json, write_json_lines

if TYPE_CHECKING:
    from videoclip.recipes.videoclip import Recipe


@dataclass(frozen=True)
class MomentConfig:
    """Moment localisation over QVHighlights queries, scored as the official evaluation does."""

    annotations: Path
    """Official annotation file, one query a line; without windows only predictions are written."""
    model: Path | None = None
    """Folder of a trained model; needs --shards."""
    shards: Path | None = None
    """Folder of shards with the queried videos."""
    predictions: Path | None = None
    """Score this file of predictions, of whatever system, instead of a model."""
    train_annotations: Path | None = None
    """Training queries, from which the baseline that never looks at the query is made."""
    train_shards: Path | None = None
    """Shards of their videos: with them every answer says how probable it is that its video shows the query at all
    (`present`), calibrated on the training queries; the metrics say how good "not in this video" is."""
    absent_below: float = 0.5
    """That probability below which a query counts as absent."""
    output: Path = Path("runs/evaluation/qvhighlights/metrics.json")
    """Metrics; predictions in the official format go to predictions.jsonl beside it."""
    templates: tuple[str, ...] = PLAIN
    """Queries are put into each of these in place of {}, and the embeddings averaged."""


def evaluate_moments(config: MomentConfig) -> Figures:
    """Run or score QVHighlights; returns the metrics that it writes (empty for a split without ground truth).

    Raises InputError if files do not fit each other.
    """
    queries = read_qvhighlights(config.annotations)
    if config.train_shards is not None and (config.train_annotations is None or config.model is None):
        raise InputError("--train-shards calibrates a model on training queries: give --train-annotations and --model")
    missing, absence = 0, {}
    if config.predictions is not None:
        predictions = read_predictions(config.predictions)
    elif config.model is not None and config.shards is not None:
        # A file of predictions is scored faster than torch is imported, so what needs it waits until here.
        from videoclip.evaluation.inputs import load_model_and_shards
        from videoclip.evaluation.localization import localize

        model, shards = load_model_and_shards(config.model, config.shards)
        predictions, missing = localize(model, shards, queries, templates=config.templates)
        if not predictions:
            raise InputError(f"{config.shards}: holds none of the {len(queries)} queried videos")
        rows = [prediction.as_json() for prediction in predictions]
        if config.train_shards is not None:
            absence = _add_presence(rows, config, model, shards, queries)
        write_json_lines(config.output.parent / "predictions.jsonl", rows)
    else:
        raise InputError("give --model and --shards to run a model, or --predictions to score a file")
    if any(query.windows is None for query in queries):
        print(f"{config.annotations}: no ground truth here, so predictions were written and nothing was scored")
        return Figures()
    if missing:
        answered = {prediction.query_id for prediction in predictions}
        queries = [query for query in queries if query.query_id in answered]
    metrics = moment_metrics(predictions, queries)
    if missing:
        metrics["dropped"] = missing
    if absence:
        metrics["absence"] = absence
    if config.train_annotations is not None:
        blind = query_blind_predictions(read_qvhighlights(config.train_annotations), queries)
        metrics["baseline"] = moment_metrics(blind, queries)["brief"]
    write_json(config.output, metrics)
    return Figures(metrics)


def _add_presence(
    rows: list[dict[str, Any]], config: MomentConfig, model: Recipe, shards: Shards, queries: list[MomentQuery]
) -> dict[str, float]:
    """Write `present` into every answer; returns how good "not in this video" is, each query asked of another video."""
    from videoclip.evaluation.absence import Presence, absence_metrics, ask

    assert config.train_annotations is not None and config.train_shards is not None
    training = Shards(config.train_shards)
    check_encoder(training.manifest, shards.manifest.fingerprint, "that of --shards", config.train_shards)
    known, asked = (
        [query for query in of_split if query.video_id in there]
        for of_split, there in (
            (read_qvhighlights(config.train_annotations), training.rows_by_id()),
            (queries, shards.rows_by_id()),
        )
    )
    if not known:
        raise InputError(f"{config.train_shards}: holds none of the training queries' videos")
    presence = Presence.fit(*ask(model, training, known, templates=config.templates))
    present, absent = (presence.probability(x) for x in ask(model, shards, asked, templates=config.templates))
    by_query = {query.query_id: round(float(value), 4) for query, value in zip(asked, present)}
    for row in rows:
        row["present"] = by_query[row["qid"]]
    return absence_metrics(present, absent, config.absent_below)
