"""Shards, videos and run folders in a store of objects that is busy, slow, and cuts and garbles what it sends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from conftest import write_video
from object_store import Proxy, object_store
from PIL import Image
from test_interruptions import plan, run, same_bits  # noqa: F401  # a fixture

from pipelines import remote_options
from pipelines.cli import main
from pipelines.extraction_worker import clips_of
from pipelines.pretrain_worker import TrainingPlan
from pipelines.remote_options import at_hand, mirrored
from pipelines.report import ReportConfig
from videoclip import remote, storage
from videoclip.data.shards import Shards
from videoclip.data.sources import open_shards
from videoclip.data.video import FrameFormat, decode_seconds, find_videos, probe
from videoclip.data.video_lists import ListedVideo, read_videos
from videoclip.encoders.pixels import Pixels
from videoclip.errors import InputError
from videoclip.files import read_json, write_json
from videoclip.remote import RemoteReader, StorageError

BUCKET = "corpus"
HOME = Path(f"s3://{BUCKET}")


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with object_store(BUCKET) as proxy:
        yield proxy


@pytest.fixture
def store(server: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Proxy:
    """The server in this test's environment, without faults, and an empty cache; patience is short."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    monkeypatch.setenv("VIDEOCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    server.faults, server.log = [], []
    return server


@pytest.fixture
def stored(make_shards: Callable[..., Shards], store: Proxy, tmp_path: Path) -> tuple[Shards, Path]:
    """Shards of three parts, here and in the store."""
    shards, target = make_shards(), HOME / tmp_path.name / "shards"
    for path in shards.folder.iterdir():
        remote.upload(path, target / path.name)
    store.log.clear()
    return shards, target


# --- Reading and writing ------------------------------------------------------------------------------------------


def test_a_path_of_a_uri_is_the_uri() -> None:
    assert remote.uri(Path("s3://bucket/a/b")) == remote.uri("s3://bucket/a/b") == "s3://bucket/a/b"
    assert remote.uri(Path("hdfs://node:8020/a") / "b") == "hdfs://node:8020/a/b"
    assert remote.is_remote("gs://x/y") and not remote.is_remote(Path("/s3:/x")) and not remote.is_remote("")
    with pytest.raises(InputError, match="AWS_ENDPOINT_URL"):
        remote.uri(Path("s3://bucket/a?endpoint_override=x"))


