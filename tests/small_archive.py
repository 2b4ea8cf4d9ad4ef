"""A small archive that tests make without training: random tokens of rendered kitchen videos, and what was said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from videoclip.data.captions import NO_CAPTIONS, Captions, captions_of_video
from videoclip.data.words import train_wordpiece
from videoclip.files import sha256
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.search.archive import Archive
from videoclip.search.building import NewVideo, apply_changes, find_changes
from videoclip.search.store import Store, window_count
from videoclip.search.vectors import BLOCKS, WindowConfig, write_block
from videoclip.synthetic.kitchen import KitchenConfig, KitchenVideo, narrate, plan_kitchen, render_video

KITCHEN = KitchenConfig(seed=3, train_videos=0, test_videos=6, recipes=2, seconds=28)
WINDOWING = WindowConfig(6, 3)
SILENT = 5  # the video in which nothing is said
SAID = "<script>document.title='owned'</script> grüße & <b>bold</b> words"


def planned() -> list[KitchenVideo]:
    return plan_kitchen(KITCHEN)


def make_model(folder: Path) -> VideoCLIP:
    torch.manual_seed(0)
    tokenizer = train_wordpiece([text for video in planned() for text in narrate(video, KITCHEN)["text"]], 300)
    shape = {"video_dimension": 8, "width": 16, "layers": 1, "heads": 2, "intermediate": 32, "max_seconds": 12}
    ids = {"vocabulary": tokenizer.vocabulary, "cls_id": tokenizer.cls_id, "sep_id": tokenizer.sep_id}
    model = VideoCLIP(VideoCLIPConfig(**shape, **ids))
    model.frozen.tokenizer = tokenizer
    model.save_pretrained(folder)
    return VideoCLIP.from_pretrained(folder)


def tokens_of(video: KitchenVideo) -> np.ndarray:
    return np.random.default_rng(video.seed).standard_normal((video.duration, 8)).astype(np.float16)


def spoken_in(number: int, video: KitchenVideo) -> Captions:
    if number == SILENT:
        return NO_CAPTIONS
    captions, _ = captions_of_video(narrate(video, KITCHEN), video.duration, video.video_id)
    if number:
        return captions
    extra = Captions(np.float32([12]), np.float32([15]), [SAID])
    joined = [np.append(getattr(captions, name), getattr(extra, name)) for name in ("start", "end")]
    order = np.argsort(joined[0], kind="stable")
    texts = [*captions.text, SAID]
    return Captions(joined[0][order], joined[1][order], [texts[i] for i in order])


def new_videos(model: VideoCLIP, folder: Path, numbers: list[int], videos: Path | None = None) -> list[NewVideo]:
    """Blocks of some of the planned videos, one each, and what they become in the archive."""
    made = []
    for number in numbers:
        video = planned()[number]
        name = f"block{number}"
        write_block(model, [tokens_of(video)], WINDOWING, folder / BLOCKS, name)
        new = NewVideo(
            video.video_id,
            f"digest{number}",
            video.duration,
            float(video.duration),
            spoken_in(number, video),
            name,
            0,
            0,
        )
        path = videos / f"{video.video_id}.mp4" if videos else None
        if path is not None:
            stat = path.stat()
            new = replace(new, path=str(path), size=stat.st_size, modified=stat.st_mtime_ns)
        made.append(new)
    return made


def update(folder: Path, model: VideoCLIP, model_folder: Path, numbers: list[int], **options: object) -> Store:
    """Bring the archive to hold exactly these videos."""
    store = Store(folder, create=True)
    store.set("model", sha256(model_folder / "model.safetensors"))
    videos = options.pop("videos", None)
    changes = find_changes(store, {planned()[number].video_id: f"digest{number}" for number in numbers})
    added = [n for n in numbers if planned()[n].video_id in changes.added]
    new = new_videos(model, folder, added, videos)  # type: ignore[arg-type]
    budget = float(options.pop("budget", 1e9))  # type: ignore[arg-type]
    apply_changes(store, changes, new, WINDOWING, budget, None, **options)  # type: ignore[arg-type]
    return store


def open_small(tmp: Path, videos: Path | None = None) -> Archive:
    model = make_model(tmp / "model")
    update(tmp / "index", model, tmp / "model", list(range(6)), videos=videos).close()
    return Archive(tmp / "index", model)


def serve_small(folder: Path) -> Path:
    """The small archive over rendered videos: `model`, `index` and `videos` in a folder."""
    for video in planned():
        render_video(video, folder / "videos")
    open_small(folder, folder / "videos")
    return folder


def window_total(numbers: list[int]) -> int:
    return sum(window_count(planned()[n].duration, WINDOWING.window, WINDOWING.stride) for n in numbers)
