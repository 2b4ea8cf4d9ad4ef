"""Extraction without Ray: lists, stretches, shared batches, plans, and the driver's side of a run, kills included."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_video
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from ray.exceptions import ObjectLostError
from tqdm import tqdm

from pipelines.caption_source import CaptionSource
from pipelines.extract import ExtractConfig, _complete, _missing
from pipelines.extraction import EncodeJob, Extraction, WriteJob
from pipelines.extraction_plan import cut_into_parts, read_plans, videos_in_part
from pipelines.extraction_pool import DEATHS, Answer, Job
from pipelines.extraction_worker import ExtractionWorker, Outcome, Work, WorkerOptions
from pipelines.runs import Quarantine
from videoclip.data.shards import Manifest, Shards
from videoclip.data.stored_list import VideoList, digests_of
from videoclip.data.video import FrameFormat, clips_of_seconds, decode_seconds
from videoclip.data.video_lists import BadRow, ListedVideo, local_path, read_videos
from videoclip.encoders.decoders import TorchcodecDecoder, make_decoder
from videoclip.encoders.pixels import Pixels
from videoclip.encoders.shared_batches import SharedBatches
from videoclip.encoders.stretches import Seam, Stretch, cut, fit_together, stretch_clips
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.encoders.x3d import X3D
from videoclip.errors import InputError
from videoclip.remote import is_remote

# --- Lists --------------------------------------------------------------------------------------------------------


def listed(path: Path, text: str, root: Path | None = None) -> list[ListedVideo | BadRow]:
    path.write_text(text)
    return list(read_videos(path, root))


def test_a_list_says_which_seconds_of_which_file_and_what_is_said(tmp_path: Path) -> None:
    rows = listed(
        tmp_path / "list.csv",
        "video_id,path,start,end,caption\n"
        "a,clips/a.mp4,,,\n"
        'b,/data/b.mp4,3,9.5,"stir, slowly"\n'
        "../x,s3://bucket/x.mp4,,,two  words\n"
        "late,a.mp4,9,3,\n"
        ",,,,nobody\n"
        "odd,a.mp4,soon,,\n",
    )
    assert rows[:3] == [
        ListedVideo("a", str(tmp_path / "clips/a.mp4")),
        ListedVideo("b", "/data/b.mp4", 3.0, 9.5, "stir, slowly"),
        ListedVideo("../x", "s3://bucket/x.mp4", said="two words"),
    ]
    reasons = [row.reason for row in rows[3:] if isinstance(row, BadRow)]
    assert len(reasons) == 3 and all(f"list.csv:{line}" in reason for line, reason in zip((5, 6, 7), reasons))
    assert "must lie after its start" in reasons[0] and "no video id" in reasons[1] and "not a time" in reasons[2]
    assert is_remote(local_path("s3://bucket/x.mp4"))
    with pytest.raises(InputError, match="download it first"):
        local_path("https://bucket/x.mp4")


def test_published_lists_are_known_by_their_columns(tmp_path: Path) -> None:
    howto = "video_id,category_1,category_2,rank,task_id\nAbc_-123456,Food,Meat,1,7\n../../etc/x,Food,Meat,1,7\n"
    good, bad = listed(tmp_path / "HowTo100M_v1.csv", howto, tmp_path / "videos")
    assert isinstance(good, ListedVideo) and good.location == str(tmp_path / "videos" / "Abc_-123456.*")
    assert isinstance(bad, BadRow) and "cannot name a file" in bad.reason
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "Abc_-123456.webm").touch()
    assert local_path(good.location).suffix == ".webm"
    webvid = "videoid,contentUrl,duration,page_dir,name\n1066,https://x/1066.mp4,PT18S,a_b,A man stirs\n7,,,../..,x\n"
    good, bad = listed(tmp_path / "results_10M_val.csv", webvid)
    assert good == ListedVideo("1066", str(tmp_path / "a_b" / "1066.mp4"), said="A man stirs")
    assert isinstance(bad, BadRow), "a page_dir cannot lead out of the folder"
    (pair,) = listed(tmp_path / "Train_GCC.tsv", 'a "very" old house\tpictures/1.jpg\n')
    assert pair == ListedVideo("1", str(tmp_path / "pictures/1.jpg"), said='a "very" old house') and pair.is_picture
    with pytest.raises(InputError, match="no column that names videos"):
        listed(tmp_path / "other.csv", "colour,size\nred,3\n")


def test_json_and_parquet_rows_may_bring_timed_captions(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    said = {"start": [1.0], "end": [2.0], "text": ["chop"]}
    rows = [
        {"video_id": "a", "path": "a.mp4", "captions": said, "text": None},
        {"video_id": "b", "path": "b.mp4", "captions": None, "text": "stir"},
    ]
    lines = [json.dumps(row) for row in rows]
    found = listed(tmp_path / "list.jsonl", "\n".join([*lines, "", "[1", "7"]))
    assert [isinstance(row, BadRow) for row in found] == [False, False, True, True]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    assert found[:2] == list(read_videos(tmp_path / "list.parquet"))
    assert isinstance(found[0], ListedVideo) and found[0].captions(9) == said
    assert isinstance(found[1], ListedVideo) and found[1].captions(9) == {"start": [0], "end": [9], "text": ["stir"]}
    (tmp_path / "list.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="not a parquet file"):
        list(read_videos(tmp_path / "list.parquet"))


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (90, 60)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


def test_a_picture_of_a_tar_is_a_clip_of_one_token(tmp_path: Path) -> None:
    members = {
        "000.png": picture((250, 10, 20)),
        "000.txt": b"a red wall\n",
        "001.json": b'{"caption": "a blue wall"}',
        "001.png": picture((10, 20, 250)),
        "002.txt": b"nothing to see",
        "003.png": b"\x89PNG broken",
    }
    path = write_tar(tmp_path / "00007.tar", members)
    rows = list(read_videos(path))
    assert [getattr(row, "said", None) for row in rows] == ["a red wall", "a blue wall", None, None]
    assert isinstance(rows[2], BadRow) and "holds no picture" in rows[2].reason
    assert list(read_videos(tmp_path)) == rows, "and of a folder of tars"
    worker = local_worker(tmp_path)
    outcomes, tokens = worker.encode([Work(row) for row in rows if isinstance(row, ListedVideo)])
    assert [outcome.seconds for outcome in outcomes] == [1, 1, 0]
    assert tokens[0] is not None and tokens[0].shape == (1, 32 * 32 * 3) and tokens[0][0, :3].tolist() == [250, 10, 20]
    assert "not a whole JPEG or PNG" in outcomes[2].reason and outcomes[2].kind == "input"


def test_ids_are_found_in_a_stored_list_and_repeated_ones_are_named(tmp_path: Path) -> None:
    bad: list[tuple[str, str, str]] = []
    rows = [ListedVideo(name, f"/v/{number}.mp4") for number, name in enumerate(["a", "b", "a", "../c"])]
    videos = VideoList.write(tmp_path, [*rows, BadRow("x", "why")], lambda *reason: bad.append(reason))
    assert bad == [
        ("x", "why", "row"),
        ("a", "/v/2.mp4: the id is taken by /v/0.mp4; the second file is left out", "file"),
    ]
    assert list(videos) == ["a", "b", "../c"] and videos["../c"] == Path("/v/3.mp4") and "d" not in videos
    assert videos.rows_of_digests(digests_of(["../c", "nobody", "a"])).tolist() == [3, -1, 0]


# --- Stretches ----------------------------------------------------------------------------------------------------

OFFSETS = np.arange(-2, 11)  # a clip reaches into the seconds before and after its own


def noise(number: int) -> np.ndarray:
    return np.random.default_rng([3, number]).integers(0, 255, (48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """29 seconds at 10 frames a second, every picture another; a key frame now and then."""
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", [n / 10 for n in range(290)], noise)


def test_stretches_together_are_the_clips_of_the_uncut_video(long_video: Path) -> None:
    fmt = FrameFormat(5, 32)
    whole = list(clips_of_seconds(decode_seconds(long_video, fmt), OFFSETS))
    stretches = cut(29.0, 8)
    assert stretches == [Stretch(0, 8), Stretch(8, 16), Stretch(16, None)]
    seams = [Seam() for _ in stretches]
    pieces = [list(stretch_clips(long_video, fmt, OFFSETS, *pair)) for pair in zip(stretches, seams)]
    lengths = [len(piece) for piece in pieces]
    assert fit_together(stretches, lengths, seams) and lengths == [8, 8, 13]
    assert np.array_equal(np.stack([clip for piece in pieces for clip in piece]), np.stack(whole))


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mkv", "libx264"), ("ts", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx")]
)
def test_stretches_of_any_container_are_those_of_the_uncut_video_or_known_not_to_be(
    tmp_path: Path, suffix: str, codec: str
) -> None:
    path = write_video(tmp_path / f"v.{suffix}", [n / 10 for n in range(250)], noise, codec=codec)
    fmt, stretches = FrameFormat(5, 32), [Stretch(0, 12), Stretch(12, None)]
    whole = list(clips_of_seconds(decode_seconds(path, fmt), OFFSETS))
    seams = [Seam(), Seam()]
    try:
        pieces = [list(stretch_clips(path, fmt, OFFSETS, *pair)) for pair in zip(stretches, seams)]
    except InputError:
        pieces = [[], []]
    if fit_together(stretches, [len(piece) for piece in pieces], seams):
        assert np.array_equal(np.stack([*pieces[0], *pieces[1]]), np.stack(whole))
    else:
        assert suffix in ("ts", "avi"), "where there is an index, seeking is exact"


def test_stretches_that_do_not_fit_are_known(long_video: Path) -> None:
    stretches = [Stretch(0, 8), Stretch(8, None)]
    seams = [Seam(b"", b"x"), Seam(b"x", b"")]
    assert fit_together(stretches, [8, 5], seams)
    assert not fit_together(stretches, [7, 5], seams), "too short"
    assert not fit_together(stretches, [8, 0], seams), "nothing"
    assert not fit_together(stretches, [8, 5], [Seam(b"", b"x"), Seam(b"y", b"")]), "other pictures"
    assert not fit_together(stretches, [8, 5], [Seam(), Seam()]), "no pictures"


# --- Shared batches -----------------------------------------------------------------------------------------------


def random_clips(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 8, 64, 64, 3), dtype=np.uint8)


def test_videos_that_share_batches_get_their_own_tokens_back() -> None:
    torch.set_num_threads(1)
    encoder = X3D("tiny")
    videos = [random_clips(count, seed) for seed, count in enumerate((3, 1, 6))]
    found: dict[int, np.ndarray] = {}
    with SharedBatches(encoder, 4, patience=0.5) as shared:
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: shared.encode_all(iter(videos[n]))})) for n in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert shared.batches <= 4, "ten clips are three batches of four, not one for each end of a video"
        assert shared.encode_all(iter(())).shape == (0, encoder.dimension)
        alone = [shared.encode_all(iter(video)) for video in videos]
    for number, video in enumerate(videos):
        np.testing.assert_array_equal(found[number], alone[number], "whatever shared its batches")
        np.testing.assert_allclose(found[number], encoder.encode_all(iter(video)), atol=2e-3)


def test_a_compiled_network_gives_the_same_tokens_and_errors_reach_their_videos() -> None:
    encoder = Pixels(32)
    clips = np.random.default_rng(0).integers(0, 255, (2, 1, 32, 32, 3), dtype=np.uint8)
    with SharedBatches(encoder, 2, compile_backend="eager") as shared:
        assert np.array_equal(shared.encode_all(iter(clips)), encoder.encode_all(iter(clips)))
    with SharedBatches(encoder, 2) as shared:
        with pytest.raises(RuntimeError):
            shared.encode_all(iter([np.zeros((8,), np.uint8)]))
        assert shared.encode_all(iter(clips)).shape == (2, encoder.dimension), "the others go on"


# --- Another decoder ----------------------------------------------------------------------------------------------


class StandInForTorchcodec:
    """torchcodec's face over PyAV's pictures; here its own library does not load."""

    def __init__(self, source: str, device: str, dimension_order: str, seek_mode: str) -> None:
        assert dimension_order == "NCHW" and seek_mode == "exact"
        fmt = FrameFormat(10, 48, scaled=False)
        seconds = list(decode_seconds(Path(source.removeprefix("file:")), fmt))
        self.pictures = torch.from_numpy(np.concatenate(seconds)).permute(0, 3, 1, 2)
        self.metadata = type("Metadata", (), {})()
        self.metadata.begin_stream_seconds, self.metadata.end_stream_seconds = 0.0, 29.0
        self.metadata.duration_seconds_from_header = 29.0

    def get_frames_played_at(self, seconds: list[float]) -> Any:
        numbers = [int(second * 10 + 1e-6) for second in seconds]
        return type("Frames", (), {"data": self.pictures[numbers]})()


def test_torchcodec_gives_the_frames_that_pyav_gives_within_a_few_grey_levels(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:96, 0:128]

    def wave(number: int) -> np.ndarray:
        value = 127 + 90 * np.sin((columns + 3 * number) / 17) * np.cos(rows / 13)
        return np.repeat(value[..., None], 3, 2).astype(np.uint8)

    path = write_video(tmp_path / "a.mp4", [n / 10 for n in range(290)], wave)
    decode = TorchcodecDecoder(StandInForTorchcodec, "cpu")
    for start, end in ((0.0, None), (3.0, 7.5)):
        ours, theirs = (list(way(path, FrameFormat(5, 48), start, end)) for way in (decode_seconds, decode))
        assert len(ours) == len(theirs) and ours[-1][-1].any() == theirs[-1][-1].any()
        assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(ours, theirs)) < 4


def test_where_torchcodec_does_not_load_pyav_decodes_unless_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    assert make_decoder("auto", "cuda") is decode_seconds
    with pytest.raises(InputError, match="does not load here"):
        make_decoder("torchcodec", "cuda")
    with pytest.raises(InputError, match="unknown decoder"):
        make_decoder("vhs", "cpu")


# --- Plans and runs -----------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([1, 32]), max_size=60), st.integers(1, 130))
def test_parts_hold_every_row_once_and_no_more_than_fits(weights: list[int], limit: int) -> None:
    bounds = cut_into_parts(np.array(weights, np.int64), limit)
    assert bounds[0] == 0 and bounds[-1] == len(weights) and (np.diff(bounds) > 0).all()
    for first, last in pairwise(bounds.tolist()):
        assert sum(weights[first:last]) <= limit or last - first == 1
    assert videos_in_part(256, 864) == 256 and videos_in_part(256, 64 * 64 * 3) < 30 and videos_in_part(2, 10**6) == 2


class Counting(VideoEncoder):
    """Tokens that say which video and second they are of, without any file."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.options, self.dimension = "counting", {}, 2
        self.frame_format, self.frame_offsets = FrameFormat(1, 1), np.zeros(1, np.int64)
        self.unused = torch.nn.Parameter(torch.zeros(1), requires_grad=False)


