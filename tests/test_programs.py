"""An archive and a model for other programs: MCP's tools, sentence-transformers, speech recognisers."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_audio, write_video
from ray.cloudpickle import register_pickle_by_value
from small_archive import SAID, make_model, open_small, planned

from pipelines.transcribe import TranscribeConfig, transcribe
from videoclip.data.subtitle_files import SubtitleFiles
from videoclip.encoders.speech import FasterWhisper, SpeechConfig
from videoclip.errors import InputError
from videoclip.files import read_json, read_json_lines
from videoclip.model import VideoCLIP
from videoclip.synthetic.kitchen import render_video

ROOT = Path(__file__).parents[1]


# --- MCP ----------------------------------------------------------------------------------------------------------


def test_an_assistant_finds_reads_and_sees_and_can_cite(tmp_path: Path) -> None:
    pytest.importorskip("mcp", reason="the extra `mcp` is not installed")
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client

    for video in planned():
        render_video(video, tmp_path / "videos")
    open_small(tmp_path, tmp_path / "videos")
    words = ["-m", "pipelines.cli", "mcp", "--model", str(tmp_path / "model"), "--index", str(tmp_path / "index")]

    async def talk() -> tuple[Any, ...]:
        parameters = StdioServerParameters(command=sys.executable, args=words, cwd=str(ROOT))
        async with stdio_client(parameters) as (read, write), ClientSession(read, write) as session:
            await session.initialize()
            tools = {tool.name for tool in (await session.list_tools()).tools}
            found = await session.call_tool("find_moment", {"description": "grüße bold", "by": "words", "count": 2})
            moment = json.loads(found.content[0].text)
            spoken = await session.call_tool("read_transcript", {"video": moment["video"], "start": 11, "end": 16})
            frame = await session.call_tool("get_frame", {"video": moment["video"], "time": moment["start"]})
            wrong = await session.call_tool("get_frame", {"video": 999, "time": 1})
            return tools, moment, spoken, frame, wrong

    tools, moment, spoken, frame, wrong = asyncio.run(talk())
    assert tools == {"find_moment", "read_transcript", "get_frame"}
    assert moment["said"] == SAID and moment["found_by"] == ["words"]
    assert moment["citation"].startswith("file://") and f"#t={moment['start']:g}," in moment["citation"]
    assert any(line["text"] == SAID for line in json.loads(spoken.content[0].text)["lines"])
    assert frame.content[0].type == "image" and frame.content[0].mime_type == "image/jpeg"
    assert wrong.is_error and "no video number 999" in wrong.content[0].text


# --- sentence-transformers ----------------------------------------------------------------------------------------


def test_sentence_transformers_encodes_texts_and_video_files_as_the_model_does(tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers", reason="the extra is not installed")
    from videoclip.encoders.x3d import X3D

    encoder = X3D("tiny", None, 0)
    base = make_model(tmp_path / "base")
    torch.manual_seed(0)
    from dataclasses import replace

    model = VideoCLIP(replace(base.config, video_dimension=encoder.dimension)).eval()
    model.frozen.tokenizer, model.frozen.video_encoder = base.tokenizer(), encoder
    model.save_pretrained(tmp_path / "model")
    video = render_video(planned()[0], tmp_path)
    other = package.SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu")
    texts = ["stir the egg", "a much longer line about the onion"]
    expected = VideoCLIP.from_pretrained(tmp_path / "model")
    np.testing.assert_allclose(other.encode(texts), expected.encode_text(texts).numpy(), atol=1e-5)
    seen = other.encode([str(video)])
    np.testing.assert_allclose(seen[0], expected.encode_video(video).numpy(), atol=1e-5)
    assert other.similarity(other.encode(texts), seen).shape == (2, 1)
    assert other.get_embedding_dimension() == 16


# --- Speech -------------------------------------------------------------------------------------------------------


class Recogniser:
    """Stands in for faster-whisper at its border: what it would return for a file, without listening to it."""

    def __init__(self, config: SpeechConfig) -> None:
        self.config = config

    def __call__(self, path: Path) -> dict[str, Any]:
        if path.stem == "mute":
            raise InputError(f"{path}: its sound cannot be transcribed (there is none)")
        segments = [
            {"start": 0.0, "end": 2.0, "text": f" this is {path.stem}", "no_speech_prob": 0.1, "words": []},
            *({"start": 2.0 + n, "end": 3.0 + n, "text": " thank you", "words": []} for n in range(4)),
        ]
        return {"language": "en", "duration": 9.0, "segments": segments}


@pytest.mark.slow
def test_speech_becomes_transcripts_with_quarantine_and_resume(
    ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    first = write_video(videos / "a.mp4", [n / 4 for n in range(12)], lambda n: np.full((64, 64, 3), n, np.uint8))
    for name in ("b", "mute", "read"):
        shutil.copy(first, videos / f"{name}.mp4")
    (videos / "read.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nsaid already\n")
    config = TranscribeConfig(videos, tmp_path / "out")
    register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not see this file
    counts = transcribe(config, Recogniser)
    assert counts == {"lines": 6, "invented: says itself again": 4}
    assert "left out: 4 invented" in capsys.readouterr().out
    assert not (tmp_path / "out" / "read.json").exists(), "what has subtitles is left alone"
    assert "cannot be transcribed" in read_json_lines(tmp_path / "out" / "quarantine.jsonl")[0]["reason"]
    before = (tmp_path / "out" / "a.json").stat().st_mtime_ns
    (tmp_path / "out" / "b.json").unlink()
    assert transcribe(config, Recogniser) == counts
    assert (tmp_path / "out" / "a.json").stat().st_mtime_ns == before, "only what was missing"
    files = SubtitleFiles(tmp_path / "out", {"a": first})
    assert [line[2] for line in files.find("a").lines] == ["this is a", "thank you", "thank you"]  # type: ignore[union-attr]
    assert read_json(tmp_path / "out" / "a.json")["made_by"]["model"] == "small"


def test_a_folder_that_is_no_whisper_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper", reason="the extra `asr` is not installed")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="neither a size"):
        FasterWhisper(SpeechConfig(str(tmp_path / "model")))(write_audio(tmp_path / "a.mp4"))


def test_help_of_the_new_verbs_does_not_wait_for_their_extras() -> None:
    code = "import sys; sys.modules.update(dict.fromkeys(['fastapi', 'uvicorn', 'mcp', 'faster_whisper'])); "
    code += "from pipelines.cli import main; main(['serve', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--token" in done.stdout, done.stderr
