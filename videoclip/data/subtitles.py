"""Subtitles as people have them: srt, vtt, ass, ttml, YouTube's and Whisper's forms, and tracks inside a video.

A file is decoded (byte order mark, UTF-8, else the likeliest encoding), read by its kind, and becomes raw captions
`{"start": […], "end": […], "text": […]}` in seconds, which `read_captions` then checks against the video. What is
left out on the way is counted by reason. Nothing in a file is trusted: sizes and lines are bounded, XML with entities
is refused, and markup is taken out or stays text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from videoclip.data.captions import Line
from videoclip.data.transcripts import read_transcript
from videoclip.errors import InputError

SUBTITLE_SUFFIXES = (".srt", ".vtt", ".ass", ".ssa", ".ttml", ".dfxp", ".json3", ".json")
MAX_BYTES = 64 * 2**20
MAX_LINES = 200_000  # a line every half second for a day, the longest video that is decoded
SAMPLE_BYTES = 2**16  # looked at to guess an encoding
TIME_INSIDE = re.compile(r"<(?:\d+:)?\d\d:\d\d\.\d{3}>")  # YouTube's automatic vtt marks every word with its time
TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
CUE = re.compile(r"((?:\d+:)?\d\d:\d\d[.,]\d{3})\s+-->\s+((?:\d+:)?\d\d:\d\d[.,]\d{3})")
LANGUAGE = re.compile(r"^[a-z]{2,3}(?:[-_][a-z0-9]{2,8})*$", re.IGNORECASE)
# ISO 639-2, as containers write it, to the two letters that file names use.
THREE_LETTERS = dict(
    pair.split(":")
    for pair in [
        "eng:en",
        "deu:de",
        "ger:de",
        "fra:fr",
        "fre:fr",
        "spa:es",
        "ita:it",
        "por:pt",
        "nld:nl",
        "dut:nl",
        "rus:ru",
        "ukr:uk",
        "pol:pl",
        "ces:cs",
        "cze:cs",
        "swe:sv",
        "nor:no",
        "dan:da",
        "fin:fi",
        "tur:tr",
        "ell:el",
        "gre:el",
        "hun:hu",
        "ron:ro",
        "rum:ro",
        "jpn:ja",
        "zho:zh",
        "chi:zh",
        "kor:ko",
        "ara:ar",
        "heb:he",
        "hin:hi",
        "tha:th",
        "vie:vi",
        "ind:id",
        "cat:ca",
    ]
)


@dataclass(frozen=True)
class Subtitles:
    """What was understood of one file or track.

    `lines`: (start, end, text) in seconds, in the file's order, times not yet checked; `language`: two letters where
    known, else ""; `dropped`: lines left out, by reason; `note`: what a person should know about the reading.
    """

    source: str
    lines: list[Line]
    language: str = ""
    dropped: Counter[str] = field(default_factory=Counter)
    note: str = ""
    rolling: bool = False  # each line may repeat the one before, as HowTo100M's do

    @property
    def raw(self) -> dict[str, list[Any]]:
        """The form that `read_captions` takes."""
        return {name: [line[i] for line in self.lines] for i, name in enumerate(("start", "end", "text"))}


def read_subtitles(path: Path) -> Subtitles:
    """Read one subtitle file, by its suffix; its language from its name (`soup.en.vtt`) or from inside it.

    Raises InputError if it is missing, too large, no text, or not what its suffix says.
    """
    path = Path(path)
    text, note = _read_text(path)
    kind = path.suffix.lower()
    if kind in (".json", ".json3"):
        lines, language, dropped = _read_json(path, text)
    elif kind == ".vtt" and TIME_INSIDE.search(text):
        (lines, dropped), language = _read_rolling(text), _header_language(text)
    elif kind in SUBTITLE_SUFFIXES:
        lines, dropped = _read_by_pysubs2(path, text)
        language = _header_language(text) if kind == ".vtt" else _xml_language(text)
    else:
        raise InputError(f"{path}: subtitles end in {', '.join(SUBTITLE_SUFFIXES)}")
    if len(lines) > MAX_LINES:
        raise InputError(f"{path}: {len(lines)} lines, but a video has at most {MAX_LINES}; cut the file")
    return Subtitles(str(path), lines, language_of_name(path) or short_language(language), dropped, note)


def language_of_name(path: Path) -> str:
    """`en` of `soup.en.vtt`, "" of `soup.vtt`."""
    inner = Path(path.stem).suffix.removeprefix(".")
    return short_language(inner) if LANGUAGE.match(inner) else ""


def short_language(language: str) -> str:
    """`en-US`, `eng` and `EN` are `en`; what cannot be a language is ""."""
    first = re.split("[-_]", language.strip().lower())[0]
    if not LANGUAGE.match(first) or first == "und":
        return ""
    return THREE_LETTERS.get(first, first)


def _read_text(path: Path) -> tuple[str, str]:
    """The text of a file and a note on its encoding, where that had to be guessed."""
    if not path.is_file():
        raise InputError(f"{path}: no such subtitle file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(f"{path}: {size / 2**20:.0f} MB is more than subtitles of one video can have")
    data = path.read_bytes()
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding, errors="replace"), ""
    try:
        return data.decode("utf-8"), ""
    except UnicodeDecodeError:
        pass
    from charset_normalizer import from_bytes

    guess = from_bytes(data[:SAMPLE_BYTES]).best()
    if guess is None:
        raise InputError(f"{path}: not text in any known encoding; save it as UTF-8")
    return data.decode(guess.encoding, errors="replace"), f"not UTF-8; read as {guess.encoding}"


def _read_json(path: Path, text: str) -> tuple[list[Line], str, Counter[str]]:
    try:
        return read_transcript(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no transcript: {error}") from None


def _read_by_pysubs2(path: Path, text: str) -> tuple[list[Line], Counter[str]]:
    import pysubs2

    kind = {".dfxp": ".ttml"}.get(path.suffix.lower(), path.suffix.lower()).removeprefix(".")
    if kind == "ttml" and re.search(r"<!(DOCTYPE|ENTITY)", text, re.IGNORECASE):
        raise InputError(f"{path}: XML with declarations of its own is not read; remove its DOCTYPE")
    dropped: Counter[str] = Counter()
    if text.count("-->") > MAX_LINES or text.count("\nDialogue:") > MAX_LINES:
        raise InputError(f"{path}: more than {MAX_LINES} lines, which no video has; cut the file")
    try:
        events = pysubs2.SSAFile.from_string(text, format_=kind).events
    except Exception as error:  # each of its readers raises kinds of its own for a file of another kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a {kind} file ({reason})") from None
    if not events and text.strip():
        raise InputError(f"{path}: no subtitle could be found in this {kind} file")
    lines: list[Line] = []
    for event in events:
        if event.is_comment or event.is_drawing:
            dropped["comment or drawing"] += 1
            continue
        lines.append((event.start / 1000, event.end / 1000, TAG.sub("", event.plaintext)))
    return lines, dropped


def _read_rolling(text: str) -> tuple[list[Line], Counter[str]]:
    """YouTube's automatic vtt: a cue shows the line before again, then the new one with a time before each word."""
    dropped: Counter[str] = Counter()
    lines: list[Line] = []
    shown: set[str] = set()
    for start, end, rows in _cues(text):
        plain = [" ".join(TAG.sub("", TIME_INSIDE.sub("", row)).split()) for row in rows]
        new = [row for row in plain if row and row not in shown]
        dropped["rolling repeat"] += sum(1 for row in plain if row in shown)
        shown = {row for row in plain if row}
        if new:
            lines.append((start, end, " ".join(new)))
    return lines, dropped


