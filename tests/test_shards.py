"""Tokens on disk: what goes in comes out, and nothing that is damaged is read."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import random_record
from hypothesis import given, settings
from hypothesis import strategies as st

from videoclip.data.captions import NO_CAPTIONS
from videoclip.data.shards import Manifest, Shards, ShardWriter, VideoRecord
from videoclip.errors import InputError


def manifest(dimension: int = 16, fingerprint: str = "f" * 64) -> Manifest:
    return Manifest("random", fingerprint, dimension)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_videos_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], per_part: int, captions: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    records = [random_record(n, 4, seconds, captions) for n, seconds in enumerate(lengths)]
    writer = ShardWriter(folder, manifest(4), per_part)
    for record in records:
        writer.add(record)
    written = writer.close()
    assert written.complete and [p.videos for p in written.parts[:-1]] == [per_part] * (len(written.parts) - 1)
    shards = Shards(folder, verify=True)
    assert shards.seconds().tolist() == lengths
    for expected, found in zip(records, shards):
        assert (found.video_id, found.duration, found.captions.text) == (
            expected.video_id,
            expected.duration,
            expected.captions.text,
        )
        assert np.array_equal(found.tokens, expected.tokens) and found.tokens.dtype == np.float16
        assert np.array_equal(found.captions.start, expected.captions.start)


def test_tokens_are_views_of_the_mapped_file(make_shards: Callable[..., Shards]) -> None:
    tokens = make_shards().tokens(3)
    assert not tokens.flags.owndata and not tokens.flags.writeable


def test_writing_goes_on_after_the_last_finished_part(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path, manifest(), 2)
    for number in range(5):  # the fifth is lost with the process that held it
        first.add(random_record(number))
    stamp = (tmp_path / "part-00000.arrow").stat().st_mtime_ns
    assert Shards(tmp_path).video_ids() == [f"video_{n:03d}" for n in range(4)]
    assert not Manifest.read(tmp_path).complete
    second = ShardWriter(tmp_path, manifest(), 2)
    second.add(random_record(4))
    second.close()
    assert Shards(tmp_path, verify=True).video_ids() == [f"video_{n:03d}" for n in range(5)]
    assert (tmp_path / "part-00000.arrow").stat().st_mtime_ns == stamp, "a finished part is never written again"


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_part_that_disagrees_with_the_manifest_is_refused_by_name(
    make_shards: Callable[..., Shards], damage: str
) -> None:
    folder = make_shards().folder
    path = folder / "part-00001.arrow"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-100])
    else:
        path.write_bytes(data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])
    with pytest.raises(InputError, match=r"part-00001\.arrow"):
        Shards(folder, verify=True)


def test_a_manifest_cannot_name_files_elsewhere(make_shards: Callable[..., Shards]) -> None:
    folder = make_shards().folder
    values = json.loads((folder / "manifest.json").read_text())
    values["parts"][0]["name"] = "../../x"
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="outside the folder"):
        Shards(folder)


def test_tokens_of_another_encoder_are_refused(make_shards: Callable[..., Shards]) -> None:
    with pytest.raises(InputError, match="extract into another folder"):
        ShardWriter(make_shards().folder, manifest(fingerprint="0" * 64))


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (np.zeros((3, 15), np.float16), "expected"),
        (np.zeros((0, 16), np.float16), "no tokens"),
        (np.full((3, 16), np.nan, np.float16), "not finite"),
    ],
)
def test_unusable_tokens_are_refused_with_their_video(tmp_path: Path, tokens: np.ndarray, reason: str) -> None:
    writer = ShardWriter(tmp_path, manifest())
    with pytest.raises(InputError, match=rf"'\.\./\.\./x'.*{reason}"):
        writer.add(VideoRecord("../../x", 3.0, tokens, NO_CAPTIONS))


def test_ids_are_data_and_never_paths(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "shards", manifest())
    record = random_record(0)
    writer.add(VideoRecord("../../x", record.duration, record.tokens, record.captions))
    writer.close()
    assert Shards(tmp_path / "shards").video_ids() == ["../../x"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["manifest.json", "part-00000.arrow", "shards"]


FULL_DISK = """
import resource, signal, sys
sys.path[:0] = {path!r}
from pathlib import Path
from conftest import random_record
from videoclip.data.shards import Manifest, ShardWriter
writer = ShardWriter(Path({folder!r}), Manifest("random", "f" * 64, 16), 2)
for number in range(2):
    writer.add(random_record(number))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
for number in range(2, 4):
    writer.add(random_record(number))
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a file size limit")
def test_a_full_disk_loses_nothing_that_was_written(tmp_path: Path) -> None:
    folder = str(tmp_path / "shards")
    code = FULL_DISK.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])], folder=folder)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "OSError" in done.stderr
    assert len(Shards(Path(folder), verify=True)) == 2
    assert not list(Path(folder).glob(".*.tmp")), "no half-written file is left behind"


def test_two_videos_with_one_id_are_named(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, manifest(), 2)
    for number in (4, 5, 4):
        writer.add(random_record(number))
    writer.close()
    with pytest.raises(InputError, match="'video_004' stands in rows 0, 2"):
        Shards(tmp_path).video_ids()
