"""A world on disk: shards, or a folder of features, and annotations in the public formats."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from videoclip.data.shards import Manifest, ShardWriter
from videoclip.files import write_array, write_json
from videoclip.synthetic.world.plan import BLOCK, World, WorldVideo
from videoclip.synthetic.world.words import VERBS

ALL_DOMAINS = "youcookii_all.json"


def videos_of(world: World, split: str) -> Iterator[WorldVideo]:
    """Every video of a split, drawn block by block."""
    for number in range(-(-world.video_count(split) // BLOCK)):
        yield from world.block(split, number)


def write_world(world: World, folder: Path) -> None:
    """Write `train` and `test` as shards, and the annotations of the test videos.

    `topics.json` names every video's topic; `youcookii_domain-NN.json` holds the clips of one domain and
    `youcookii_all.json` as many clips of all domains, both in YouCook2's form.
    """
    folder = Path(folder)
    identity = hashlib.sha256(repr(sorted(asdict(world.config).items())).encode()).hexdigest()
    topics: dict[str, str] = {}
    for split in ("train", "test"):
        writer = ShardWriter(folder / split, Manifest("world", identity, world.config.dimension), 1000)
        for video in videos_of(world, split):
            writer.add(video.record)
            topics[video.record.video_id] = f"{video.domain}/{world.topic_names[video.topic]}"
        writer.close()
    write_json(folder / "topics.json", topics)
    write_annotations(world, folder)


def write_features(world: World, folder: Path) -> None:
    """Write what `videoclip convert features` reads: `<split>/<id>.npy`, and `raw_caption.json` of the training split.

    Annotations and topics as `write_world`.
    """
    folder = Path(folder)
    captions: dict[str, Any] = {}
    topics: dict[str, str] = {}
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for video in videos_of(world, split):
            record = video.record
            write_array(folder / split / f"{record.video_id}.npy", record.tokens)
            topics[record.video_id] = f"{video.domain}/{world.topic_names[video.topic]}"
            if split == "train":
                times = {"start": record.captions.start.tolist(), "end": record.captions.end.tolist()}
                captions[record.video_id] = {**times, "text": record.captions.text}
    write_json(folder / "raw_caption.json", captions)
    write_json(folder / "topics.json", topics)
    write_annotations(world, folder)


def write_annotations(world: World, folder: Path) -> None:
    """The galleries: one for every domain, and one of as many videos drawn evenly from all domains."""
    test = list(videos_of(world, "test"))
    for domain in range(world.config.domains):
        of_domain = [video for video in test if video.domain == domain]
        write_json(Path(folder) / f"youcookii_domain-{domain:02d}.json", gallery(world, of_domain))
    write_json(Path(folder) / ALL_DOMAINS, gallery(world, test[:: world.config.domains + 1]))


def gallery(world: World, videos: list[WorldVideo]) -> dict[str, Any]:
    """YouCook2's layout: every step of the videos as a segment with a sentence."""
    return {"database": {video.record.video_id: _annotated(world, video) for video in videos}}


def _annotated(world: World, video: WorldVideo) -> dict[str, Any]:
    around = " ".join(world.attribute_words(video.attributes))
    annotations = [
        {"id": i, "segment": [round(a), round(b)], "sentence": f"{VERBS[verb]} the {world.thing_names[thing]} {around}"}
        for i, ((a, b), verb, thing) in enumerate(zip(video.steps.tolist(), video.verb, video.thing))
    ]
    return {
        "subset": "validation",
        "recipe_type": str(video.topic),
        "duration": video.record.duration,
        "annotations": annotations,
    }
