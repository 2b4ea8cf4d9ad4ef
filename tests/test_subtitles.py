"""Subtitles of every kind become lines with times; what cannot be used is counted, and nothing in a file is trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import write_video

from pipelines.captions import CaptionsConfig, captions
from videoclip.data import subtitles
from videoclip.data.subtitle_files import SubtitleFiles
from videoclip.data.subtitles import read_subtitles, read_tracks
from videoclip.data.video import probe
from videoclip.errors import InputError

SRT = "1\n00:00:01,000 --> 00:00:03,500\n<i>chop</i> the\nonion\n\n2\n00:01:00,000 --> 00:01:02,000\nstir\n"
VTT = (
    "WEBVTT\nLanguage: de\n\nNOTE nobody says this\n\n00:01.000 --> 00:03.500 align:start\n"
    "<v Ann>chop the onion</v>\n\n01:00.000 --> 01:02.000\nstir\n"
)
ASS = (
    "[Script Info]\nScriptType: v4.00+\n\n[Events]\n"
    "Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
    "Dialogue: 0,0:00:01.00,0:00:03.50,Default,,0,0,0,,{\\i1}chop{\\i0} the\\Nonion\n"
    "Comment: 0,0:00:04.00,0:00:05.00,Default,,0,0,0,,nobody says this\n"
    "Dialogue: 0,0:01:00.00,0:01:02.00,Default,,0,0,0,,stir\n"
)
TTML = (
    '<?xml version="1.0"?><tt xmlns="http://www.w3.org/ns/ttml" xml:lang="fr"><body><div>'
    '<p begin="00:00:01.000" end="00:00:03.500">chop the<br/>onion</p>'
    '<p begin="00:01:00.000" end="00:01:02.000">stir</p></div></body></tt>'
)
YOUTUBE_VTT = """WEBVTT
Kind: captions
Language: en

00:00:01.000 --> 00:00:03.500 align:start position:0%
 
chop<00:00:01.400><c> the</c><00:00:02.000><c> onion</c>

00:00:03.500 --> 00:00:03.510 align:start position:0%
chop the onion
 

00:00:03.510 --> 00:00:06.000 align:start position:0%
chop the onion
and<00:00:04.000><c> stir</c>

