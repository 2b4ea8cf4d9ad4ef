"""HowTo100M's caption file as a stream: memory and time to make the table of it, and to look videos up.

Two files of one form and different size, 110 lines a video, each read by a process of its own: what memory does not
grow with the file does not grow with 9 GB. Beside them the whole file as Python's json reads it. Then word ids of the
captions of shards, made by one worker and by two at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WORDS = ["so", "now", "we", "take", "the", "onion", "and", "cut", "it", "into", "small", "even", "pieces", "heat"]
MEASURED = """
import json, resource, sys, time
from pathlib import Path
from videoclip.data.caption_table import CaptionTable
import pyarrow
def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = memory(), time.perf_counter()
if sys.argv[1] == "whole":
    table = json.loads(Path(sys.argv[2]).read_bytes())
else:
    table = CaptionTable.make(Path(sys.argv[2]), Path(sys.argv[3]))
took, used = time.perf_counter() - start, memory() - before
start = time.perf_counter()
for number in range(0, len(table), max(1, len(table) // 1000)):
    assert table[f"video_{number}"]["text"]
lookup = (time.perf_counter() - start) / min(1000, len(table))
print(json.dumps({"seconds": took, "memory": used, "lookup": lookup}))
"""


def write_captions(path: Path, megabytes: float) -> int:
    """A file of at least so many MB; returns how many videos are in it."""
    generator, written, number = np.random.default_rng(0), 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            start = np.sort(generator.uniform(0, 386, 110)).round(2)
            text = [" ".join(words) for words in generator.choice(WORDS, (110, 8))]
            one = json.dumps({"start": start.tolist(), "end": (start + 3.5).tolist(), "text": text})
            written += file.write(f'{"," if number else "{"}"video_{number}": {one}')
            number += 1
        file.write("}")
    return number


def measured(how: str, path: Path, folder: Path) -> dict[str, float]:
    """Figures of a process that reads `path` `whole` or as a `table` in `folder`."""
    command = [sys.executable, "-c", MEASURED, how, str(path), str(folder)]
    values: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return values


def word_ids(folder: Path, videos: int) -> tuple[float, float]:
    """Seconds until the word ids of all captions are there, made by one process and by two."""
    from videoclip.data.captions import Captions
    from videoclip.data.shards import Manifest, ShardWriter, VideoRecord
    from videoclip.data.words import train_wordpiece

    generator = np.random.default_rng(0)
    writer = ShardWriter(folder / "shards", Manifest("random", "0" * 64, 1), videos_per_part=8)
    for number in range(videos):
        start = np.sort(generator.uniform(0, 386, 110)).astype(np.float32)
        text = [" ".join(words) for words in generator.choice(WORDS, (110, 8))]
        writer.add(VideoRecord(str(number), 390.0, np.zeros((1, 1), np.float16), Captions(start, start + 3.5, text)))
    writer.close()
    train_wordpiece(WORDS, 200).save(folder)
    code = """
import os, sys
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
from pathlib import Path
from videoclip.data.shards import Shards
from videoclip.data.words import CaptionWords, WordTokenizer
shards, tokenizer = Shards(Path(sys.argv[1]) / "shards"), WordTokenizer.load(Path(sys.argv[1]))
print("ready", flush=True); sys.stdin.readline()
CaptionWords(shards, tokenizer, Path(sys.argv[2]), slice(int(sys.argv[3]), None, int(sys.argv[4])))
"""
    took = []
    for workers in (1, 2):
        commands = [
            [sys.executable, "-c", code, str(folder), str(folder / f"words-{workers}"), str(rank), str(workers)]
            for rank in range(workers)
        ]
        pipe = subprocess.PIPE
        processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for command in commands]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        start = time.perf_counter()
        for process in processes:
            process.communicate("go\n")
            assert process.returncode == 0
        took.append(time.perf_counter() - start)
    return took[0], took[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--videos", type=int, default=6000, help="of the shards whose captions become word ids")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{'':34s}{'MB':>8s}{'videos':>9s}{'seconds':>9s}{'memory':>10s}{'a lookup':>11s}")
        for how, megabytes in (
            ("table", options.megabytes / 4),
            ("table", options.megabytes),
            ("whole", options.megabytes),
        ):
            path = folder / f"{megabytes:g}.json"
            videos = write_captions(path, megabytes)
            got = measured(how, path, folder)
            label = "as a table" if how == "table" else "whole, as Python's objects"
            print(
                f"{label:34s}{path.stat().st_size / 1e6:8.0f}{videos:9,d}{got['seconds']:9.1f}{got['memory']:7.0f} MB"
                f"{1e6 * got['lookup']:8.0f} us"
            )
        one, two = word_ids(folder, options.videos)
        each = options.videos * 110 / one
        print(f"word ids: {each:,.0f} captions a second by one worker, {one / two:.2f} times as many by two")


if __name__ == "__main__":
    main()
