"""How extraction scales, on made nodes of one machine: encoders that only wait, so that what is measured is all else.

`scale`: one actor and 16 on four Ray nodes with logical GPUs, each with the same number of videos; then the same with a
video of ten times the length in the middle of the list, and as its last.
`list`: a list of 1.2 million videos: seconds until the first one starts, and the driver's memory.
`open`: shards of 1.2 million videos of a few tokens: seconds and memory to open them, and files open at once.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.extraction_worker import ExtractionWorker, Outcome, Work, WorkerOptions, actor_options

DIMENSION = 16


class WaitingWorker(ExtractionWorker):
    """Its videos are locations that say how many seconds to wait, and in stretches of how many; a token a second."""

    def ready(self) -> str:
        """Nothing has to be loaded."""
        return "nothing"

    def _tokens(self, work: Work) -> tuple[Outcome, np.ndarray | None]:
        seconds, _, stretch = work.video.location.partition(" in ")
        length, first, last, seam = float(seconds), 0.0, float(seconds), None
        if stretch:
            from videoclip.encoders.stretches import Seam, cut

            if work.stretch is None:
                return Outcome(duration=length, stretches=tuple(cut(length, int(stretch)))), None
            first, last = work.stretch.first, work.stretch.last or length
            seam = Seam(b"%d" % first if first else b"", b"%d" % last)
        time.sleep(last - first)
        tokens = np.zeros((max(1, int(last - first)), DIMENSION), np.float16)
        return Outcome(len(tokens), length, seam=seam), tokens


def run_waiting(folder: Path, waits: list[str], pool: Any) -> float:
    """Extract videos that take so long; returns seconds."""
    from tqdm import tqdm

    from pipelines.caption_source import CaptionSource
    from pipelines.extract import ExtractConfig, _missing
    from pipelines.extraction import Extraction
    from pipelines.runs import Quarantine
    from videoclip.data.shards import Manifest
    from videoclip.data.stored_list import VideoList
    from videoclip.data.video_lists import ListedVideo

    folder.mkdir(parents=True)
    manifest = Manifest("waiting", "0" * 64, DIMENSION)
    manifest.write(folder)
    videos = VideoList.write(folder, (ListedVideo(f"v{n:07d}", wait) for n, wait in enumerate(waits)), print)
    config = ExtractConfig(Path("made"), folder, videos_per_part=16)
    parts = _missing(config, manifest, videos, np.zeros(0, np.uint64))
    captions = CaptionSource(None, False, 0, Quarantine(folder), videos)
    run = Extraction(folder, manifest, videos, parts, captions, tqdm(disable=True))
    start = time.perf_counter()
    run.run(pool)
    seconds = time.perf_counter() - start
    assert sum(part.videos for part in Manifest.read(folder).parts) == len(waits)
    return seconds


def started_pool(workers: int, folder: Path) -> Any:
    """A pool of so many actors of one logical GPU, all of them ready."""
    import ray

    from pipelines.extraction_pool import Pool

    actor: Any = ray.remote(**actor_options(1, 1, 1))(WaitingWorker)
    pool = Pool(lambda: actor.remote(WorkerOptions(folder, expects_gpu=True)), lambda: workers, 1)
    while len(pool.devices) < workers:
        pool.next()
    return pool


def scale(options: argparse.Namespace) -> None:
    """Print the table of actors and of stragglers."""
    import ray
    from ray.cluster_utils import Cluster

    nodes, wait, each, actors = options.nodes, options.wait, options.videos, options.actors
    of_node = {"num_cpus": actors // nodes, "num_gpus": actors // nodes, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**of_node, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(**of_node)
    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}}
    ray.init(address=cluster.address, runtime_env=environment, log_to_driver=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            print(f"{'':44s}{'videos':>8s}{'seconds':>9s}{'ideal':>8s}{'lost':>7s}")
            pool = started_pool(1, folder)
            one = run_waiting(folder / "one", [str(wait)] * each, pool)
            pool.close()
            row("1 actor", each, one, wait * each)
            pool = started_pool(actors, folder)
            waits = [str(wait)] * each * actors
            many = run_waiting(folder / "many", waits, pool)
            row(f"{actors} actors on {nodes} nodes", len(waits), many, wait * each)
            print(f"{actors} actors do {actors * one / many:.1f} times the work of one")
            ideal = (wait * len(waits) + 10 * wait) / actors
            for what, place, location in (
                ("one of ten times the length, in the middle", len(waits) // 2, str(10 * wait)),
                ("the same as the last, in stretches", len(waits), f"{10 * wait} in {max(1, int(wait))}"),
                ("the same as the last, uncut", len(waits), str(10 * wait)),
            ):
                taken = run_waiting(folder / what, [*waits[:place], location, *waits[place:]], pool)
                row(what, len(waits) + 1, taken, ideal)
            pool.close()
        finally:
            ray.shutdown()
            cluster.shutdown()


def row(what: str, videos: int, seconds: float, ideal: float) -> None:
    """Print one row; `ideal` is all waiting, shared out evenly."""
    print(f"{what:44s}{videos:8d}{seconds:9.1f}{ideal:8.1f}{100 * (seconds / ideal - 1):6.1f}%", flush=True)


def peak_memory() -> float:
    """Of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def list_start(options: argparse.Namespace) -> None:
    """A list like HowTo100M's, up to the first call of an actor."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "HowTo100M_v1.csv"
        with open(path, "w") as file:
            file.write("video_id,category_1,category_2,rank,task_id\n")
            for number in range(options.count):
                file.write(f"v{number:010d},Food and Entertaining,Recipes,{number % 200},{number % 23000}\n")
        start, processor = time.perf_counter(), time.process_time()
        from pipelines.extract import ExtractConfig, _missing
        from pipelines.extraction import Extraction
        from pipelines.extraction_pool import Pool
        from videoclip.data.shards import Manifest
        from videoclip.data.stored_list import VideoList
        from videoclip.data.video_lists import read_videos

        print(f"imports                 {time.perf_counter() - start:7.1f} s, {peak_memory():.2f} GB")
        videos = VideoList.write(Path(name), read_videos(path, Path("/videos")), print)
        print(f"list read               {time.perf_counter() - start:7.1f} s, {peak_memory():.2f} GB")
        folder = Path(name) / "shards"
        folder.mkdir()
        manifest = Manifest("x3d-s", "0" * 64, 864)
        manifest.write(folder)
        parts = _missing(ExtractConfig(path, folder), manifest, videos, np.zeros(0, np.uint64))
        print(f"{len(parts):6d} parts planned    {time.perf_counter() - start:7.1f} s, {peak_memory():.2f} GB")
        from tqdm import tqdm

        from pipelines.caption_source import CaptionSource
        from pipelines.runs import Quarantine

        captions = CaptionSource(None, False, 0, Quarantine(folder), videos)
        run = Extraction(folder, manifest, videos, parts, captions, tqdm(disable=True))
        job = next(run._jobs(Pool(lambda: None, lambda: 1, 1)))
        taken, used = time.perf_counter() - start, time.process_time() - processor
        print(
            f"first video handed out  {taken:7.1f} s ({used:.1f} of this process), {peak_memory():.2f} GB: {job.work}"
        )


def open_shards(options: argparse.Namespace) -> None:
    """Write shards of many short videos once, and open them in a fresh process."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        write_shards(Path(name) / "shards", options.count)
        print(f"{options.count} videos in {len(list(Path(name).glob('shards/part-*')))} parts", flush=True)
        subprocess.run([sys.executable, __file__, "opened", str(Path(name) / "shards")], check=True)


