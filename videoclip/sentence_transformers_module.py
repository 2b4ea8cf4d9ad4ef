"""A VideoCLIP as sentence-transformers (6 and newer) loads it: texts and video files in, one vector each out.

`SentenceTransformer("runs/mine/model", trust_remote_code=True).encode(["chop the onion", "soup.mp4"])`. A model's
folder says so in `modules.json`; this module must be installed where it is loaded, for it is not copied there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules.input_module import InputModule

from videoclip.data.video import VIDEO_SUFFIXES
from videoclip.errors import InputError
from videoclip.model import VideoCLIP


class VideoCLIPModule(InputModule):
    """The whole pipeline in one module: words are cut and videos decoded here, and both are embedded."""

    def __init__(self, model: VideoCLIP) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.tokenizer = model.tokenizer().tokenizer

    @property
    def modalities(self) -> list[Any]:
        """What `encode` takes; batches may mix both."""
        return ["text", "video", "message"]

    @property
    def max_seq_length(self) -> int:
        """Words of a text that are read; those beyond are left out."""
        return self.model.config.max_words

    def get_embedding_dimension(self) -> int:
        """Width of a vector."""
        return self.model.config.width

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Keep texts and decode videos to tokens: {"texts": …, "tokens": …}, one of both None at every place.

        Raises InputError if a video cannot be decoded, or an input is neither.
        """
        texts: list[str | None] = []
        tokens: list[torch.Tensor | None] = []
        for given in inputs:
            path = _video_path(given)
            if path is None and not isinstance(given, str):
                raise InputError(f"an input is a text or the path of a video, not {type(given).__name__}")
            texts.append(f"{prompt or ''}{given}" if path is None else None)
            encoder = self.model.frozen_video_encoder() if path is not None else None
            tokens.append(torch.from_numpy(encoder.encode_video(path)) if encoder is not None and path else None)
        return {"texts": texts, "tokens": tokens}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add `sentence_embedding`, float32 [N, H]."""
        rows = [
            self.model.embed_long_video(video) if video is not None else self.model.encode_text([text])[0]
            for text, video in zip(features["texts"], features["tokens"])
        ]
        return {**features, "sentence_embedding": torch.stack(rows).float()}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write the model's folder."""
        self.model.save_pretrained(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, *_: Any, **__: Any) -> VideoCLIPModule:
        """Read a model's folder, or one of the hub."""
        return cls(VideoCLIP.from_pretrained(model_name_or_path))


def _video_path(given: Any) -> Path | None:
    if isinstance(given, dict):
        given = given.get("video", given)
    if isinstance(given, Path) or (isinstance(given, str) and given.lower().endswith(VIDEO_SUFFIXES)):
        return Path(given)
    return None
