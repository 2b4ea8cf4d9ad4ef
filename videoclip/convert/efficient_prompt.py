"""The public Efficient-Prompt release: its checkpoints in, our prompting recipe out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from videoclip.encoders.weights import load_checked, read_checkpoint
from videoclip.errors import InputError
from videoclip.parts.clip import HEAD_WIDTH, Clip, count_layers, read_clip_config
from videoclip.recipes.prompting import LONGEST_CLIP, Config, Recipe

CLIP = "clipmodel."  # the release stores all of the CLIP that its prompts belong to


class _ByTheirNames(nn.Module):
    """The trained and frozen parts of a recipe by the release's names, so that nothing has to be renamed."""

    def __init__(self, model: Recipe) -> None:
        super().__init__()
        self.embedding = model.prompts.embedding
        self.temporalEmbedding = model.temporal.positions
        self.temporalModelling = model.temporal.transformer
        self.clipmodel = model.towers


def from_efficient_prompt(path: Path | str, prefix: int = 16, postfix: int = 16) -> Recipe:
    """Read a checkpoint of the Efficient-Prompt release, `{"state_dict": …}` or the bare state dict.

    Sizes are read off the tensors, heads are one for 64 columns as in the release. `prefix` and `postfix` are not in
    the file: as it was trained, 16+X+16 unless said otherwise. `video_features` and `class_features` of what is
    returned are the release's; prompts stand at absolute positions, as there.
    Raises InputError if the file cannot be read safely, or if names are missing or unknown; it lists them.
    """
    path = Path(path)
    state = _read(path)
    try:
        clip = read_clip_config({name.removeprefix(CLIP): t for name, t in state.items() if name.startswith(CLIP)})
        positions, width = state["embedding.weight"].shape
        frames, dimension = state["temporalEmbedding.weight"].shape
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not an Efficient-Prompt checkpoint: missing {error}") from None
    if (positions, width, dimension) != (clip.positions, clip.width, clip.dimension):
        raise InputError(
            f"{path}: prompts of {positions} x {width} and frames of {dimension}, but its CLIP has {clip.positions} "
            f"positions of {clip.width} and embeddings of {clip.dimension}: they do not belong together"
        )
    config = Config(
        prefix=prefix,
        postfix=postfix,
        position="absolute",
        frames=frames,
        layers=count_layers(state, "temporalModelling."),
        heads=max(1, dimension // HEAD_WIDTH),
        clip=asdict(clip),
        width=dimension,
        max_seconds=LONGEST_CLIP * frames,
        max_words=positions - prefix - postfix - 2,
    )
    model = Recipe(config, Clip(clip))
    load_checked(_ByTheirNames(model), state, path, "an Efficient-Prompt checkpoint", most=20)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint with or without its optimiser, as float32."""
    stored = read_checkpoint(path)
    if isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):
        stored = stored["state_dict"]
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise InputError(f'{path}: expected {{"state_dict": {{name: tensor}}}}')
    return {str(name).removeprefix("module."): value.float() for name, value in stored.items()}