@pytest.mark.parametrize("fault", ["busy", "cut", "slow"])
def test_what_is_read_is_whole_though_the_store_fails_at_first(
    store: Proxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Four times: more than the client library tries by itself."""
    path, data = HOME / "some" / "file", os.urandom(300_000)
    remote.write_bytes(path, data)
    monkeypatch.setattr(remote, "SECONDS", 0.5)
    times = 2 if fault == "slow" else 4
    store.faults = [("GET", "some/file", fault)] * times
    assert remote.read_bytes(path) == data
    assert not store.faults, "all of them happened"


def test_a_store_that_goes_on_failing_is_an_error_that_says_so(store: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    path = HOME / "some" / "other"
    remote.write_bytes(path, b"x" * 1000)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    store.faults = [("GET", "some/other", "cut")] * 50
    with pytest.raises(StorageError, match=r"s3://corpus/some/other: .*\(2 attempts\)"):
        remote.read_bytes(path)
    with pytest.raises(InputError, match="s3://corpus/some/missing: no such file"):
        remote.read_bytes(HOME / "some" / "missing")


def test_what_is_written_is_whole_though_the_store_is_busy(store: Proxy, tmp_path: Path) -> None:
    data = os.urandom(200_000)
    (tmp_path / "file").write_bytes(data)
    store.faults = [("PUT", "written", "busy")] * 4
    size, digest = remote.upload(tmp_path / "file", HOME / "written")
    assert remote.read_bytes(HOME / "written") == data and size == len(data) and len(digest) == 64
    assert not store.faults
    found = remote.look(HOME / "written")
    assert found is not None and found.bytes == size
    remote.delete(HOME / "written")
    assert remote.look(HOME / "written") is None and remote.list_files(HOME / "written") == []


def test_a_stream_can_be_read_anywhere_and_keeps_few_blocks(store: Proxy) -> None:
    data = os.urandom(10_000)
    remote.write_bytes(HOME / "stream", data)
    reader = RemoteReader(HOME / "stream", block=1000, blocks=3)
    generator = np.random.default_rng(0)
    for place, count in generator.integers(0, 10_500, (8, 2)).tolist():
        reader.seek(place)
        assert reader.read(count) == data[place : place + count]
    store.log.clear()
    reader.seek(-1, os.SEEK_END)
    reader.read(1), reader.seek(9_500), reader.read(100)
    assert store.seen("GET", "stream") <= 1, "both lie in one block"


# --- Shards and the cache -----------------------------------------------------------------------------------------


def test_shards_in_a_store_are_the_shards(stored: tuple[Shards, Path], store: Proxy) -> None:
    local, target = stored
    shards = Shards(target)
    assert store.seen("GET", ".arrow") == 0, "opening fetches no part"
    for one, other in zip(shards, local, strict=True):
        assert one.video_id == other.video_id and np.array_equal(one.tokens, other.tokens)
        assert one.captions.text == other.captions.text
    assert store.seen("GET", ".arrow") == 3
    assert [record.video_id for record in Shards(target)] == local.video_ids()
    assert store.seen("GET", ".arrow") == 3, "a second reader finds them in the cache"
    joined = open_shards((target, local.folder))
    assert len(joined) == 24 and np.array_equal(joined.tokens(3), joined.tokens(15))


def test_a_part_that_arrives_garbled_is_fetched_again_and_one_that_is_damaged_is_refused(
    stored: tuple[Shards, Path], store: Proxy
) -> None:
    local, target = stored
    store.faults = [("GET", "part-00001", "flipped")]
    assert np.array_equal(Shards(target).tokens(6), local.tokens(6)) and not store.faults
    data = bytearray((local.folder / "part-00002.arrow").read_bytes())
    data[100] ^= 1
    remote.write_bytes(target / "part-00002.arrow", bytes(data))
    with pytest.raises(InputError, match=r"part-00002.arrow: its checksum is not the manifest's"):
        Shards(target).tokens(11)
    kept = [path.name for path in (storage.cache_folder() / "shards").iterdir() if path.suffix != ".lock"]
    assert kept == [local.manifest.parts[1].sha256], "nothing that is damaged stays in the cache"
    remote.write_bytes(target / "part-00002.arrow", bytes(data[:-8]))
    with pytest.raises(InputError, match=r"part-00002.arrow: \d+ bytes where the manifest says"):
        Shards(target)
    remote.delete(target / "part-00002.arrow")
    with pytest.raises(InputError, match=r"part-00002.arrow: the manifest lists this part but it is missing"):
        Shards(target)


def test_what_was_used_longest_ago_leaves_a_full_cache(
    stored: tuple[Shards, Path], store: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, target = stored
    sizes = [part.bytes for part in local.manifest.parts]
    monkeypatch.setenv("VIDEOCLIP_CACHE_GB", f"{(sizes[0] + sizes[1] + 10) / 1e9:.9f}")
    views = [Shards(target).tokens(row) for row in (0, 5)]  # parts 0 and 1
    Shards(target).tokens(0)  # now part 1 is the older
    assert np.array_equal(Shards(target).tokens(10), local.tokens(10))
    kept = {path.name for path in (storage.cache_folder() / "shards").iterdir() if path.suffix != ".lock"}
    assert kept == {local.manifest.parts[number].sha256 for number in (0, 2)}
    assert np.array_equal(views[1], local.tokens(5)), "what is mapped stays readable"
    monkeypatch.setenv("VIDEOCLIP_CACHE_GB", "0.000001")
    with pytest.raises(InputError, match="smaller than one file of shards"):
        Shards(target).tokens(5)
    monkeypatch.setenv("VIDEOCLIP_CACHE_GB", "much")
    with pytest.raises(InputError, match="expected a number of gigabytes"):
        Shards(target)


def test_processes_share_a_cache_and_fetch_every_part_once(stored: tuple[Shards, Path], store: Proxy) -> None:
    local, target = stored
    code = f"""
from pathlib import Path
from videoclip.data.shards import Shards
print(sum(float(record.tokens.astype("f8").sum()) for record in Shards(Path({str(target)!r}))))
"""
    root = Path(__file__).parents[1]
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)
    ]
    sums = {process.communicate()[0] for process in runs}
    assert len(sums) == 1 and float(sums.pop()) == sum(float(record.tokens.astype("f8").sum()) for record in local)
    assert store.seen("GET", ".arrow") == 3


@pytest.mark.slow
def test_a_training_on_shards_in_a_store_ends_with_the_same_bits(
    plan: TrainingPlan,  # noqa: F811
    store: Proxy,
) -> None:
    target = HOME / "training" / "shards"
    for path in plan.shards.iterdir():
        remote.upload(path, target / path.name)
    plan = replace(plan, epochs=1)
    elsewhere = replace(plan, shards=target, output=plan.output.with_name("elsewhere"))
    run(plan)
    store.faults = [("GET", "part-", "busy"), ("GET", "part-", "cut")]
    run(elsewhere)
    assert same_bits(plan, elsewhere) and not store.faults


def test_the_command_takes_uris_and_tells_of_a_store_that_fails_in_one_line(
    stored: tuple[Shards, Path], store: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local, target = stored
    home = remote.uri(target.parent)
    assert main(["convert", "shards", f"{home}/shards", f"{home}/features"]) == 0
    names = {file.path.name for file in remote.list_files(target.parent / "features")}
    assert {f"{video_id}.npy" for video_id in local.video_ids()} < names
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    store.faults = [("GET", "shards/manifest.json", "busy")] * 9
    assert main(["convert", "shards", f"{home}/shards", f"{home}/other"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"videoclip: {home}/shards/manifest.json: ") and said.count("\n") == 1


# --- Videos -------------------------------------------------------------------------------------------------------


def test_a_video_is_decoded_as_it_is_streamed(store: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), np.uint8)
    local = write_video(tmp_path / "a.mp4", [n / 10 for n in range(60)], lambda n: noise[n])
    there = HOME / "videos" / "deep" / "a.mp4"
    remote.upload(local, there)
    remote.write_bytes(HOME / "videos" / "notes.txt", b"no video")
    monkeypatch.setattr("videoclip.data.video.VIDEO_BLOCK", 1 << 14)
    store.faults = [("GET", "a.mp4", "cut")]
    assert find_videos(HOME / "videos") == [there] and probe(there) == probe(local)
    frames = FrameFormat(5, 32)
    for one, other in zip(decode_seconds(there, frames, 1.0), decode_seconds(local, frames, 1.0), strict=True):
        assert np.array_equal(one, other)
    with pytest.raises(InputError, match="no such video file"):
        probe(HOME / "videos" / "b.mp4")
    remote.write_bytes(HOME / "videos" / "list.mp4", b"#EXTM3U\nfile:///etc/passwd\n" * 9)
    with pytest.raises(InputError, match="not a video"):
        probe(HOME / "videos" / "list.mp4")


def test_lists_and_tars_in_a_store_name_what_is_there(store: Proxy, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8)
    video = write_video(tmp_path / "7.mp4", [n / 10 for n in range(20)], lambda n: noise[n])
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, number in (("a", 0), ("b", 1)):
            Image.fromarray(noise[number]).save(tmp_path / f"{name}.png")
            (tmp_path / f"{name}.txt").write_text(f"picture {name}")
            tar.add(tmp_path / f"{name}.png", f"{name}.png"), tar.add(tmp_path / f"{name}.txt", f"{name}.txt")
    (tmp_path / "webvid.csv").write_text("videoid,name,page_dir\n7,a dog runs,p_1\n")
    remote.upload(tmp_path / "00000.tar", HOME / "cc3m" / "00000.tar")
    remote.upload(video, HOME / "webvid" / "p_1" / "7.mp4")
    remote.upload(tmp_path / "webvid.csv", HOME / "webvid" / "webvid.csv")
    encoder = Pixels(32)

    def tokens(row: ListedVideo) -> np.ndarray:
        return encoder.encode_all(clips_of(row, encoder))

    there = [*read_videos(HOME / "cc3m"), *read_videos(HOME / "cc3m" / "00000.tar")]
    assert [(row.video_id, row.said) for row in there] == [("00000/a", "picture a"), ("00000/b", "picture b")] * 2
    for row, local in zip(there, read_videos(tmp_path / "00000.tar")):
        assert np.array_equal(tokens(row), tokens(local)) and len(tokens(row)) == 1
    (row,) = read_videos(HOME / "webvid" / "webvid.csv")
    assert (row.video_id, row.said) == ("7", "a dog runs")
    assert np.array_equal(tokens(row), tokens(ListedVideo("7", str(video)))) and len(tokens(row)) == 2
    store.faults = [("GET", "00000.tar", "cut")] * 99
    with pytest.raises(StorageError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "ATTEMPTS", 1)
        list(read_videos(HOME / "cc3m"))


# --- Run folders --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    output: Path
    shards: Path = Path("here")
    captions: str | None = None
    annotations: Path | None = None
    videos: Path | None = None
    address: str | None = None
    streams_videos: ClassVar[bool] = True


def test_a_run_folder_is_copied_registered_last_and_found_on_another_machine(
    store: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(HOME / "runs" / "one")
    with at_hand(options) as config:
        assert not remote.is_remote(config.output) and config.shards == Path("here")
        write_json(config.output / "manifest.json", {"parts": 2})
        for name in ("part-0", "part-1", ".unfinished", "deep/a.bin"):
            (config.output / name).parent.mkdir(exist_ok=True)
            (config.output / name).write_text(name)
    puts = [path.split("/one/")[1] for method, path in store.log if method == "PUT" and ".running" not in path]
    assert puts[-2:] == ["manifest.json", "files.json"] and set(puts[:-2]) == {"part-0", "part-1", "deep/a.bin"}
    monkeypatch.setenv("VIDEOCLIP_CACHE", str(tmp_path / "other machine"))
    with at_hand(options) as config:
        assert (config.output / "deep" / "a.bin").read_text() == "deep/a.bin"
        assert read_json(config.output / "manifest.json") == {"parts": 2}
        (config.output / "part-1").unlink()
        (config.output / "part-0").write_text("changed")
        with pytest.raises(InputError, match=r"another run is writing here \(process"):
            monkeypatch.setenv("VIDEOCLIP_CACHE", str(tmp_path / "third machine"))
            mirrored(options.output).__enter__()
    assert remote.look(HOME / "runs" / "one" / "part-1") is None
    monkeypatch.setenv("VIDEOCLIP_CACHE", str(tmp_path / "cache"))
    with at_hand(options) as config:  # which it has overtaken
        assert (config.output / "part-0").read_text() == "changed" and not (config.output / "part-1").exists()
    assert remote.list_files(HOME / "runs" / "one" / ".running") == []


def test_a_run_that_is_killed_here_goes_on_from_what_is_here(store: Proxy, tmp_path: Path) -> None:
    target = HOME / "runs" / "two"
    with mirrored(target) as home:
        (home).mkdir()
        (home / "a").write_text("old")
    mirror = remote_options.Mirror(target, home)
    mirror.claim()  # and then the process dies, with newer files than the store has
    (home / "a").write_text("newer")
    with mirrored(target) as home:
        assert (home / "a").read_text() == "newer"
    assert remote.read_bytes(target / "a") == b"newer"


def test_results_and_errors_are_copied_too_and_a_stray_registry_is_refused(store: Proxy, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), at_hand(Options(HOME / "runs" / "three" / "metrics.json")) as config:
        assert config.output.name == "metrics.json"
        write_json(config.output, {"R@1": 0.5})
        _ = 1 / 0
    assert json.loads(remote.read_bytes(HOME / "runs" / "three" / "metrics.json")) == {"R@1": 0.5}
    with pytest.raises(InputError, match="set VIDEOCLIP_RUNS"), at_hand(Options(HOME / "runs" / "x", address="auto")):
        raise AssertionError
    bad = {"files": {"../../x": [1, "0" * 64]}}
    remote.write_bytes(HOME / "runs" / "four" / "files.json", json.dumps(bad).encode())
    with pytest.raises(InputError, match="not a file name below"), at_hand(Options(HOME / "runs" / "four")):
        raise AssertionError


def test_a_run_folder_is_copied_while_the_run_goes_on(store: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_options, "EVERY", 0.05)
    copied = threading.Event()
    with mirrored(HOME / "runs" / "five") as home:
        home.mkdir()
        (home / "metrics.jsonl").write_text("1\n")
        for _ in range(200):
            if remote.look(HOME / "runs" / "five" / "metrics.jsonl"):
                copied.set()
                break
            copied.wait(0.05)
        assert copied.is_set()
        (home / "metrics.jsonl").write_text("1\n2\n")
    assert remote.read_bytes(HOME / "runs" / "five" / "metrics.jsonl") == b"1\n2\n"


def test_other_inputs_are_fetched_and_again_where_they_changed(store: Proxy) -> None:
    there = HOME / "inputs" / "captions.json"
    remote.write_bytes(there, b'{"a": 1}')
    remote.write_bytes(HOME / "inputs" / "model" / "config.json", b"{}")
    remote.write_bytes(HOME / "inputs" / "model" / "part-0.arrow", b"not needed")
    options = Options(Path("out"), captions="s3://corpus/inputs/captions.json", annotations=HOME / "inputs" / "model")
    with at_hand(options) as config:
        assert isinstance(config.captions, str) and Path(config.captions).read_bytes() == b'{"a": 1}'
        assert config.annotations is not None and [p.name for p in config.annotations.iterdir()] == ["config.json"]
    with at_hand(Options(Path("out"), videos=HOME / "inputs")) as config:
        assert config.videos == HOME / "inputs"
    with (
        pytest.raises(InputError, match="`extract` alone streams videos"),
        at_hand(ReportConfig(Path("x"), videos=HOME)),
    ):
        raise AssertionError
    store.log.clear()
    storage.local_copy(there)
    assert store.seen("GET", "captions.json") == 0
    remote.write_bytes(there, b'{"a": 12}')
    assert storage.local_copy(there).read_bytes() == b'{"a": 12}'
    with pytest.raises(InputError, match="no such file or folder"):
        storage.local_copy(HOME / "nothing")
