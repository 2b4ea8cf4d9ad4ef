"""Speech to text by faster-whisper, with the figures that give invented lines away; needs the extra `asr`."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from videoclip.errors import InputError


@dataclass(frozen=True)
class SpeechConfig:
    """How speech becomes text."""

    model: str = "small"
    """A size (tiny, base, small, medium, large-v3), the hub id or the folder of a CTranslate2 Whisper."""
    language: str = ""
    """Two letters; recognised from the speech where empty."""
    skip_silence: bool = True
    """Leave out what a voice activity detector takes for silence; much of what is invented is invented there."""
    device: str = "auto"
    """auto, cpu or cuda."""


class Transcriber(Protocol):
    """The border to the recogniser: a file in; segments with their figures, the language and the length out."""

    def __call__(self, path: Path) -> dict[str, Any]:
        """`{"language", "duration", "segments": [{"start", "end", "text", "words", "no_speech_prob", …}]}`."""
        ...


@functools.lru_cache(maxsize=1)
def _load(model: str, device: str) -> Any:
    try:
        from faster_whisper import WhisperModel
    except ImportError:
        raise InputError("speech to text is not installed; run: pip install 'videoclip[asr]'") from None
    try:
        return WhisperModel(model, device=device, cpu_threads=1)
    except Exception as error:  # the hub, CTranslate2 and its file formats each raise their own kinds
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{model}: neither a size, nor a hub id, nor a folder of a Whisper model ({reason})") from None


class FasterWhisper:
    """A `Transcriber`. The model is loaded with the first file, once a process."""

    def __init__(self, config: SpeechConfig) -> None:
        self.config = config

    def __call__(self, path: Path) -> dict[str, Any]:
        """Transcribe one file.

        Raises InputError if the model cannot be loaded or the file holds no sound that can be decoded.
        """
        model = _load(self.config.model, self.config.device)
        try:
            segments, info = model.transcribe(
                str(path),
                language=self.config.language or None,
                vad_filter=self.config.skip_silence,
                word_timestamps=True,
                condition_on_previous_text=False,  # or one invented line is said for minutes
            )
            rows = [_as_row(segment) for segment in segments]
        except (ValueError, IndexError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{path}: its sound cannot be transcribed ({reason})") from None
        return {"language": info.language, "duration": float(info.duration), "segments": rows}


def _as_row(segment: Any) -> dict[str, Any]:
    words = [
        {"word": w.word, "start": w.start, "end": w.end, "probability": w.probability} for w in segment.words or []
    ]
    names = ("start", "end", "text", "avg_logprob", "compression_ratio", "no_speech_prob")
    return {**{name: getattr(segment, name) for name in names}, "words": words}


def described(config: SpeechConfig) -> dict[str, Any]:
    """What a transcript depends on, for the file that holds it."""
    return asdict(config)
