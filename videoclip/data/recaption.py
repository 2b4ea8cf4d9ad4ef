"""New captions for videos whose tokens are there: tokens cost days, captions minutes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from videoclip.data.captions import Captions
from videoclip.data.shards import CaptionFile, Manifest, Part, captions_to_arrow, check_part, open_part, write_batch
from videoclip.files import atomic_path


def recaption(folder: Path, captions_of: Callable[[str, int], Captions]) -> int:
    """Give every finished video new captions, `captions_of(video_id, seconds of tokens)`; tokens stay as they are.

    The new files lie beside the old ones until the manifest names them all at once: a run that dies before has changed
    nothing. Returns how many parts have other captions now.
    Raises InputError if a part is missing or damaged.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    parts = [recaption_part(folder, part, manifest.dimension, captions_of) for part in manifest.parts]
    changed = sum(new != old for new, old in zip(parts, manifest.parts))
    if changed:
        manifest.parts = parts
        manifest.write(folder)
    named = {part.captions.name for part in parts if part.captions is not None}
    for path in folder.glob("captions-*.arrow"):
        if path.name not in named:
            path.unlink()  # of the captions before, or of a run that died here
    return changed


def recaption_part(folder: Path, part: Part, dimension: int, captions_of: Callable[[str, int], Captions]) -> Part:
    """Write one part's captions as `recaption` does; what the manifest is to say of the part then.

    Raises InputError if the part is missing or damaged.
    """
    import pyarrow as pa

    check_part(folder, part, verify=False)
    reader = open_part(folder, part, dimension)
    seconds = np.diff(reader.token_offsets).tolist()
    captions = [captions_of(video_id, count) for video_id, count in zip(reader.video_ids(), seconds)]
    if all(_same(new, reader.captions(row)) for row, new in enumerate(captions)):
        return part
    sink = pa.BufferOutputStream()
    write_batch(sink, captions_to_arrow(captions))
    data = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(data).hexdigest()
    name = f"captions-{Path(part.name).stem.removeprefix('part-')}-{digest[:12]}.arrow"
    with atomic_path(folder / name) as temporary:
        temporary.write_bytes(data)
    return replace(part, captions=CaptionFile(name, len(data), digest))


def _same(one: Captions, other: Captions) -> bool:
    times = np.array_equal(one.start, other.start) and np.array_equal(one.end, other.end)
    return times and list(one.text) == list(other.text)
