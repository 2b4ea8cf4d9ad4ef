"""The server answers the page and programs, serves nothing but files of its index, and only to those it may."""

from __future__ import annotations

import asyncio
import http.client
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import start_server
from conftest import write_video
from small_archive import SAID, planned, serve_small

from pipelines.serve import ServeConfig, check_address, is_loopback, listen
from videoclip.errors import InputError
from videoclip.search.archive import Archive
from videoclip.search.media import playback, remuxed

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from fastapi.testclient import TestClient

from pipelines.serve_app import make_app

TOKEN = "a-token-that-nobody-guesses"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small archive over rendered videos: `model`, `index`, `videos`."""
    return serve_small(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def archive(folder: Path) -> Archive:
    from pipelines.search import open_archive

    return open_archive(folder / "model", folder / "index")


@pytest.fixture(scope="module")
def client(archive: Archive) -> Iterator[TestClient]:
    with TestClient(make_app(archive), base_url="http://localhost:8000") as client:
        yield client


# --- The API ------------------------------------------------------------------------------------------------------


def test_answers_carry_what_a_page_needs_and_no_path_of_the_machine(client: TestClient, folder: Path) -> None:
    answers = client.get("/api/search", params={"q": "grüße bold", "by": "words", "count": 3}).json()["answers"]
    assert answers[0]["said"] == SAID and answers[0]["channels"] == {"words": 1}
    for path in ("/api/archive", "/api/search?q=egg", "/api/videos/1", "/api/videos/1/curve?q=egg", "/openapi.json"):
        response = client.get(path)
        assert response.status_code == 200 and str(folder) not in response.text, path
    number = answers[0]["number"]
    assert SAID in [line["text"] for line in client.get(f"/api/videos/{number}/transcript").json()["lines"]]
    assert client.get(f"/pictures/{number}?t=12").content[:2] == b"\xff\xd8"
    assert client.get(f"/pictures/{number}?t=99999").status_code == 200, "the last picture"


def test_videos_are_served_in_byte_ranges(client: TestClient, folder: Path) -> None:
    data = (folder / "videos" / f"{planned()[0].video_id}.mp4").read_bytes()
    part = client.get("/videos/1", headers={"Range": "bytes=100-199"})
    assert part.status_code == 206 and part.content == data[100:200]
    assert client.get("/videos/1").content == data
    behind = client.get("/videos/1", headers={"Range": f"bytes={len(data) + 5}-"})
    assert behind.status_code == 416 and not behind.content.startswith(data[:50])


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/search?q=", 400),
        ("/api/search", 422),
        ("/api/search?q=egg&count=0", 400),
        ("/api/search?q=egg&by=sound", 400),
        ("/api/search?q=egg&folder=..%2f..%2fetc", 200),
        ("/api/search?q=..%2f..%2fetc%2fpasswd", 200),
        ("/api/search?q=egg&count=..%2f", 422),
        ("/api/videos/..%2f..%2fetc%2fpasswd", 404),
        ("/api/videos/..%2f1/curve?q=egg", 404),
        ("/videos/..%2f..%2fetc%2fpasswd", 404),
        ("/videos/%2e%2e%2f1", 404),
        ("/videos/-1", 404),
        ("/videos/999", 404),
        ("/videos/x", 422),
        ("/videos/99999999999999999999999", 404),
        ("/pictures/1?t=nan", 422),
        ("/pictures/1?t=..%2f", 422),
        ("/page/..%2fserve.py", 404),
        ("/page/serve.py", 404),
        ("/page/%2e%2e%2f%2e%2e%2fREADME.md", 404),
        ("/api/videos/1/like?start=9&end=nan", 422),
        (f"/api/search?q={'x' * 10_001}", 400),
        (f"/api/search?q={'ab ' * 3000}", 200),
        ("/api/search?q=%F0%9F%A7%85", 200),
    ],
)
def test_odd_requests_have_one_clear_answer(client: TestClient, path: str, status: int) -> None:
    response = client.get(path)
    assert response.status_code == status, response.text[:300]
    assert "root:" not in response.text and "import" not in response.text
    assert status == 200 or response.json()["detail"]


def test_only_this_machine_is_answered_and_only_its_own_pages(client: TestClient) -> None:
    for headers in (
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:8000"},
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    ):
        for path in ("/api/search?q=egg", "/videos/1", "/pictures/1"):
            assert client.get(path, headers=headers).status_code == 403, headers
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 200
    assert client.get("/api/archive", headers={"Host": "[::1]:8000"}).status_code == 200
    assert client.post("/api/search?q=egg").status_code == 405
    page = client.get("/")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "<script>" not in page.text and "style=" not in page.text, "nothing inline"


def test_another_address_needs_a_token(archive: Archive) -> None:
    with pytest.raises(InputError, match="give --token"):
        check_address(ServeConfig(Path("m"), host="0.0.0.0"))
    with pytest.raises(InputError, match="at least 16"):
        check_address(ServeConfig(Path("m"), host="0.0.0.0", token="short"))
    check_address(ServeConfig(Path("m"), host="0.0.0.0", token=TOKEN))
    assert is_loopback("::1") and is_loopback("127.8.8.8") and not is_loopback("192.168.0.4")
    app = make_app(archive, loopback=False, token=TOKEN)
    with TestClient(app, base_url="http://box:8000", follow_redirects=False) as client:
        assert client.get("/api/archive").status_code == 401
        assert client.get(f"/api/archive?token={TOKEN}").status_code == 401, "not in links that are passed on"
        assert client.get("/?token=" + TOKEN[:-1] + "x").status_code == 401
        assert client.get("/api/archive", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        entry = client.get(f"/?q=egg&token={TOKEN}")
        assert entry.status_code == 303 and entry.headers["location"] == "/?q=egg"
        assert "HttpOnly; SameSite=Strict" in entry.headers["set-cookie"]
        assert client.get("/api/archive").status_code == 200, "by the cookie"


def test_queries_that_come_at_once_are_answered_together(archive: Archive) -> None:
    from pipelines.serve_app import AT_ONCE, Batches
    from videoclip.search.request import Request

    async def ask() -> tuple[list[Any], list[int]]:
        batches = Batches(archive)
        waiting = [asyncio.create_task(batches.search(Request(f"stir the egg {n}"))) for n in range(20)]
        waiting[3].cancel()  # a visitor hangs up
        await asyncio.sleep(0)
        worker = asyncio.create_task(batches.work())
        found = await asyncio.gather(*waiting, return_exceptions=True)
        worker.cancel()
        batches.close()
        return found, batches.sizes

    found, sizes = asyncio.run(ask())
    assert sizes[:4] == [AT_ONCE] * 4, "many together, and the first need not wait for the last"
    assert isinstance(found[3], asyncio.CancelledError)
    alone = archive.search([Request("stir the egg 7")])[0]
    assert [(a.video_id, a.start) for a in found[7]] == [(a.video_id, a.start) for a in alone]


# --- Files that browsers play, or not -----------------------------------------------------------------------------


def test_files_are_played_remuxed_or_said_to_be_unplayable(tmp_path: Path) -> None:
    times = [n / 10 for n in range(20)]

    def grey(n: int) -> np.ndarray:
        return np.full((64, 64, 3), 8 * n, np.uint8)

    mp4, mkv = write_video(tmp_path / "a.mp4", times, grey), write_video(tmp_path / "a.mkv", times, grey)
    assert playback(mp4).way == "direct" and playback(mkv).way == "remuxed"
    made = remuxed(mkv, tmp_path / "cache" / "a.mp4")
    assert playback(made).way == "direct" and remuxed(mkv, made) == made
    old = playback(write_video(tmp_path / "old.avi", times, grey, codec="mpeg4"))
    assert old.way == "none" and "do not play mpeg4" in old.reason
    with pytest.raises(InputError, match="no such video file"):
        playback(tmp_path / "gone.mp4")


# --- The process --------------------------------------------------------------------------------------------------


def test_two_servers_on_one_port_are_refused() -> None:
    first = listen("127.0.0.1", 0)
    with pytest.raises(InputError, match="is taken"):
        listen("127.0.0.1", first.getsockname()[1])
    first.close()
    with pytest.raises(InputError, match="cannot listen"):
        listen("203.0.113.7", 0)


def test_visitors_who_hang_up_and_sigterm_during_a_query_end_nothing_badly(folder: Path) -> None:
    process, port = start_server(folder)
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /api/search?q=egg HTTP/1.1\r\nHost: localhost\r\n\r\n")
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /videos/1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.recv(100)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/api/search?q=egg")
    assert connection.getresponse().status == 200, "the next visitor is answered"
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/api/search?q=stir+the+egg")
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.wait(20)
    assert time.monotonic() - began < 15
    assert process.returncode in (0, -signal.SIGTERM)
    assert process.stderr is not None and "Traceback" not in process.stderr.read()