class CountingWorker(ExtractionWorker):
    """A worker whose videos are numbers: `location` is how long one is, or what is wrong with it."""

    def _tokens(self, work: Work) -> tuple[Outcome, np.ndarray | None]:
        length = int(work.video.location)
        if length < 0:
            raise InputError(f"{work.video.video_id} is broken")
        first, last = 0, length
        seam = Seam()
        if work.stretch is not None:
            first, last = work.stretch.first, work.stretch.last or length
            seam = Seam(b"%d" % first if first else b"", b"%d" % last)
            if length % 7 == 6:
                seam = Seam(b"other pictures", b"than these")
        elif work.cut and len(stretches := cut(length, 10)) > 1:
            return Outcome(duration=length, stretches=tuple(stretches)), None
        number = int(work.video.video_id[1:])
        tokens = np.array([[number, second] for second in range(first, last)], np.float16)
        return Outcome(len(tokens), float(length), seam=seam), tokens


class Reference:
    def __init__(self, value: Any) -> None:
        self.value = value


class Here:
    """Calls a worker's method where Ray would call an actor's."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def options(self, **_: Any) -> Here:
        return self

    def remote(self, *arguments: Any) -> Any:
        result = self.function(*(a.value if isinstance(a, Reference) else a for a in arguments))
        return (Reference(result[0]), Reference(result[1])) if isinstance(result, tuple) else Reference(result)


class Killed(Exception):
    """The driver dies here."""


class PoolOfChance:
    """As many workers as told; who finishes next is drawn, and so is who dies, and when the driver does."""

    def __init__(self, workers: int, generator: np.random.Generator, deadly: set[str], lives: float) -> None:
        self.places, self.devices = 1, ["cpu"] * workers
        worker = CountingWorker(WorkerOptions(Path()))
        self.actor = type("Actor", (), {"encode": Here(worker.encode), "write_part": Here(worker.write_part)})()
        self.queue: deque[Job] = deque()
        self.generator, self.deadly, self.lives = generator, deadly, lives
        self.lost: set[int] = set()

    def has_room(self) -> bool:
        return len(self.queue) < len(self.devices) + 1

    def add(self, job: Job, first: bool = False) -> None:
        (self.queue.appendleft if first else self.queue.append)(job)

    def next(self) -> list[Answer]:
        if not self.queue:
            return []
        self.lives -= 1
        if self.lives < 0:
            raise Killed
        place = int(self.generator.integers(min(len(self.queue), len(self.devices))))
        job = self.queue[place]
        del self.queue[place]
        if isinstance(job, EncodeJob) and any(work.video.video_id in self.deadly for work in job.work):
            job.deaths += 1
            if job.deaths < DEATHS:
                self.queue.append(job)
                return []
            return [Answer(job, error=RuntimeError("died"), gave_up=True)]
        if isinstance(job, WriteJob) and job.part not in self.lost and len(self.devices) > 4:
            self.lost.add(job.part)  # with the machine that it lay on
            return [Answer(job, error=ObjectLostError("00", "", ""))]
        return [Answer(job, job.start(self.actor).value)]


def extract_by_chance(
    folder: Path, lengths: list[int], deadly: set[str], workers: int, seed: int, lives: float
) -> dict[str, bytes]:
    """`extract` of made videos by made workers; every `lives` answers the driver is killed and starts again."""
    generator = np.random.default_rng(seed)
    encoder = Counting()
    config = ExtractConfig(Path("made"), folder, videos_per_part=3)
    folder.mkdir()
    Manifest(encoder.name, encoder.fingerprint(), encoder.dimension).write(folder)
    while True:
        quarantine = Quarantine(folder)
        rows = [ListedVideo(f"v{number}", str(length), said="x") for number, length in enumerate(lengths)]
        (folder / "scratch").mkdir(exist_ok=True)
        videos = VideoList.write(folder / "scratch", rows, quarantine.add)
        captions = CaptionSource(None, False, 0, quarantine, videos, "", videos)
        manifest = Manifest.read(folder)
        done = digests_of(Shards(folder).video_ids() if manifest.parts else [])
        left_out = np.concatenate([done, digests_of(quarantine.video_ids())])
        run = Extraction(
            folder, manifest, videos, _missing(config, manifest, videos, left_out), captions, tqdm(disable=True)
        )
        try:
            run.run(PoolOfChance(workers, generator, deadly, lives))  # type: ignore[arg-type]
        except Killed:
            lives *= 1.5
            continue
        _complete(folder)
        names = [*folder.glob("part-*"), folder / "manifest.json"]
        return {path.name: path.read_bytes() for path in names}


@given(
    st.lists(st.just(-1) | st.integers(1, 45), min_size=1, max_size=14),
    st.integers(1, 6),
    st.integers(0, 1000),
    st.integers(1, 20),
    st.sets(st.sampled_from(["v0", "v3", "v4"]), max_size=1),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_number_of_workers_and_kills_the_folder_holds_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], workers: int, seed: int, lives: int, deadly: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    one = extract_by_chance(folder / "one", lengths, deadly, 1, 0, float("inf"))
    many = extract_by_chance(folder / "many", lengths, deadly, workers, seed, lives)
    assert one == many
    good = [n for n, length in enumerate(lengths) if length > 0 and f"v{n}" not in deadly]
    if not good:
        return
    shards = Shards(folder / "many", verify=True)
    assert shards.manifest.complete and shards.video_ids() == [f"v{n}" for n in good]
    for row, n in enumerate(good):
        assert shards.tokens(row).tolist() == [[n, second] for second in range(lengths[n])], "in their order"
        assert shards.record(row).captions.end.tolist() == [lengths[n]]
    assert {row["video_id"] for row in Quarantine(folder / "many").rows} == {
        f"v{n}" for n in range(len(lengths)) if n not in good
    }


def test_videos_that_are_added_are_a_plan_of_their_own(tmp_path: Path) -> None:
    extract_by_chance(tmp_path / "a", [4] * 7, set(), 2, 0, float("inf"))
    config = ExtractConfig(Path("made"), tmp_path / "a", videos_per_part=3)
    rows = [ListedVideo(f"v{number}", "4") for number in (9, 0, 1, 2, 3, 4, 5, 6, 8)]
    videos = VideoList.write(tmp_path, rows, print)
    done = digests_of([f"v{n}" for n in range(7)])
    missing = _missing(config, Manifest.read(tmp_path / "a"), videos, done)
    assert missing == [(3, [0, 8])] and [plan.first for plan in read_plans(tmp_path / "a")] == [0, 3]
    assert _missing(config, Manifest.read(tmp_path / "a"), videos, done) == missing, "the same when it is asked again"


def local_worker(folder: Path) -> ExtractionWorker:
    """A worker without Ray, with the smallest encoder."""
    encoder = Pixels(32)
    encoder.save(folder / "encoder")
    worker = ExtractionWorker(WorkerOptions(folder / "encoder"))
    assert worker.ready() == "cpu"
    return worker


def test_an_error_that_is_not_the_files_costs_one_video(tmp_path: Path, long_video: Path) -> None:
    worker = local_worker(tmp_path)

    def fail_once(clips: object) -> np.ndarray:
        worker.encode_all = worker.encoder.encode_all
        raise RuntimeError("CUDA out of memory\nmore")

    worker.encode_all = fail_once
    clip = ListedVideo("b", str(long_video), 3.0, 7.0)
    outcomes, tokens = worker.encode(
        [Work(ListedVideo("a", str(long_video))), Work(clip), Work(ListedVideo("c", "no"))]
    )
    assert outcomes[0].kind == "crashed" and outcomes[0].reason == f"{long_video}: RuntimeError: CUDA out of memory"
    assert (outcomes[1].seconds, outcomes[1].duration) == (4, 4.0) and tokens[1] is not None
    np.testing.assert_array_equal(tokens[1], worker.encoder.encode_video(long_video, 3.0, 7.0))
    assert outcomes[2].kind == "input" and "no such video file" in outcomes[2].reason
