"""`videoclip index` and `videoclip search`: find videos and moments of a folder of shards by describing them.

The index folder holds `index.faiss`, `windows.npz` (video row, start and end in seconds of every indexed window),
`video_ids.json`, and `index.json` with the fingerprint of the model that made it, which a search must use again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import Positional

from pipelines.ray_session import ray_session
from pipelines.runs import embed_parts, start_run, with_absolute_paths, writes_output
from videoclip.errors import InputError
from videoclip.files import atomic_path, read_arrays, read_json, sha256, write_arrays, write_json

if TYPE_CHECKING:
    from videoclip.data.shards import Shards

SAMPLED_CAPTIONS = 512  # that the recall of the index is measured with


@dataclass(frozen=True)
class IndexConfig:
    """Index every window of every video, so that a search takes milliseconds. Run it again to go on."""

    model: Path
    """Folder of a trained model; or `frozen`: the two-tower model that made the shards, with no training at all."""
    shards: Path
    """Folder that `videoclip extract` wrote."""
    output: Path = Path("runs/index")
    window: int = 8
    """Seconds of an indexed window; a shorter video is one window."""
    stride: int = 4
    """Seconds between the starts of two windows."""
    faiss_index: str = ""
    """A Faiss index string such as IVF4096,SQ8; by default chosen by the number of windows and their width."""
    address: str | None = None
    """Ray cluster to join; without it Ray runs on this machine."""


@dataclass(frozen=True)
class SearchConfig:
    """Print the moments, or the videos, that answer a description best."""

    query: Annotated[str, Positional]
    """What to look for, in quotes."""
    model: Path
    """Folder of the model that made the index, or `frozen`."""
    index: Path = Path("runs/index")
    count: int = 10
    """How many answers."""
    videos: bool = False
    """Each video once, by its best moment."""


@dataclass(frozen=True)
class Moment:
    """One answer; times in seconds, `score` the cosine of query and window."""

    video_id: str
    start: int
    end: int
    score: float


@writes_output
def build_index(config: IndexConfig) -> None:
    """Run the stage.

    Raises InputError if model and shards do not fit each other, or the options make no windows.
    """
    from videoclip.embedding import embed_texts
    from videoclip.evaluation.inputs import load_model_and_shards
    from videoclip.retrieval.index import SimilarityIndex, choose_index, load_faiss

    load_faiss()  # before all windows are embedded for an index that cannot be made
    config = with_absolute_paths(config)
    if not 1 <= config.stride <= config.window:
        raise InputError("a stride must be at least one second and at most a window, or seconds would be missed")
    model, shards = load_model_and_shards(config.model, config.shards)
    if config.window > model.config.max_seconds:
        raise InputError(f"a window may have at most {model.config.max_seconds} seconds with this model")
    start_run(config.output, "index_run", config)
    with ray_session(config.address):
        settings = f"{config.window}-{config.stride}"
        paths = embed_parts(_embed_some, config, shards, "windows", settings, "indexing")
    parts = [read_arrays(path) for path in paths]
    features = np.concatenate([part["features"] for part in parts])
    kind = config.faiss_index or choose_index(*features.shape)
    captions = [] if kind == "Flat" else _sample_of_captions(shards)
    texts = embed_texts(model, captions) if captions else None
    index = SimilarityIndex.build(features, kind, texts, "captions")
    asked = " (asked with windows: the shards have no captions)" if kind != "Flat" and not captions else ""
    with atomic_path(config.output / "index.faiss") as temporary:
        index.save(temporary)
    write_arrays(config.output / "windows.npz", windows=np.concatenate([part["windows"] for part in parts]))
    write_json(config.output / "video_ids.json", shards.video_ids())
    description = {
        "model": _identity(config.model, config.shards),
        "shards": str(config.shards),
        "index": sha256(config.output / "index.faiss"),
        "windows": len(features),
        "description": index.description + asked,
    }
    write_json(config.output / "index.json", description)
    print(f"{len(features)} windows of {len(shards)} videos in {config.output}: {description['description']}")


def _sample_of_captions(shards: Shards) -> list[str]:
    """Up to SAMPLED_CAPTIONS different captions, spread over the videos: what the index will be asked, near enough.

    As few from each video as the number of videos allows; the same every time.
    """
    generator = np.random.default_rng(0)
    chosen = generator.permutation(len(shards))
    each = -(-SAMPLED_CAPTIONS // max(1, len(shards)))
    texts: dict[str, None] = {}
    for row in chosen.tolist():
        part, place = shards.locate(row)
        said = shards.parts[part].captions(place).text
        if said:
            picked = generator.choice(len(said), min(each, len(said)), replace=False)
            texts.update(dict.fromkeys(said[i] for i in picked))
        if len(texts) >= SAMPLED_CAPTIONS:
            break
    return list(texts)[:SAMPLED_CAPTIONS]


def _embed_some(config: IndexConfig, parts: list[tuple[int, Path]]) -> int:
    """Embed the windows of several parts, each into its file; the shards' other parts are not opened."""
    import torch

    from videoclip.evaluation.inputs import load_model_and_shards

    torch.set_num_threads(1)  # one task a CPU
    model, shards = load_model_and_shards(config.model, config.shards)
    for number, path in parts:
        write_arrays(path, **_windows_of_part(config, model, shards, number))
    return len(parts)


