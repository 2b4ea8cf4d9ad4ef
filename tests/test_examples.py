"""What the documentation shows, runs."""

import runpy
from collections.abc import Callable
from pathlib import Path

from videoclip.data.shards import Shards

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_training_without_ray_is_some_forty_lines_and_finds_a_second(make_shards: Callable[..., Shards]) -> None:
    shards = make_shards()
    main = runpy.run_path(str(EXAMPLES / "train_without_ray.py"))["main"]
    video_id, second = main(shards.folder, shards.record(0).captions.text[0], epochs=1)
    row = shards.rows_by_id()[video_id]
    assert 0 <= second < len(shards.tokens(row))
