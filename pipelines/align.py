"""`videoclip align`: shards whose captions stand where they are shown, made from shards whose narration is off."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm
from tyro.conf import Positional

from pipelines.figures import Figures
from pipelines.runs import refuse_other_run, start_run, writes_output
from videoclip.alignment import Aligner, Moves
from videoclip.checkpoints import WEIGHTS_FILE
from videoclip.data.captions import Captions
from videoclip.data.recaption import recaption_part
from videoclip.data.shards import FROZEN, MANIFEST, CaptionFile, Manifest, Part, Shards
from videoclip.errors import InputError
from videoclip.evaluation.inputs import is_frozen, load_model_and_shards
from videoclip.files import read_json, sha256, write_json
from videoclip.pretrained import find_folder
from videoclip.remote import is_remote, uri

ENCODER_FILES = ("video_encoder.json", "video_encoder.safetensors")


@dataclass(frozen=True)
class AlignConfig:
    """Move captions to where a model finds them shown, and drop those of nothing that is: new shards, same tokens.

    Run it again to go on where it stopped; the shards are there when it is done, and not before.
    """

    shards: Annotated[Path, Positional]
    """Folder of shards with captions."""
    model: Path
    """Folder of a model trained on them: best of the recipe `alignment`, but any that places sentences will do."""
    output: Path
    """Folder for the new shards; their tokens are those of the old ones (hard links, or copies across disks)."""
    moves: Moves = field(default_factory=Moves)
    precision: float = 0.9
    """So many of the dropped captions shall be of nothing that is shown, as far as can be estimated without labels."""
    keep_all: bool = False
    """Move captions only; drop none."""
    seed: int = 0
    """Of the videos by which the limit for dropping is found."""


@writes_output
def align(config: AlignConfig) -> Figures:
    """Run the stage; returns how many captions were moved, kept in place and dropped, which it writes.

    Raises InputError if the shards hold no captions, are of another encoder than the model's, or the output holds
    something else.
    """
    if is_remote(config.shards):
        raise InputError(f"{uri(config.shards)}: align links the parts of its shards; copy them to a disk first")
    if config.output.resolve() == config.shards.resolve():
        raise InputError(f"{config.output}: these are the shards that are read; choose another --output")
    model, shards = load_model_and_shards(config.model, config.shards)
    identity = {
        "parts": [part.digest for part in shards.manifest.parts],
        "model": FROZEN if is_frozen(config.model) else sha256(find_folder(config.model) / WEIGHTS_FILE),
        **{name: value for name, value in asdict(config).items() if name not in ("shards", "model", "output")},
    }
    if (config.output / MANIFEST).exists() and not (config.output / "alignment.json").exists():
        raise InputError(f"{config.output}: holds other shards already; choose another --output")
    refuse_other_run(config.output, identity)
    if (config.output / MANIFEST).exists():
        print(f"{config.output} is finished; nothing to do")
        return Figures(read_json(config.output / "alignment.json"))
    aligner = Aligner.fit(model, shards, config.moves, None if config.keep_all else config.precision, config.seed)
    start_run(config.output, "align", config, identity)
    parts, counts = [], []
    bar = tqdm(total=len(shards), unit="video", desc="aligning", disable=len(shards) < 20)
    for number, part in enumerate(shards.manifest.parts):
        aligned, of_part = _align_part(config, shards, aligner, number, part, bar)
        parts.append(aligned)
        counts.append(of_part)
    bar.close()
    return _finish(config, shards.manifest, aligner, parts, counts)


def _align_part(
    config: AlignConfig, shards: Shards, aligner: Aligner, number: int, part: Part, bar: tqdm[Any]
) -> tuple[Part, dict[str, int]]:
    """One part with its new captions, and what became of the old ones; read from disk where it was done before."""
    done = config.output / f"aligned-{number:05d}.json"
    if done.exists():
        values = read_json(done)
        captions = CaptionFile(**values["captions"]) if values["captions"] else None
        bar.update(part.videos)
        return replace(part, captions=captions), values["counts"]
    for name in (part.name, *((part.captions.name,) if part.captions else ())):
        _link(config.shards / name, config.output / name)
    rows = iter(range(int(shards.first_rows[number]), int(shards.first_rows[number + 1])))
    aligner.counts.clear()

    def captions_of(video_id: str, seconds: int) -> Captions:
        bar.update()
        row = next(rows)
        return aligner.align(shards.record(row), row)

    aligned = recaption_part(config.output, part, shards.manifest.dimension, captions_of)
    counts = dict(aligner.counts)
    write_json(done, {"captions": asdict(aligned.captions) if aligned.captions else None, "counts": counts})
    return aligned, counts


def _finish(
    config: AlignConfig, manifest: Manifest, aligner: Aligner, parts: list[Part], counts: list[dict[str, int]]
) -> Figures:
    """Name the new parts, from when on these are shards, and clear away what was of the way there."""
    total = {name: sum(of_part.get(name, 0) for of_part in counts) for name in ("moved", "in place", "dropped")}
    limit = {} if aligner.limit is None else {"limit": {k: round(v, 4) for k, v in asdict(aligner.limit).items()}}
    figures = Figures({"captions": sum(total.values()), **total, **limit})
    for name in ENCODER_FILES:
        if (config.shards / name).exists():
            _link(config.shards / name, config.output / name)
    write_json(config.output / "alignment.json", figures)
    replace(manifest, parts=parts).write(config.output)
    named = {part.captions.name for part in parts if part.captions is not None}
    for path in [*config.output.glob("captions-*.arrow"), *config.output.glob("aligned-*.json")]:
        if path.name not in named:
            path.unlink()
    print(f"{config.output}: " + ", ".join(f"{count} {name}" for name, count in total.items()))
    return figures


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the disk is another one."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        unfinished = target.with_name(f".{target.name}")
        shutil.copyfile(source, unfinished)
        os.replace(unfinished, target)
