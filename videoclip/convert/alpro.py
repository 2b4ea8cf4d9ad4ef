"""ALPRO's public checkpoints in: pretraining, retrieval and question answering, read off the names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from videoclip.encoders.weights import check_names, read_checkpoint
from videoclip.errors import InputError
from videoclip.parts.fused_towers import LOSSES, AlproConfig, FusedTowers, two_layers
from videoclip.parts.prompter import Prompter
from videoclip.parts.towers import TowersShape
from videoclip.parts.vision_transformer import VisionShape
from videoclip.parts.vision_weights import HEAD_WIDTH, stretched
from videoclip.recipes.alpro import Recipe
from videoclip.transformer import TransformerShape

TASKS = ("pretraining", "retrieval", "answering")
VISION, BERT = "visual_encoder.model.", "text_encoder.bert."
DECODER = "text_encoder.cls.predictions.decoder.weight"
NOTHING = torch.empty(0, 0)
# What the release stores and never uses: Kinetics' classifier, position counts, and the prompter's heads; of the
# prompter's BERT the fusion layers are not used either (`_without_fusion`).
UNUSED = re.compile(
    r"visual_encoder\.model\.head\.(weight|bias)$|embeddings\.position_ids$|^prompter\.(text_encoder\.cls|itm_head)\."
)


def from_alpro(
    path: Path | str,
    heads: int | None = None,
    text_layers: int | None = None,
    task: str | None = None,
    frames: int | None = None,
    size: int | None = None,
    answers: int | None = None,
) -> Recipe:
    """Read a checkpoint of the ALPRO release; its task and all sizes are read off names and shapes.

    `heads`: one for 64 columns unless given; `text_layers`: the lower half of BERT's unless given; neither can be
    read off. `task` ("pretraining", "retrieval", "answering"): what the file must be good for. A pretraining
    checkpoint starts both others, as in the release: the prompter is dropped, and `frames`, `size` and `answers` make
    it another model (time stretched by nearest neighbour; places too, along their flattened order, as the release does
    it; a new classifier).
    The returned model is in evaluation mode.

    Raises InputError if the file cannot be read safely, is a checkpoint of another task, or if names are missing or
    unknown; it lists them.
    """
    path = Path(path)
    state = _tensors(path)
    found = _task(path, state)
    asked = task or found
    if asked not in TASKS:
        raise InputError(f"task must be one of {', '.join(TASKS)}, not {asked!r}")
    if asked != found and found != "pretraining":
        raise InputError(f"{path}: a checkpoint of {found}, not of {asked}; give the pretraining checkpoint")
    if asked != found:
        state = {name: value for name, value in state.items() if not name.startswith(("prompter.", "mpm_head."))}
        if asked == "answering":
            state = {name: value for name, value in state.items() if ".cls." not in name}
    options = _options(path, state, heads, text_layers, asked, frames, size, answers)
    with torch.device("meta"):  # half a billion random numbers would be drawn for nothing
        model = Recipe(options)
        if any(name.startswith("prompter.") for name in state):
            model.attach(Prompter(_shape(path, state, "prompter.", heads, text_layers), options.entities))
            state = _without_fusion(state, model.shape.text_layers)
    _stretch(state, model.state_dict())
    if asked == "answering" and found != asked:
        fresh = two_layers(model.shape.text.width, options.answers)
        state.update({f"classifier.{name}": value for name, value in fresh.state_dict().items()})
    check_names(model, state, path, f"an ALPRO checkpoint of {asked}", most=20)
    model.load_state_dict(state, assign=True)
    return model.eval()


def for_questions(source: FusedTowers, answers: Sequence[str], frames: int) -> Recipe:
    """A pretrained model as one that chooses from `answers`, on so many frames: a new classifier, no prompter.

    A model that has answers already keeps its classifier if they are the same. As in the release, what answering does
    not use is dropped, and time embeddings are stretched by nearest neighbour.
    """
    shape = source.shape
    vision = replace(shape.vision, frames=frames)
    config = replace(
        source.config,
        shape=replace(shape, vision=vision),
        losses=(),
        entities=0,
        entity_names=(),
        answers=len(answers),
        answer_names=tuple(answers),
        has_prompter=False,
    )
    model = Recipe(config)
    own = model.state_dict()
    kept = {name: value for name, value in source.state_dict().items() if name in own}
    if source.config.answer_names != tuple(answers):
        kept = {name: value for name, value in kept.items() if not name.startswith("classifier.")}
    _stretch(kept, own)
    model.load_state_dict({**own, **kept})
    model.frozen = source.frozen
    model.frozen.tokenizer = source.tokenizer()
    return model.to(source.temp.device)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors under one set of names, float32, without those that are never used."""
    stored = read_checkpoint(path)
    for key in ("model_state_dict", "model"):  # restore.pt of the release, and LAVIS's files
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(v, Tensor) for v in stored.values()):
        raise InputError(f"{path}: expected tensors by name, as in ALPRO's `alpro_pretrained_ckpt.pt`")
    state = {re.sub(r"text_encoder\.(?=embeddings|encoder)", BERT, name): v.float() for name, v in stored.items()}
    for name in [name for name in state if name.endswith("predictions.decoder.bias")]:
        state[name.replace("decoder.bias", "bias")] = state.pop(name)  # loaded last in the release, into the same bias
    state = {name: value for name, value in state.items() if not UNUSED.search(name)}
    if torch.equal(state.get(DECODER, torch.zeros(0)), state.get(f"{BERT}embeddings.word_embeddings.weight", NOTHING)):
        del state[DECODER]  # the word embeddings themselves, as in every published file
    return state


