"""HowTo100M's captions, turned into a table once: every video's lines as the json has them, in constant memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from videoclip.data import caption_table
from videoclip.data.caption_table import CaptionTable
from videoclip.data.subtitle_files import SubtitleFiles
from videoclip.errors import InputError


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("VIDEOCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def captions_of(number: int) -> dict[str, list[object]]:
    lines = range(number % 7)
    return {
        "start": [2.25 * line for line in lines],
        "end": [2 * line + 3 for line in lines],
        "text": [f"añade la cebolla {line} \U0001f9c5" for line in lines],
    }


def test_every_video_has_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_table, "VIDEOS_AT_ONCE", 10)
    monkeypatch.setattr(caption_table, "READ_AT_ONCE", 37)
    whole = {f"video {n}": captions_of(n) for n in range(95)} | {
        "odd": "no captions",
        "../x": None,
        "": {"start": [10**30, -1e-7]},
        "n": 12,
    }
    (tmp_path / "c.json").write_text(json.dumps(whole))
    table = CaptionTable.make(tmp_path / "c.json", tmp_path / "tables")
    assert dict(table) == whole and list(table) == list(whole) and len(table) == 99
    assert "video 95" not in table and table.get("video 95") is None
    again = CaptionTable.make(tmp_path / "c.json", tmp_path / "tables")
    assert dict(again) == whole and len(list((tmp_path / "tables").iterdir())) == 1
    (tmp_path / "c.json").write_text(json.dumps({**whole, "new": None}))
    assert "new" in CaptionTable.make(tmp_path / "c.json", tmp_path / "tables")


def test_of_an_id_that_stands_there_twice_the_last_counts_as_for_any_reader(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"a": {"start": [1]}, "b": 2, "a": {"start": [2]}}')
    assert CaptionTable.make(tmp_path / "c.json", tmp_path)["a"] == {"start": [2]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "expected {video_id"),
        ('{"a": {"start": [1,', "not valid"),
        ("", "not valid"),
        ('{"a": 1}x', "not valid"),
        ("{7: 1}", "not valid"),
    ],
)
def test_what_is_no_table_of_captions_is_refused_and_leaves_nothing(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=rf"c\.json: {said}"):
        CaptionTable.make(tmp_path / "c.json", tmp_path / "tables")
    assert not list((tmp_path / "tables").iterdir())


def test_one_video_cannot_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_table, "LONGEST", 300_000)
    monkeypatch.setattr(caption_table, "READ_AT_ONCE", 5_000)
    (tmp_path / "c.json").write_text(json.dumps({f"v{n}": {"text": ["x" * 99_000]} for n in range(20)}))
    assert len(CaptionTable.make(tmp_path / "c.json", tmp_path)) == 20
    (tmp_path / "c.json").write_text(json.dumps({"a": 1, "b": {"text": ["x"] * 200_000}}))
    with pytest.raises(InputError, match="between two video ids"):
        CaptionTable.make(tmp_path / "c.json", tmp_path)


def test_subtitles_are_looked_up_in_the_table(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "raw_caption.json").write_text(json.dumps({"a": captions_of(3), "b": "odd"}))
    files = SubtitleFiles(tmp_path / "raw_caption.json", {})
    found = files.find("a")
    assert found is not None and found.lines[2] == (4.5, 7, "añade la cebolla 2 \U0001f9c5") and files.find("c") is None
    with pytest.raises(InputError, match="its captions cannot be used"):
        files.find("b")
    assert files.ids() == {"a", "b"} and len(list((cache / "captions").iterdir())) == 1


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """39 MB of captions, which are some 170 MB as Python's objects."""
    one = json.dumps({"start": [1.5] * 300, "end": [2.5] * 300, "text": ["chop the onion now"] * 300})
    with open(tmp_path / "c.json", "w") as file:
        file.write("{" + ",".join(f'"{n}": {one}' for n in range(4000)) + "}")
    code = """
import resource, sys
from pathlib import Path
from videoclip.data.caption_table import CaptionTable
import pyarrow
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table = CaptionTable.make(Path(sys.argv[1]), Path(sys.argv[2]))
assert len(table["17"]["text"]) == 300 and len(table) == 4000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "c.json"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 90
