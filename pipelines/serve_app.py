"""The server's application: the page, the HTTP API beneath it, pictures and videos by number; imports FastAPI."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import FileResponse, JSONResponse, Response

from pipelines.serve_guard import Guard
from videoclip.errors import InputError
from videoclip.retrieval.index import load_faiss
from videoclip.search.answers import Answer
from videoclip.search.archive import Archive
from videoclip.search.media import PICTURE_WIDTH, picture, playback, remuxed
from videoclip.search.request import MAX_COUNT, Filter, Request
from videoclip.search.store import Video

PAGE = Path(__file__).parent / "page"
FILES = {"page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
AT_ONCE = 4  # queries that are embedded and searched together; all wait for the last of them
SEARCHERS = 2  # threads; numbers are crunched outside Python's lock, so that two help on two cores
PICTURES_KEPT = 1024
Seconds = Annotated[float, Query(ge=0, le=1e6, allow_inf_nan=False)]


class Batches:
    """Queries that come at once are answered together: whatever waits while one batch is searched is the next."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.sizes: list[int] = []  # of the latest batches, for whoever wants to know
        self._waiting: asyncio.Queue[tuple[Request, asyncio.Future[list[Answer]]]] = asyncio.Queue()
        self._pool = ThreadPoolExecutor(SEARCHERS, "search", initializer=_search_alone)

    async def search(self, request: Request) -> list[Answer]:
        """Answer one request, together with others."""
        answered: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        await self._waiting.put((request, answered))
        return await answered

    async def work(self) -> None:
        """Take what waits, search, tell; until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            taken = [await self._waiting.get()]
            while len(taken) < AT_ONCE and not self._waiting.empty():
                taken.append(self._waiting.get_nowait())
            self.sizes = [*self.sizes[-99:], len(taken)]
            requests = [request for request, _ in taken]
            try:
                found = await loop.run_in_executor(self._pool, self.archive.search, requests)
            except Exception as error:  # told to everyone who asked; the server goes on
                for _, answered in taken:
                    if not answered.done():
                        answered.set_exception(error)
                continue
            for (_, answered), answers in zip(taken, found):
                if not answered.done():  # a visitor may have hung up
                    answered.set_result(answers)

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _search_alone() -> None:
    """Faiss takes one thread for each that searches: the cores are shared out among visitors, not within a query."""
    load_faiss().omp_set_num_threads(1)


def make_app(archive: Archive, loopback: bool = True, token: str = "") -> FastAPI:
    """The application: the page, its API under /api, pictures and videos by number."""
    batches = Batches(archive)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(batches.work()) for _ in range(SEARCHERS)]
        yield
        for task in tasks:
            task.cancel()
        batches.close()

    app = FastAPI(title="videoclip", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.batches = batches
    app.add_middleware(Guard, loopback=loopback, token=token)

    @app.exception_handler(InputError)
    async def unusable(_: Any, error: InputError) -> JSONResponse:
        missing = "no video number" in str(error)
        return JSONResponse({"detail": str(error)}, 404 if missing else 400)

    _add_page(app)
    _add_search(app, archive, batches)
    _add_videos(app, archive)
    return app


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", media_type="text/html")

    @app.get("/page/{name}", include_in_schema=False)
    def part(name: str) -> FileResponse:
        if name not in FILES:
            raise HTTPException(404)
        return FileResponse(PAGE / name, media_type=FILES[name])


def _add_search(app: FastAPI, archive: Archive, batches: Batches) -> None:
    @app.get("/api/archive")
    def describe() -> dict[str, Any]:
        """What there is to search."""
        videos = archive.videos()
        folders = sorted({video.folder for video in videos})[:500]
        hours = sum(video.duration for video in videos) / 3600
        return {"videos": len(videos), "hours": round(hours, 2), "words": archive.has_words, "folders": folders}

    @app.get("/api/search")
    async def search(
        q: str,
        by: str = "both",
        count: int = 24,
        folder: str = "",
        shortest: float = 0.0,
        longest: float | None = None,
        one_a_video: bool = False,
    ) -> dict[str, Any]:
        """Moments that answer a description, best first."""
        request = Request(
            q, by, count, Filter(folder, shortest, float("inf") if longest is None else longest), one_a_video
        )
        return {"answers": public(await batches.search(request))}

    @app.get("/api/videos/{number}/like")
    def like(number: int, start: Seconds, end: Seconds, count: int = 24) -> dict[str, Any]:
        """Moments that look like [start, end) seconds of a video."""
        return {"answers": public(archive.like(number, start, end, min(max(count, 1), MAX_COUNT)))}

    @app.get("/api/videos/{number}/curve")
    def curve(number: int, q: str) -> dict[str, Any]:
        """Similarity of a description with every second of a video, and the moments found in it."""
        values, moments = archive.curve(number, Request(q).query)
        return {
            "curve": [round(float(value), 4) for value in values],
            "moments": [{"start": start, "end": end, "score": round(score, 4)} for start, end, score in moments],
        }

    @app.get("/api/videos/{number}/transcript")
    def transcript(number: int) -> dict[str, Any]:
        """What is said in a video."""
        lines = archive.transcript(number)
        return {"lines": [{"start": line.start, "end": line.end, "text": line.text} for line in lines]}


def _add_videos(app: FastAPI, archive: Archive) -> None:
    @lru_cache(maxsize=PICTURES_KEPT)
    def drawn(path: str, modified: int, time: float, width: int) -> bytes:
        return picture(Path(path), time, width)

    @app.get("/api/videos/{number}")
    def describe(number: int) -> dict[str, Any]:
        """One video: its length, and whether it can be played here, or why not."""
        video = archive.video(number)
        state = video.state()
        way = playback(Path(video.path)) if not state else None
        return {
            "number": number,
            "video_id": video.video_id,
            "folder": video.folder,
            "duration": video.duration,
            "language": video.language,
            "playable": way is not None and way.way != "none",
            "reason": state or (way.reason if way else ""),
        }

    @app.get("/pictures/{number}")
    def show(number: int, t: Seconds = 0.0, width: int = PICTURE_WIDTH) -> Response:
        """The picture shown at a time, as JPEG."""
        video = _with_file(archive.video(number))
        data = drawn(video.path, video.modified, round(t, 1), width)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    @app.get("/videos/{number}")
    def play(number: int) -> FileResponse:
        """The video itself; answers byte ranges."""
        video = _with_file(archive.video(number))
        way = playback(Path(video.path))
        if way.way == "none":
            raise InputError(f"{video.video_id}: {way.reason}")
        path = Path(video.path)
        if way.way == "remuxed":
            path = remuxed(path, archive.folder / "remuxed" / f"{number}-{video.modified}.mp4")
        return FileResponse(path, media_type=way.media_type, content_disposition_type="inline")


def _with_file(video: Video) -> Video:
    """The video, whose file is as it was indexed.

    Raises InputError if not.
    """
    state = video.state()
    if state:
        raise InputError(f"{video.video_id}: {state}")
    return video


def public(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Answers as the page gets them: without paths of this machine."""
    return [
        {name: value for name, value in answer.as_json().items() if name not in ("path", "link")} for answer in answers
    ]
