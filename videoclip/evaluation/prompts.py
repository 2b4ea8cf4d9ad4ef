"""Words for labels and captions: a text may be put into several templates, whose embeddings are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from videoclip.errors import InputError
from videoclip.retrieval.index import unit

if TYPE_CHECKING:  # a file of predictions is scored faster than torch is imported
    from videoclip.model import VideoCLIP

PLAIN = ("{}",)
TEXTS_AT_ONCE = 256


def embed_texts(model: VideoCLIP, texts: Sequence[str], templates: Sequence[str] = PLAIN) -> np.ndarray:
    """float32 [N, H]: each text in every template ("a video of {}"), averaged; unit length if the model's are.

    Raises InputError if a template does not say where the text goes.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"the template {template!r} must hold {{}} once, where the text goes")
    if not templates:
        raise InputError("give at least one template; {} is the plain text")
    from tqdm import tqdm

    features = np.zeros((len(texts), model.config.width), np.float32)
    few = len(texts) * len(templates) <= 4 * TEXTS_AT_ONCE  # a second or two
    for first in tqdm(range(0, len(texts), TEXTS_AT_ONCE), desc="texts", unit="block", disable=few):
        block = texts[first : first + TEXTS_AT_ONCE]
        for template in templates:
            embedded = model.encode_text([template.replace("{}", text) for text in block]).cpu().numpy()
            features[first : first + len(block)] += embedded / len(templates)
    if not model.config.normalize:
        return features
    return unit(features)
