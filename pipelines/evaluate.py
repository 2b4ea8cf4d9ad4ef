"""Stage three: zero-shot evaluation of a model on shards and official annotation files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.errors import InputError
from videoclip.evaluation.prompts import PLAIN, embed_texts
from videoclip.files import write_json, write_json_lines


@dataclass(frozen=True)
class ZeroShotConfig:
    """What evaluations have in common."""

    model: Path
    """Folder of a trained model."""
    shards: Path
    """Folder of shards with the annotated videos."""
    annotations: Path
    """The benchmark's official file."""
    output: Path = Path("runs/evaluation/metrics.json")
    """Metrics; what was answered, item by item, goes to predictions.jsonl beside it."""
    templates: tuple[str, ...] = PLAIN
    """Texts are put into each of these in place of {}, and the embeddings averaged."""


@dataclass(frozen=True)
class GalleryConfig(ZeroShotConfig):
    """What retrieval evaluations have in common."""

    gallery: Path | None = None
    """What each video is about, a json object {video_id: topic} or HowTo100M_v1.csv: texts and clips of one topic are
    ranked among themselves, which asks for near things to be told apart. Without it all are ranked together."""


@dataclass(frozen=True)
class RetrievalConfig(GalleryConfig):
    """Text-to-video retrieval over YouCook2's annotated clips: R@K and ranks, beside chance."""

    annotations: Path
    """youcookii_annotations_trainval.json, or the csv that MIL-NCE distributes."""
    output: Path = Path("runs/evaluation/youcook2/metrics.json")
    subset: str = "validation"


@dataclass(frozen=True)
class MSRVTTConfig(GalleryConfig):
    """Text-to-video retrieval over whole MSR-VTT videos: R@K and ranks, beside chance."""

    annotations: Path
    """MSRVTT_JSFUSION_test.csv (1k-A), or the full json with twenty sentences a video."""
    output: Path = Path("runs/evaluation/msrvtt/metrics.json")
    split: str = "test"
    """Of the json."""


@dataclass(frozen=True)
class DiDeMoConfig(GalleryConfig):
    """Text-to-video retrieval over whole DiDeMo videos: R@K and ranks, beside chance."""

    annotations: Path
    """test_data.json, or val_data.json."""
    output: Path = Path("runs/evaluation/didemo/metrics.json")
    queries: str = "paragraph"
    """paragraph (all descriptions of a video joined, as the field reports it), or sentence."""


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
    templates: tuple[str, ...] = PLAIN
    """Queries are put into each of these in place of {}, and the embeddings averaged."""


def evaluate_retrieval(config: RetrievalConfig) -> dict[str, Any]:
    """Run YouCook2 retrieval; returns the metrics that it writes.

    Raises InputError if files do not fit each other or no annotated clip is in the shards.
    """
    from videoclip.data.youcook2 import read_youcook2

    return _retrieve(config, read_youcook2(config.annotations, config.subset))


def evaluate_msrvtt(config: MSRVTTConfig) -> dict[str, Any]:
    """Run MSR-VTT retrieval; as `evaluate_retrieval`."""
    from videoclip.data.msrvtt import read_msrvtt

    return _retrieve(config, read_msrvtt(config.annotations, config.split))


def evaluate_didemo(config: DiDeMoConfig) -> dict[str, Any]:
    """Run DiDeMo retrieval; as `evaluate_retrieval`."""
    from videoclip.data.didemo import read_didemo

    return _retrieve(config, read_didemo(config.annotations, config.queries))


def _retrieve(config: GalleryConfig, annotated: list[AnnotatedClip]) -> dict[str, Any]:
    """Embed clips and sentences, rank each for the other, and write metrics and predictions."""
    import numpy as np

    from videoclip.evaluation.localization import embed_windows
    from videoclip.evaluation.retrieval import gather_clips, retrieval_metrics, retrieve, windows_of_lengths

    model, shards = load_model_and_shards(config.model, config.shards)
    gathered = gather_clips(shards, annotated, model.config.max_seconds)
    clips = gathered.clips
    galleries = None if config.gallery is None else _galleries(clips, config.gallery)
    videos = embed_windows(model, gathered.tokens, windows_of_lengths(gathered.lengths))
    positives = np.repeat(np.arange(len(clips)), [len(clip.sentences) for clip in clips])
    sentences = [sentence for clip in clips for sentence in clip.sentences]
    texts = embed_texts(model, sentences, config.templates)
    result = retrieve(texts, videos, positives, galleries)
    metrics = {
        **retrieval_metrics(result.ranks, result.size),
        "clips": len(clips),
        "dropped": gathered.dropped,
        "video_to_text": retrieval_metrics(result.clip_ranks, result.clip_size),
    }
    if galleries is not None:
        metrics["galleries"] = len(set(galleries))
    rows = [
        {**_as_row(clips[own], sentence), "rank": float(rank), "found": [_as_row(clips[i]) for i in best]}
        for own, sentence, rank, best in zip(positives, sentences, result.ranks, result.found)
    ]
    return write_results(config.output, metrics, rows)


def _galleries(clips: list[AnnotatedClip], path: Path) -> list[str]:
    """The topic of every clip's video.

    Raises InputError if a video has none: leaving it out would compare other queries with other queries.
    """
    from videoclip.data.howto100m import read_topics

    topics = read_topics(path)
    missing = sorted({clip.video_id for clip in clips} - topics.keys())
    if missing:
        raise InputError(
            f"{path}: has no topic for {len(missing)} of the evaluated videos, for instance {missing[0]!r}; add them"
        )
    return [topics[clip.video_id] for clip in clips]


def write_results(output: Path, metrics: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write metrics to `output` and what was answered to predictions.jsonl beside it; returns the metrics."""
    write_json_lines(output.parent / "predictions.jsonl", rows)
    write_json(output, metrics)
    return metrics


def _as_row(clip: AnnotatedClip, sentence: str | None = None) -> dict[str, Any]:
    said = clip.sentences[0] if sentence is None else sentence
    return {"video_id": clip.video_id, "start": clip.start, "end": clip.end, "sentence": said}


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

        model, shards = load_model_and_shards(config.model, config.shards)
        predictions, missing = localize(model, shards, queries, templates=config.templates)
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
