"""One search: what is looked for, by which channels, and which videos may answer."""

from __future__ import annotations

from dataclasses import dataclass

from videoclip.errors import InputError
from videoclip.search.store import Video

BY = ("both", "picture", "words")
MAX_QUERY = 10_000  # characters
MAX_COUNT = 200


@dataclass(frozen=True)
class Filter:
    """Which videos may answer: those below `folder`, and not shorter or longer than so many seconds."""

    folder: str = ""
    shortest: float = 0.0
    longest: float = float("inf")

    def passes(self, video: Video) -> bool:
        """Whether a video may answer."""
        inside = not self.folder or (video.folder + "/").startswith(self.folder.rstrip("/") + "/")
        return inside and self.shortest <= video.duration <= self.longest


@dataclass(frozen=True)
class Request:
    """One search. `by`: both, picture or words; `one_a_video`: each video once, by its best moment."""

    query: str
    by: str = "both"
    count: int = 10
    where: Filter = Filter()
    one_a_video: bool = False

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise InputError(f"search by {', '.join(BY)}, not by {self.by!r}")
        if not self.query.strip():
            raise InputError("the query is empty; say what to look for")
        if len(self.query) > MAX_QUERY:
            raise InputError(f"the query has {len(self.query)} characters; {MAX_QUERY} are the most")
        if not 1 <= self.count <= MAX_COUNT:
            raise InputError(f"ask for 1 to {MAX_COUNT} answers, not {self.count}")
