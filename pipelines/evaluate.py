"""Stage three: zero-shot evaluation of a model on shards and official annotation files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.common import as_json
from videoclip.errors import InputError
from videoclip.files import write_json, write_json_lines


@dataclass(frozen=True)
class RetrievalConfig:
    """Text-to-video retrieval over YouCook2's annotated clips: R@K and ranks, beside chance."""

    model: Path
    """Folder of a trained model."""
    shards: Path
    """Folder of shards with the annotated videos."""
    annotations: Path
    """youcookii_annotations_trainval.json, or the csv that MIL-NCE distributes."""
    output: Path = Path("runs/evaluation/youcook2/metrics.json")
    """Metrics; the rank of every query goes to predictions.jsonl beside it."""
    subset: str = "validation"


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
    output: Path = Path("runs/evaluation/qvhighlights/metrics.json")
    """Metrics; predictions in the official format go to predictions.jsonl beside it."""


def evaluate_retrieval(config: RetrievalConfig) -> dict[str, Any]:
    """Run YouCook2 retrieval; returns the metrics that it writes.

    Raises InputError if files do not fit each other or no annotated clip is in the shards.
    """
    import torch

    from videoclip.data.youcook2 import read_youcook2
    from videoclip.evaluation.retrieval import best_matches, gather_clips, ranks_of_positives, retrieval_metrics

    model, shards = load_model_and_shards(config.model, config.shards)
    clips = gather_clips(shards, read_youcook2(config.annotations, config.subset), model.config.max_seconds)
    with torch.inference_mode():
        videos = (
            model.embed_video(torch.from_numpy(clips.tokens), torch.from_numpy(clips.lengths)).float().cpu().numpy()
        )
    texts = model.encode_text([clip.sentence for clip in clips.clips]).cpu().numpy()
    ranks = ranks_of_positives(texts, videos)
    metrics = {**retrieval_metrics(ranks), "dropped": clips.dropped, "video_to_text": _backward(texts, videos)}
    found = best_matches(texts, videos, 3)
    rows = [
        {**as_json(clip), "rank": int(rank), "found": [as_json(clips.clips[i]) for i in best]}
        for clip, rank, best in zip(clips.clips, ranks, found)
    ]
    write_json_lines(config.output.parent / "predictions.jsonl", rows)
    write_json(config.output, metrics)
    return metrics


def _backward(texts: Any, videos: Any) -> dict[str, Any]:
    from videoclip.evaluation.retrieval import ranks_of_positives, retrieval_metrics

    return retrieval_metrics(ranks_of_positives(videos, texts))


def evaluate_moments(config: MomentConfig) -> dict[str, Any]:
    """Run or score QVHighlights; returns the metrics that it writes (empty for a split without ground truth).

    Raises InputError if files do not fit each other.
    """
    from videoclip.data.qvhighlights import read_qvhighlights
    from videoclip.evaluation.moments import moment_metrics, read_predictions

    queries = read_qvhighlights(config.annotations)
    missing = 0
    if config.predictions is not None:
        predictions = read_predictions(config.predictions)
    elif config.model is not None and config.shards is not None:
        from videoclip.evaluation.localization import localize

        predictions, missing = localize(*load_model_and_shards(config.model, config.shards), queries)
        if not predictions:
            raise InputError(f"{config.shards}: holds none of the {len(queries)} queried videos")
        rows = [prediction.as_json() for prediction in predictions]
        write_json_lines(config.output.parent / "predictions.jsonl", rows)
    else:
        raise InputError("give --model and --shards to run a model, or --predictions to score a file")
    if any(query.windows is None for query in queries):
        print(f"{config.annotations}: no ground truth here, so predictions were written and nothing was scored")
        return {}
    if missing:
        answered = {prediction.query_id for prediction in predictions}
        queries = [query for query in queries if query.query_id in answered]
    metrics = moment_metrics(predictions, queries)
    if missing:
        metrics["dropped"] = missing
    if config.train_annotations is not None:
        from videoclip.evaluation.baseline import query_blind_predictions

        blind = query_blind_predictions(read_qvhighlights(config.train_annotations), queries)
        metrics["baseline"] = moment_metrics(blind, queries)["brief"]
    write_json(config.output, metrics)
    return metrics


def load_model_and_shards(model_folder: Path, shards_folder: Path) -> tuple[Any, Any]:
    """A model and the shards that it is to read, checked to come from the encoder that it was trained on."""
    import torch

    from videoclip.data.shards import Shards, check_encoder
    from videoclip.model import VideoCLIP

    model = VideoCLIP.from_pretrained(model_folder)
    shards = Shards(shards_folder)
    if model.config.video_encoder:
        check_encoder(
            shards.manifest, model.config.video_encoder, "the encoder the model was trained on", shards_folder
        )
    return (model.to("cuda") if torch.cuda.is_available() else model), shards
