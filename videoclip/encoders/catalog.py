"""Every frozen video encoder by name: one table for making them and for loading what was saved."""

from __future__ import annotations

from pathlib import Path

from videoclip.checkpoints import load_tensors
from videoclip.encoders.image import ImageEncoder
from videoclip.encoders.pixels import SIZES, Pixels
from videoclip.encoders.s3d import S3D
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.encoders.x3d import VARIANTS, X3D
from videoclip.errors import InputError
from videoclip.files import read_json
from videoclip.storage import local_copy

NAMES = ("s3d", *(f"x3d-{variant}" for variant in VARIANTS), *(f"pixels-{size}" for size in SIZES))
CLASSES: dict[str, type[VideoEncoder]] = {kind.__name__: kind for kind in (ImageEncoder, Pixels, S3D, X3D)}


def make_video_encoder(name: str, weights: Path | None = None, seed: int = 0) -> VideoEncoder:
    """An encoder by its name, one of NAMES, or by the hub id or folder of a Hugging Face vision model.

    Without `weights` an X3D gets random ones, drawn from `seed`, whose normalisation has to be calibrated.
    Raises InputError if the name is unknown, or weights are missing or do not fit.
    """
    if "/" in name:
        return ImageEncoder.from_pretrained(name)
    if name not in NAMES:
        raise InputError(f"unknown encoder {name!r}; choose {', '.join(NAMES)} or a hub id")
    if name.startswith("pixels-"):
        return Pixels(int(name.removeprefix("pixels-")))
    if name == "s3d":
        if weights is None:
            raise InputError("the encoder s3d needs its published weights: --weights s3d_howto100m.pth")
        return S3D.from_howto100m(weights)
    return X3D(name.removeprefix("x3d-"), weights, seed)


def load_video_encoder(folder: Path) -> VideoEncoder:
    """Read an encoder that `VideoEncoder.save` wrote, frozen and in evaluation mode.

    Raises InputError if the folder holds none, or if its weights are not those it was saved with.
    """
    folder = local_copy(Path(folder))
    path, weights = folder / "video_encoder.json", folder / "video_encoder.safetensors"
    description = read_json(path)
    if not isinstance(description, dict) or description.get("encoder") not in CLASSES:
        raise InputError(f"{path}: names no encoder that is known here ({', '.join(CLASSES)})")
    encoder = CLASSES[description["encoder"]](**description["options"])
    load_tensors(weights, encoder, encoder.name)
    if encoder.fingerprint() != description.get("fingerprint"):
        raise InputError(f"{weights}: not the weights that were saved here; extract again")
    if isinstance(encoder, ImageEncoder):
        encoder.read_beside(folder)
    return encoder
