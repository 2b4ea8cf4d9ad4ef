"""A model with two towers as the field's own harness, mteb (2.26 and newer), wants it: for its video retrieval tasks.

Videos are decoded by our own reader rather than by the harness's, so that a clip gets the tokens that extraction
would have given it, and only PyAV is needed.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from tqdm import tqdm

from videoclip.errors import InputError
from videoclip.two_towers import EncodesFiles

TEXTS_AT_ONCE = 256


class VideoCLIPForMTEB(AbsEncoder):
    """`mteb.evaluate(VideoCLIPForMTEB(model), tasks)` runs the harness's text and video tasks on a model."""

    def __init__(self, model: EncodesFiles, name: str = "videoclip/local", revision: str = "local") -> None:
        """`name` and `revision` are what the harness files its results under; a name has one slash."""
        module: Any = model  # a torch module, too
        self.model = model
        module.eval()
        similarity: Any = ScoringFunction.COSINE if model.config.normalize else ScoringFunction.DOT_PRODUCT
        parameters = sum(parameter.numel() for parameter in module.parameters())
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=name,
            revision=revision,
            release_date=None,
            languages=["eng-Latn"],
            n_parameters=parameters,
            memory_usage_mb=round(parameters * 4 / 2**20),
            max_tokens=model.config.max_words,
            embed_dim=model.config.width,
            license=None,
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=similarity,
            use_instructions=False,
            training_datasets=set(),
            modalities=["text", "video"],
        )

    def encode(self, inputs: Any, **options: Any) -> np.ndarray:
        """Embed what a data loader of the harness holds, a column `text`, `video` or both -> float32 [N, H].

        Both are averaged. A video that cannot be decoded becomes zeros, similar to nothing, and is named in a warning.
        Raises InputError if there is neither column.
        """
        columns = set(inputs.dataset.column_names)
        parts = []
        if "text" in columns:
            parts.append(self._encode_texts(inputs.dataset["text"]))
        if "video" in columns:
            parts.append(self._encode_videos(inputs.dataset, bool(options.get("show_progress_bar", True))))
        if not parts:
            raise InputError(f"the task brings {', '.join(sorted(columns))}, but neither text nor video")
        return np.mean(parts, 0)

    def _encode_texts(self, texts: Any) -> np.ndarray:
        texts = list(texts)
        pieces = [texts[first : first + TEXTS_AT_ONCE] for first in range(0, len(texts), TEXTS_AT_ONCE)]
        return np.concatenate([self.model.encode_text(piece).cpu().numpy() for piece in pieces])

    def _encode_videos(self, dataset: Any, show_progress: bool) -> np.ndarray:
        from datasets import Video

        rows = dataset.select_columns(["video"]).cast_column("video", Video(decode=False))
        features = np.zeros((len(rows), self.model.config.width), np.float32)
        for number, row in enumerate(tqdm(rows, desc="videos", unit="video", disable=not show_progress)):
            try:
                features[number] = self._encode_video(row["video"])
            except InputError as error:
                warnings.warn(f"video {number} of the task is left out: {error}", stacklevel=2)
        return features

    @torch.inference_mode()
    def _encode_video(self, video: dict[str, Any]) -> np.ndarray:
        """`video` is a file of the disk (`path`), or one in memory (`bytes`)."""
        if video.get("bytes") is None:
            return self.model.encode_video(Path(video["path"])).cpu().numpy()
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            file.write(video["bytes"])
            file.flush()
            return self.model.encode_video(Path(file.name)).cpu().numpy()
