"""Words for labels and captions: a text may be put into several templates, whose embeddings are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from videoclip.errors import InputError

if TYPE_CHECKING:  # a file of predictions is scored faster than torch is imported
    from videoclip.model import VideoCLIP

PLAIN = ("{}",)


def embed_texts(model: VideoCLIP, texts: Sequence[str], templates: Sequence[str] = PLAIN) -> np.ndarray:
    """float32 [N, H]: each text in every template ("a video of {}"), averaged; unit length if the model's are.

    Raises InputError if a template does not say where the text goes.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"the template {template!r} must hold {{}} once, where the text goes")
    if not templates:
        raise InputError("give at least one template; {} is the plain text")
    total = sum(model.encode_text([template.replace("{}", text) for text in texts]) for template in templates)
    features: np.ndarray = (total / len(templates)).cpu().numpy()  # type: ignore[union-attr,operator]
    if not model.config.normalize:
        return features
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