def write_shards(folder: Path, count: int) -> None:
    """Shards of videos of three tokens and a caption each. The parts share a few contents under other ids."""
    from videoclip.data.captions import Captions
    from videoclip.data.shards import Manifest, ShardWriter, VideoRecord

    writer = ShardWriter(folder, Manifest("few", "0" * 64, DIMENSION), 256)
    writer.manifest.write = lambda _: None  # type: ignore[method-assign]  # once at the end is enough here
    tokens = np.ones((3, DIMENSION), np.float16)
    captions = Captions(np.array([0.5], np.float32), np.array([2.5], np.float32), ["stir the onion slowly"])
    for number in range(count):
        writer.add(VideoRecord(f"v{number:010d}", 3.0, tokens, captions))
    del writer.manifest.write  # type: ignore[method-assign]
    writer.close()


def opened(options: argparse.Namespace) -> None:
    """Open shards, in a process of its own."""
    from videoclip.data.clips import ClipConfig, ClipSampler
    from videoclip.data.shards import Shards
    from videoclip.data.words import train_wordpiece

    most = {"files": 0}
    watcher = threading.Thread(target=_watch_open_files, args=(most,), daemon=True)
    watcher.start()
    print(f"imports                 {peak_memory():.2f} GB")
    start, used = time.perf_counter(), time.process_time()
    shards = Shards(options.shards)
    told("opened", start, used)
    ids = shards.video_ids()
    told(f"{len(ids)} ids", start, used)
    del ids
    print(f"                        {shards.seconds().sum()} seconds")
    told("lengths", start, used)
    start, used = time.perf_counter(), time.process_time()
    tokenizer = train_wordpiece(["stir the onion slowly"], 100)
    with tempfile.TemporaryDirectory() as cache:
        sampler = ClipSampler(shards, tokenizer, ClipConfig(), Path(cache))
        told("words of captions", start, used)
        rows = sampler.usable_rows()
        told("rows with captions", start, used)
        generator = np.random.default_rng(0)
        for _ in range(20):
            sampler.batch(generator.choice(rows, 32), generator)
        told("20 batches of 32", start, used)
    print(f"most files open at once {most['files']}")


def told(what: str, start: float, used: float) -> None:
    """Print how long and how large until here."""
    taken, processor = time.perf_counter() - start, time.process_time() - used
    print(f"{what:24s}{taken:6.1f} s ({processor:.1f} of this process), {peak_memory():.2f} GB", flush=True)


def _watch_open_files(most: dict[str, int]) -> None:
    while True:
        most["files"] = max(most["files"], len(os.listdir("/proc/self/fd")))
        time.sleep(0.05)


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind")
    of_scale = kinds.add_parser("scale")
    of_scale.add_argument("--nodes", type=int, default=4)
    of_scale.add_argument("--actors", type=int, default=16)
    of_scale.add_argument("--videos", type=int, default=24, help="for each actor")
    of_scale.add_argument("--wait", type=float, default=2.5, help="seconds a video")
    of_scale.set_defaults(run=scale)
    for kind, function, count in (
        ("list", list_start, 1_200_000),
        ("open", open_shards, 1_200_000),
    ):
        of_kind = kinds.add_parser(kind)
        of_kind.add_argument("--count", type=int, default=count)
        of_kind.add_argument("--folder", help="where large files may lie")
        of_kind.set_defaults(run=function)
    of_opened = kinds.add_parser("opened", help="used by `open`")
    of_opened.add_argument("shards", type=Path)
    of_opened.set_defaults(run=opened)
    options = parser.parse_args()
    if options.kind is None:
        for kind in ("scale", "list", "open"):
            print(f"-- {kind}", flush=True)
            subprocess.run([sys.executable, __file__, kind], check=True)
        return
    options.run(options)


if __name__ == "__main__":
    main()