def _windows_of_part(config: IndexConfig, model: Any, shards: Any, number: int) -> dict[str, np.ndarray]:
    """`windows` int64 [W, 3] (video row, start, end) of a part's videos, and `features` float16 [W, H]."""
    from videoclip.embedding import embed_clips
    from videoclip.evaluation.localization import LocalizationConfig, sliding_windows

    sliding = LocalizationConfig(sliding_lengths=(config.window,), sliding_stride=config.stride)
    windows, features = [], []
    for row in range(shards.first_rows[number], shards.first_rows[number + 1]):
        tokens = shards.tokens(row)
        of_video = sliding_windows(len(tokens), sliding)
        if of_video[-1, 1] < len(tokens):  # the last seconds of a video must be found too
            of_video = np.append(of_video, [[len(tokens) - config.window, len(tokens)]], 0)
        windows.append(np.insert(of_video, 0, row, 1))
        features.append(embed_clips(model, tokens, of_video))
    return {"windows": np.concatenate(windows), "features": np.concatenate(features)}


def _identity(model: Path, shards: Path) -> str:
    """What tells one model from another: its weights' digest, or the fingerprint of the frozen towers."""
    from videoclip.data.shards import Manifest
    from videoclip.evaluation.inputs import is_frozen

    return Manifest.read(shards).fingerprint if is_frozen(model) else sha256(model / "model.safetensors")


def search(config: SearchConfig) -> list[Moment]:
    """Answer one query and print the answers, best first.

    Raises InputError if there is no index, it is damaged, or another model made it.
    """
    from videoclip.evaluation.inputs import is_frozen
    from videoclip.recipes import from_pretrained
    from videoclip.recipes.towers import frozen_towers
    from videoclip.retrieval.index import SimilarityIndex

    description = read_json(config.index / "index.json")
    if description["model"] != _identity(config.model, Path(description.get("shards", ""))):
        raise InputError(f"{config.index}: was made by another model; run `videoclip index` with this one")
    if description["index"] != sha256(config.index / "index.faiss"):
        raise InputError(f"{config.index / 'index.faiss'}: is damaged; run `videoclip index` again")
    if not config.query.strip():
        raise InputError("the query is empty")
    frozen = is_frozen(config.model)
    model = frozen_towers(Path(description["shards"])) if frozen else from_pretrained(config.model)
    text = model.encode_text([config.query]).numpy()
    index = SimilarityIndex.load(config.index / "index.faiss", description["description"])
    with np.load(config.index / "windows.npz") as stored:
        windows = stored["windows"]
    video_ids = read_json(config.index / "video_ids.json")
    wanted = 50 * config.count  # overlapping windows of a moment are thinned out below
    while True:
        scores, rows = index.search(text / np.linalg.norm(text), min(wanted, len(windows)))
        there = rows[0] >= 0
        moments = _thin_out(windows[rows[0][there]], scores[0][there], video_ids, config)
        if len(moments) == config.count or wanted >= len(windows):
            break
        wanted *= 4  # a few long videos fill the first places: look further
    for place, moment in enumerate(moments, 1):
        print(f"{place:3d}  {moment.score:6.3f}  {moment.start:6d} - {moment.end:6d} s  {moment.video_id}")
    return moments


def _thin_out(windows: np.ndarray, scores: np.ndarray, video_ids: list[str], config: SearchConfig) -> list[Moment]:
    """The best windows [W, 3] (video row, start, end), none touching a better one of its video, or one a video."""
    kept: list[Moment] = []
    for (row, start, end), score in zip(windows.tolist(), scores.tolist()):
        video_id = video_ids[row]
        of_video = [moment for moment in kept if moment.video_id == video_id]
        if (config.videos and of_video) or any(m.start < end and start < m.end for m in of_video):
            continue
        kept.append(Moment(video_id, start, end, score))
        if len(kept) == config.count:
            break
    return kept