def _task(path: Path, state: Mapping[str, Tensor]) -> str:
    if "itm_head.weight" not in state or "visual_encoder.model.cls_token" not in state:
        raise InputError(f"{path}: not an ALPRO checkpoint: lacks itm_head.weight or visual_encoder.model.cls_token")
    if "classifier.0.weight" in state:
        return "answering"
    return "pretraining" if "mpm_head.0.weight" in state else "retrieval"


def _options(
    path: Path,
    state: dict[str, Tensor],
    heads: int | None,
    text_layers: int | None,
    task: str,
    frames: int | None,
    size: int | None,
    answers: int | None,
) -> AlproConfig:
    shape = _shape(path, state, "", heads, text_layers)
    vision = replace(shape.vision, frames=frames or shape.vision.frames, size=size or shape.vision.size)
    head = state.get("classifier.2.weight")
    if task == "answering" and head is None and not answers:
        raise InputError(f"{path}: a pretraining checkpoint answers no questions yet; say how many answers there are")
    losses = {"pretraining": LOSSES, "retrieval": ("vtc", "vtm", "mlm"), "answering": ()}[task]
    return AlproConfig(
        shape=replace(shape, vision=vision),
        losses=losses,
        entities=len(state["mpm_head.2.weight"]) if task == "pretraining" else 0,
        answers=(answers or 0) if head is None else len(head),
        word_mask=replace(AlproConfig().word_mask, vocabulary=shape.vocabulary),
        tied_words=DECODER not in state,
    )


def _shape(
    path: Path, state: dict[str, Tensor], prefix: str, heads: int | None, text_layers: int | None
) -> TowersShape:
    """Sizes of the model, or with "prompter." of its prompter."""
    vision, bert = f"{prefix}{VISION}", f"{prefix}{BERT}"
    try:
        width, _, patch, _ = state[f"{vision}patch_embed.proj.weight"].shape
        layers = _count(state, f"{bert}encoder.layer.")
        words = state[f"{bert}embeddings.word_embeddings.weight"]
        return TowersShape(
            vision=VisionShape(
                size=round((state[f"{vision}pos_embed"].shape[1] - 1) ** 0.5) * patch,
                patch=patch,
                frames=state[f"{vision}time_embed"].shape[1],
                width=width,
                layers=_count(state, f"{vision}blocks."),
                heads=heads or max(1, width // HEAD_WIDTH),
                intermediate=len(state[f"{vision}blocks.0.mlp.fc1.weight"]),
                drop_path=0.1,
            ),
            text=TransformerShape(
                width=words.shape[1],
                heads=heads or max(1, words.shape[1] // HEAD_WIDTH),
                intermediate=len(state[f"{bert}encoder.layer.0.intermediate.dense.weight"]),
                layers=layers,
                positions=len(state[f"{bert}embeddings.position_embeddings.weight"]),
            ),
            text_layers=text_layers or max(1, layers // 2),
            vocabulary=len(words),
            projection=len(state[f"{prefix}vision_proj.weight"]),
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not an ALPRO checkpoint: missing {error}") from None


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers are numbered after `prefix`."""
    numbers = [int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)]
    return max(numbers, default=-1) + 1


def _without_fusion(state: dict[str, Tensor], text_layers: int) -> dict[str, Tensor]:
    """Without the layers of the prompter's BERT that would see words and video: it never fuses."""
    prefix = f"prompter.{BERT}encoder.layer."
    return {
        name: value
        for name, value in state.items()
        if not name.startswith(prefix) or int(name[len(prefix) :].split(".")[0]) < text_layers
    }


def _stretch(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Fit times and places to another number of frames or another size, as the release does when it fine-tunes."""
    times, places = f"{VISION}time_embed", f"{VISION}pos_embed"
    state[times] = stretched(state[times], wanted[times].shape[1])
    if state[places].shape != wanted[places].shape:
        first, others = state[places][:, :1], state[places][:, 1:]
        # Along the flattened patches, in one dimension: wrong for a grid, but what the published models were made with.
        state[places] = torch.cat([first, stretched(others, wanted[places].shape[1] - 1)], 1)