00:00:06.000 --> 00:00:08.000 align:start position:0%
and stir
yeah
"""  # the blanks are YouTube's
JSON3 = {
    "wireMagic": "pb3",
    "events": [
        {"tStartMs": 0, "dDurationMs": 9000, "id": 1, "wpWinPosId": 1},
        {"tStartMs": 1000, "dDurationMs": 5000, "segs": [{"utf8": "chop"}, {"utf8": " the onion", "tOffsetMs": 400}]},
        {"tStartMs": 3500, "dDurationMs": 2500, "aAppend": 1, "segs": [{"utf8": "\n"}]},
        {"tStartMs": 3500, "dDurationMs": 2500, "segs": [{"utf8": "and stir"}]},
    ],
}
WHISPER = {
    "language": "en",
    "segments": [
        {"start": 1.0, "end": 3.5, "text": " chop the onion", "no_speech_prob": 0.1, "avg_logprob": -0.2},
        {"start": 4.0, "end": 6.0, "text": " stir", "compression_ratio": 0.9},
        *({"start": 6.0 + n, "end": 7.0 + n, "text": " Thanks for watching!"} for n in range(5)),
        {"start": 20, "end": 22, "text": " you", "no_speech_prob": 0.95, "avg_logprob": -1.4},
        {"start": 22, "end": 30, "text": " na na na na na na", "compression_ratio": 7.0},
    ],
}


def words_of(path: Path) -> list[tuple[float, float, str]]:
    return [(start, end, " ".join(text.split())) for start, end, text in read_subtitles(path).lines]


@pytest.mark.parametrize(("name", "text"), [("a.srt", SRT), ("a.vtt", VTT), ("a.ass", ASS), ("a.ttml", TTML)])
def test_every_kind_of_subtitles_says_the_same(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert words_of(tmp_path / name) == [(1.0, 3.5, "chop the onion"), (60.0, 62.0, "stir")]


def test_language_comes_from_the_name_or_from_inside(tmp_path: Path) -> None:
    for name, text, language in (
        ("a.en-US.srt", SRT, "en"),
        ("a.vtt", VTT, "de"),
        ("a.ttml", TTML, "fr"),
        ("a.srt", SRT, ""),
        ("a.json", json.dumps(WHISPER), "en"),
    ):
        (tmp_path / name).write_text(text)
        assert read_subtitles(tmp_path / name).language == language


def test_youtubes_rolling_lines_are_said_once(tmp_path: Path) -> None:
    (tmp_path / "a.vtt").write_text(YOUTUBE_VTT)
    assert words_of(tmp_path / "a.vtt") == [(1, 3.5, "chop the onion"), (3.51, 6, "and stir"), (6, 8, "yeah")]
    assert read_subtitles(tmp_path / "a.vtt").dropped["rolling repeat"] == 3
    (tmp_path / "a.json3").write_text(json.dumps(JSON3))
    assert words_of(tmp_path / "a.json3") == [(1, 3.5, "chop the onion"), (3.5, 6, "and stir")]


def test_lines_that_whisper_invented_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(WHISPER))
    found = read_subtitles(tmp_path / "a.json")
    assert [line[2] for line in found.lines] == [
        "chop the onion",
        "stir",
        "Thanks for watching!",
        "Thanks for watching!",
    ]
    assert found.dropped == {
        "invented: says itself again": 3,
        "invented: text over silence": 1,
        "invented: compresses like a repeat": 1,
    }


def test_long_segments_are_cut_where_word_times_say(tmp_path: Path) -> None:
    words = [{"word": f" w{n}", "start": n * 1.0, "end": n + 0.9} for n in range(20)]
    words[3] = {"word": " 4711"}  # WhisperX gives numbers no times
    words[12] = {"word": " late", "start": 13.5, "end": 13.9}
    words = words[:13] + [{"word": f" w{n}", "start": n + 1.0, "end": n + 1.9} for n in range(13, 20)]
    segment = {"start": 0, "end": 21, "text": "".join(word["word"] for word in words), "words": words}
    (tmp_path / "a.json").write_text(json.dumps({"segments": [segment], "word_segments": words}))
    lines = read_subtitles(tmp_path / "a.json").lines
    assert all(end - start <= 8 for start, end, _ in lines) and len(lines) >= 3
    assert " ".join(line[2] for line in lines) == " ".join(word["word"].strip() for word in words)
    assert any(start == 13.5 for start, _, _ in lines), "a pause ends a line"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252", "cp1251"])
def test_other_encodings_are_read(encoding: str, tmp_path: Path) -> None:
    said = (
        "нарежьте лук и обжарьте его на сковороде"  # noqa: RUF001
        if encoding == "cp1251"
        else "Zwiebeln für die Soße schälen, dann köcheln"
    )
    (tmp_path / "a.srt").write_bytes(SRT.replace("stir", said).encode(encoding))
    found = read_subtitles(tmp_path / "a.srt")
    assert found.lines[-1][2] == said
    assert bool(found.note) == encoding.startswith("cp")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.srt", b"", None),
        ("a.srt", b"no subtitles at all, only prose", "no subtitle could be found"),
        ("a.vtt", b"\x00\x01\x02\xff\xfe\xfd" * 99, "a.vtt"),
        ("a.ttml", b"<tt>", "not a ttml"),
        ("a.ttml", b'<!DOCTYPE tt [<!ENTITY a "aaaa">]><tt/>', "DOCTYPE"),
        ("a.json", b"[1, 2]", "no transcript"),
        ("a.json", b"[" * 100_000, "no transcript"),
        ("a.sub", b"{1}{2}x", "subtitles end in"),
    ],
)
def test_files_that_are_no_subtitles_are_refused_by_name(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    if message is None:
        assert read_subtitles(tmp_path / name).lines == []
        return
    with pytest.raises(InputError, match=message):
        read_subtitles(tmp_path / name)


def test_a_million_lines_are_refused_at_once(tmp_path: Path) -> None:
    cue = "1\n00:00:01,000 --> 00:00:02,000\nchop\n\n"
    (tmp_path / "a.srt").write_text(cue * 10**6)
    with pytest.raises(InputError, match="more than 200000 lines"):
        read_subtitles(tmp_path / "a.srt")


def test_overlapping_backward_and_late_lines_are_kept_or_counted(tmp_path: Path) -> None:
    times = [(5, 9), (1, 7), (8, 3), (400, 402), (2, 2)]
    rows = [f"{n}\n00:00:{a:02d},000 --> 00:00:{b:02d},000\nline {n}\n" for n, (a, b) in enumerate(times) if a < 60]
    rows.append("9\n00:06:40,000 --> 00:06:42,000\nlate\n")
    (tmp_path / "a.srt").write_text("\n".join(rows))
    found = SubtitleFiles(tmp_path / "a.srt", {"a": tmp_path / "a.mp4"}).understand("a", 60.0)
    assert found is not None and found.captions.text == ["line 1", "line 0"]
    assert found.dropped == {"end is not after start": 2, "outside the video": 1}
    assert found.coverage == pytest.approx(100 * 8 / 60)


def small_video(path: Path, seconds: int = 4) -> Path:
    return write_video(path, [n / 4 for n in range(4 * seconds)], lambda n: np.full((64, 64, 3), n, np.uint8))


def with_track(video: Path, srt: str, target: Path, language: str) -> Path:
    """Remux a video together with a subtitle track."""
    text = target.with_suffix(".track.srt")
    text.write_text(srt)
    with av.open(str(video)) as pictures, av.open(str(text)) as spoken, av.open(str(target), "w") as output:
        streams = [(pictures, pictures.streams.video[0]), (spoken, spoken.streams.subtitles[0])]
        made = [output.add_stream_from_template(stream) for _, stream in streams]
        made[1].metadata["language"] = language
        for (container, stream), out in zip(streams, made):
            for packet in container.demux(stream):
                if packet.dts is not None:
                    packet.stream = out
                    output.mux(packet)
    text.unlink()
    return target


def test_tracks_inside_a_video_are_read(tmp_path: Path) -> None:
    path = with_track(
        small_video(tmp_path / "plain.mp4"),
        SRT.replace("00:01:00", "00:00:06").replace("00:01:02", "00:00:08"),
        tmp_path / "a.mkv",
        "ger",
    )
    (track,) = read_tracks(path)
    assert track.language == "de"
    lines = [(start, end, " ".join(text.split())) for start, end, text in track.lines]
    assert sorted(lines) == [(1, 3.5, "chop the onion"), (6, 8, "stir")]
    assert read_tracks(tmp_path / "plain.mp4") == []


def test_subtitles_beside_videos_are_found_by_name_and_language(tmp_path: Path) -> None:
    videos = {name: small_video(tmp_path / f"{name}.mp4") for name in ("soup", "soup.2", "cake")}
    shutil.copy(videos["soup"], tmp_path / "tea.mp4")
    with_track(tmp_path / "tea.mp4", SRT, tmp_path / "tea.mkv", "eng")
    (tmp_path / "tea.mp4").unlink()
    videos["tea"] = tmp_path / "tea.mkv"
    (tmp_path / "soup.srt").write_text(SRT.replace("stir", "plain"))
    (tmp_path / "soup.de.srt").write_text(SRT.replace("stir", "rühren"))
    (tmp_path / "soup.2.en.vtt").write_text(VTT)
    files = SubtitleFiles("beside", videos)
    said = {name: found.lines[-1][2] for name in videos if (found := files.find(name))}
    assert said == {"soup": "plain", "soup.2": "stir", "tea": "stir"}
    german = SubtitleFiles("beside", videos, "de")
    assert german.find("soup").lines[-1][2] == "rühren"  # type: ignore[union-attr]
    assert german.find("soup.2") is None, "only English there"


def test_the_command_says_what_was_understood_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("soup", "cake", "pie"):
        (tmp_path / "videos").mkdir(exist_ok=True)
        small_video(tmp_path / "videos" / f"{name}.mp4")
    (tmp_path / "videos" / "soup.en.srt").write_text(SRT)
    (tmp_path / "videos" / "soup.fr.srt").write_text(SRT)
    (tmp_path / "videos" / "twice").mkdir()
    shutil.copy(tmp_path / "videos" / "soup.mp4", tmp_path / "videos" / "twice" / "soup.mp4")
    (tmp_path / "videos" / "pie.srt").write_bytes(b"\x00\xff" * 40)
    rows = captions(CaptionsConfig(tmp_path / "videos", write=tmp_path / "out"))
    twice, *rows = rows
    assert "the id is taken by" in twice["reason"], "of two files of one name one is left out, and that is said"
    by_id = {row["video_id"]: row for row in rows}
    assert by_id["soup"]["note"] == "also in fr: --language chooses"
    assert by_id["soup"]["lines"] == 1 and by_id["soup"]["language"] == "en"
    assert by_id["soup"]["dropped"] == {"outside the video": 1}
    length = probe(tmp_path / "videos" / "soup.mp4").duration
    assert by_id["soup"]["coverage"] == round(100 * 2.5 / length, 1)
    assert by_id["cake"]["reason"] == "no subtitles" and "pie.srt" in by_id["pie"]["reason"]
    assert "dropped: 1 outside the video" in capsys.readouterr().out
    again = SubtitleFiles(tmp_path / "out", {"soup": tmp_path / "videos" / "soup.mp4"})
    assert again.ids() == {"soup"}, "the tables beside it are no video's"
    assert again.find("soup").lines == [(1.0, 3.5, "chop the onion")]  # type: ignore[union-attr]
    table = SubtitleFiles(tmp_path / "out" / "captions.json", {"soup": tmp_path / "videos" / "soup.mp4"})
    assert table.find("soup").lines == [(1.0, 3.5, "chop the onion")]  # type: ignore[union-attr]
    with pytest.raises(InputError, match="no such captions"):
        captions(CaptionsConfig(tmp_path / "videos", str(tmp_path / "nowhere")))


def test_markup_in_lines_is_taken_out_or_stays_text(tmp_path: Path) -> None:
    script = "<script>alert(1)</script> chop & stir"
    (tmp_path / "a.srt").write_text(SRT.replace("stir", script))
    assert "<script>" not in read_subtitles(tmp_path / "a.srt").lines[-1][2]
    (tmp_path / "a.json").write_text(json.dumps({"segments": [{"start": 0, "end": 2, "text": script}]}))
    assert read_subtitles(tmp_path / "a.json").lines == [(0, 2, script)]


def test_the_guard_on_sizes_looks_before_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subtitles, "MAX_BYTES", 10)
    (tmp_path / "a.srt").write_text(SRT)
    with pytest.raises(InputError, match="more than subtitles"):
        read_subtitles(tmp_path / "a.srt")
