"""VideoCLIP: find moments in narrated video by describing them, learned without labels (Xu et al., EMNLP 2021)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported when first asked for: scoring a file of predictions should not have to wait for torch.
_PUBLIC = {
    "InputError": "videoclip.errors",
    "VideoCLIP": "videoclip.model",
    "VideoCLIPConfig": "videoclip.model",
    "contrastive_loss": "videoclip.losses",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'videoclip' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
