"""The captions of `extract` and `convert features`: which there are, whether the shards have them, each video's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.runs import Quarantine
from videoclip.data.captions import NO_CAPTIONS, Captions, captions_of_video
from videoclip.data.recaption import recaption
from videoclip.data.shards import MANIFEST
from videoclip.data.stored_list import VideoList
from videoclip.data.subtitle_files import SubtitleFiles
from videoclip.errors import InputError
from videoclip.files import read_json, write_json

CAPTIONS = "captions.json"  # which captions the shards hold, and how they were prepared


class CaptionSource:
    """The captions that were asked for, by video id; none where no file is given.

    `captions.json` in a folder of shards holds a description of its captions: the digest of the file, and the options
    that prepare them. With it equal, the same videos get the same captions.
    """

    def __init__(
        self,
        captions: str | None,
        keep_rolling_repeats: bool,
        seed: int,
        quarantine: Quarantine,
        videos: Mapping[str, Path] | None = None,
        language: str = "",
        listed: VideoList | None = None,
    ) -> None:
        """`captions`: `beside`, a folder or a file, as `SubtitleFiles` takes it, for `videos` by id. Without it a list
        may say what its videos show: then that is taken.

        `seed` decides on which side of a rolling repeat its words stay. Raises InputError if they cannot be read.
        """
        self.keep_rolling_repeats, self.seed = keep_rolling_repeats, seed
        self.quarantine = quarantine
        self.files: SubtitleFiles | None = None
        self.listed = listed if captions is None and listed is not None and listed.has_captions else None
        self.description: dict[str, Any] = {}
        if captions is not None:
            self.files = SubtitleFiles(captions, videos or {}, language)
            self.description = {"sha256": self.files.fingerprint(), "keep_rolling_repeats": keep_rolling_repeats}
            if not keep_rolling_repeats:
                self.description["seed"] = seed
        elif self.listed is not None:
            self.description = {"sha256": self.listed.fingerprint(), "of": "the list"}

    def refuse_left_out(self, folder: Path, before: bool = False) -> None:
        """Raises InputError if the folder's videos have captions (`before`: by the word of an older run) and none are
        given now: those that are added would have none, and nobody would see which."""
        if not self.description and (before or (folder / CAPTIONS).exists()):
            raise InputError(
                f"{folder}: was made with captions; give --captions again (the same, or others in their place), "
                "or choose another --output"
            )

    def update_shards(self, folder: Path) -> None:
        """Give the videos that are there already these captions, if they have others or none."""
        if not self.description:
            return
        path = folder / CAPTIONS
        if path.exists() and read_json(path) == self.description:
            return
        if (folder / MANIFEST).exists():
            self.quarantine.forget(what="captions")
            changed = recaption(folder, self.of_video)
            if changed:
                print(f"{folder}: {changed} parts have new captions; no video was encoded again")
        self.quarantine.save()
        write_json(path, self.description)

    def of_video(self, video_id: str, seconds: int) -> Captions:
        """Captions of a video of so many tokens; what cannot be used is noted in the quarantine list."""
        if self.listed is not None:
            return self._said(self.listed, video_id, seconds)
        try:
            subtitles = self.files.find(video_id) if self.files is not None else None
            if subtitles is None:
                return NO_CAPTIONS
            captions, rejected = captions_of_video(
                subtitles.raw, seconds, video_id, self.seed, self.keep_rolling_repeats
            )
        except InputError as error:
            self.quarantine.add(video_id, str(error), "captions")
            return NO_CAPTIONS
        for reason, count in (subtitles.dropped + rejected).items():
            self.quarantine.add(video_id, f"{count} caption lines left out: {reason}", "captions")
        return captions

    def _said(self, listed: VideoList, video_id: str, seconds: int) -> Captions:
        """What the list says of a video: nothing rolls there."""
        row = listed.find(video_id)
        raw = None if row is None else row.captions(seconds)
        if raw is None:
            return NO_CAPTIONS
        try:
            captions, rejected = captions_of_video(raw, seconds, video_id, self.seed, keep_rolling_repeats=True)
        except ValueError as error:
            self.quarantine.add(video_id, f"its captions cannot be used: {error}", "captions")
            return NO_CAPTIONS
        for reason, count in rejected.items():
            self.quarantine.add(video_id, f"{count} caption lines left out: {reason}", "captions")
        return captions

    def note_unused(self, paths: Mapping[str, Path]) -> None:
        """Note the captions of videos that are not there."""
        for video_id in sorted(self.files.ids() if self.files is not None else ()):
            if video_id not in paths:
                unsafe = os.sep in video_id or video_id in ("", ".", "..")
                reason = (
                    "an id that is a path cannot be a video's" if unsafe else "captions of a video that is not there"
                )
                self.quarantine.add(video_id, reason, "captions")
