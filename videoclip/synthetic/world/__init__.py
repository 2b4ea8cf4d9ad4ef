"""A world of tokens: many domains, each of many topics, in seconds and of any size.

The kitchen is one domain and so small that random batches are similar ones. Here a batch is a small part of what there
is, so what a batch is made of can be told apart: `docs/batches.md`.
"""

from videoclip.synthetic.world.files import (
    ALL_DOMAINS,
    gallery,
    videos_of,
    write_annotations,
    write_features,
    write_world,
)
from videoclip.synthetic.world.plan import INTRODUCTION, OFF_TOPIC, World, WorldConfig, WorldVideo

__all__ = [
    "ALL_DOMAINS",
    "INTRODUCTION",
    "OFF_TOPIC",
    "World",
    "WorldConfig",
    "WorldVideo",
    "gallery",
    "videos_of",
    "write_annotations",
    "write_features",
    "write_world",
]