def _cues(text: str) -> list[tuple[float, float, list[str]]]:
    found: list[tuple[float, float, list[str]]] = []
    for row in text.splitlines():
        cue = CUE.search(row)
        if cue:
            found.append((_seconds(cue[1]), _seconds(cue[2]), []))
        elif found:
            found[-1][2].append(row)
    return found


def _seconds(time: str) -> float:
    parts = [float(part) for part in time.replace(",", ".").split(":")]
    return sum(part * 60**place for place, part in enumerate(reversed(parts)))


def _header_language(text: str) -> str:
    match = re.search(r"^Language:\s*(\S+)", text[:1000], re.MULTILINE)
    return match[1] if match else ""


def _xml_language(text: str) -> str:
    match = re.search(r'xml:lang="([^"]{2,20})"', text[:2000])
    return match[1] if match else ""


# --- Tracks inside a video ----------------------------------------------------------------------------------------


def read_tracks(path: Path) -> list[Subtitles]:
    """Every subtitle track of text inside a video file, in the file's order; none is no error.

    Tracks that are pictures (DVD, Blu-ray) are left out. Raises InputError if the file cannot be opened.
    """
    import av

    from videoclip.data.video import open_container

    tracks = []
    with open_container(path) as container:
        streams = [(number, s) for number, s in enumerate(container.streams.subtitles) if s.codec_context is not None]
        readable = [(number, s) for number, s in streams if s.codec_context.name in TEXT_CODECS]
        lines: dict[int, list[Line]] = {s.index: [] for _, s in readable}
        dropped: dict[int, Counter[str]] = {s.index: Counter() for _, s in readable}
        damage = ""
        try:
            for packet in container.demux([s for _, s in readable]) if readable else ():
                if packet.pts is None or not packet.size:
                    continue
                start = float(packet.pts * packet.time_base)
                end = start + float((packet.duration or 0) * packet.time_base)
                _add_packet(lines[packet.stream.index], dropped[packet.stream.index], start, end, packet)
        except av.error.FFmpegError as error:
            damage = f"damaged ({error.strerror}); read as far as possible"
        for number, stream in readable:
            language = short_language(stream.metadata.get("language", ""))
            source = f"{path} (subtitle track {number})"
            tracks.append(Subtitles(source, lines[stream.index], language, dropped[stream.index], damage))
    return tracks


TEXT_CODECS = ("srt", "subrip", "ass", "ssa", "mov_text", "webvtt", "text")


def _add_packet(lines: list[Line], dropped: Counter[str], start: float, end: float, packet: Any) -> None:
    if len(lines) >= MAX_LINES:
        dropped["more lines than a video can have"] += 1
        return
    for subtitle in packet.decode():
        text = subtitle.dialogue.decode("utf-8", errors="replace") if hasattr(subtitle, "dialogue") else ""
        text = re.sub(r"\\[Nnh]", " ", re.sub(r"\{[^{}]*\}", "", text))
        if text.strip():
            lines.append((start, end, TAG.sub("", text)))
