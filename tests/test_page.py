"""The page in a real browser: it finds, plays, follows and comes back; it is readable in the dark and on a phone."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import ROOT, prefer, start_browser, start_server, until
from small_archive import SAID, serve_small

pytestmark = pytest.mark.slow
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serve_small(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[int]:
    process, port = start_server(folder)
    yield port
    process.terminate()
    process.wait(20)


def played(browser: Any) -> float:
    return float(browser.execute_script("return document.getElementById('video').currentTime"))


def test_the_page_finds_plays_follows_and_comes_back(server: int, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser = start_browser(tmp_path / "profile")
    try:
        address = f"http://127.0.0.1:{server}/"
        browser.get(address)
        state = browser.find_element(By.ID, "state")
        assert until(lambda: "6 videos" in state.text), "the empty page says what there is"
        browser.find_element(By.TAG_NAME, "body").send_keys("/")
        query = browser.switch_to.active_element
        assert query.get_attribute("id") == "query"
        query.send_keys("grüße bold", Keys.ENTER)
        cards = until(lambda: browser.find_elements(By.CSS_SELECTOR, ".answer"))
        assert cards and until(
            lambda: browser.execute_script(
                "const i = document.querySelector('.answer img'); return i && i.naturalWidth"
            )
        ), "answers have pictures"
        said = [element.text for element in browser.find_elements(By.CSS_SELECTOR, ".said")]
        assert any(SAID in text for text in said) and browser.title == "videoclip", "scripts in lines stay text"
        place = next(i for i, card in enumerate(cards) if SAID in card.text)
        query.send_keys(*[Keys.ARROW_DOWN] * (place + 1))
        start = float(re.search(r"t=([\d.]+)", _enter_and_read(browser)).group(1))  # type: ignore[union-attr]
        assert until(lambda: played(browser) > start + 0.3), "it plays"
        assert start - 0.1 <= played(browser) <= start + 15
        until(lambda: browser.find_elements(By.CSS_SELECTOR, "#curve .moment, #curve .line"))
        lines = until(lambda: browser.find_elements(By.CSS_SELECTOR, "#lines button"))
        assert any(SAID in line.text for line in lines)
        browser.find_element(By.ID, "find-line").send_keys("bold")
        assert sum(line.is_displayed() for line in lines) == 1
        next(line for line in lines if line.is_displayed()).click()
        assert until(lambda: 11.9 <= played(browser) <= 16), "a line is a place to go to"
        assert until(lambda: browser.find_elements(By.CSS_SELECTOR, '#lines [aria-current="true"]'))
        browser.execute_script("document.getElementById('video').pause()")
        time.sleep(0.3)
        link, time_then = browser.current_url, played(browser)
        browser.get("about:blank")
        browser.get(link)
        assert until(lambda: abs(played(browser) - time_then) < 1.6), "a deep link comes back to the same second"
        assert browser.find_element(By.ID, "query").get_attribute("value") == "grüße bold"
        assert until(lambda: browser.find_elements(By.CSS_SELECTOR, ".answer"))
        browser.find_element(By.ID, "like").click()
        assert until(lambda: "look like it" in state_text(browser))
        browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
        assert until(lambda: not browser.find_element(By.ID, "watch").is_displayed())
        problems = [row for row in browser.get_log("browser") if row["level"] in ("SEVERE", "WARNING")]
        assert not problems, problems
        _look_narrow(browser, address)
        _look_dark(browser)
    finally:
        browser.quit()


def _enter_and_read(browser: Any) -> str:
    browser.switch_to.active_element.click()
    return str(until(lambda: "video=" in browser.current_url and browser.current_url))


def state_text(browser: Any) -> str:
    return str(browser.find_element("id", "state").text)


def _look_narrow(browser: Any, address: str) -> None:
    browser.set_window_size(500, 900)
    browser.get(f"{address}?q=stir+the+egg&video=1&t=8")
    assert until(lambda: browser.find_elements("css selector", ".answer"))
    width, inner = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= inner, "a narrow screen needs no sideways scrolling"


def _look_dark(browser: Any) -> None:
    """Both schemes: dark paper or light, and every text stands out from it by what WCAG asks of small print."""
    for scheme in ("light", "dark"):
        prefer(browser, scheme)
        colours = browser.execute_script(
            "const of = (x, name) => getComputedStyle(document.querySelector(x))[name];"
            "return [of('body', 'backgroundColor'), of('.answer', 'backgroundColor')].concat("
            "['body', '#state', '#filters', '.answer .said', '.answer .found', '#axis', 'mark', '#problem']"
            ".map((x) => document.querySelector(x) ? of(x, 'color') : of('body', 'color')))"
        )
        paper, card, *inks = (_luminance(colour) for colour in colours)
        assert (paper < 0.1) == (card < 0.1) == (scheme == "dark")
        for ink in inks:
            assert all((max(ink, p) + 0.05) / (min(ink, p) + 0.05) >= 4.5 for p in (paper, card)), (scheme, colours)


def _luminance(colour: str) -> float:
    """Relative luminance of `rgb(…)`, 0 to 1."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear)))


QUERIES = (
    "the egg is poured on the tray",
    "whisk the salmon near the tap",
    "fold the cabbage on the board",
    "a carrot is sliced",
    "the cucumber is stirred in the bowl",
    "somebody presses a mushroom by the plant",
    "the onion is tossed in the pan by the window",
)
# From the key to two frames later, when the answers have been drawn; and until all pictures in view have come.
STOPWATCH = """
const list = document.getElementById('answers'), now = () => Math.round(performance.now() - window.began);
window.shown = window.pictured = window.began = null;
addEventListener('keydown', () => { window.began = performance.now(); }, { capture: true, once: true });
const inView = () => [...list.querySelectorAll('img')].filter((i) => i.getBoundingClientRect().top < innerHeight);
const seen = () => { if (inView().every((image) => image.complete)) window.pictured ??= now(); };
new MutationObserver((_, observer) => {
  if (!window.began || !list.children.length) return;
  observer.disconnect();
  list.addEventListener('load', seen, true);
  requestAnimationFrame(() => requestAnimationFrame(() => { window.shown = now(); seen(); }));
}).observe(list, { childList: true });
"""


def test_pictures_of_the_page_on_the_demo(tmp_path: Path) -> None:
    """Prints how long answers take, and takes docs/page.png and page-narrow.png, where VIDEOCLIP_DEMO names a demo."""
    if "VIDEOCLIP_DEMO" not in os.environ:
        pytest.skip("set VIDEOCLIP_DEMO=runs/demo to take the pictures of docs/ anew")
    process, port = start_server(Path(os.environ["VIDEOCLIP_DEMO"]))
    browser = start_browser(tmp_path / "profile")
    try:
        browser.get(f"http://127.0.0.1:{port}/")
        assert until(lambda: "Describe" in state_text(browser))
        waits = [_time_answers(browser, query) for query in QUERIES]
        for what, times in zip(("first answers", "all pictures in view"), zip(*waits)):
            print(f"\n{what} after {sorted(times)[len(times) // 2]} ms (median), {max(times)} ms (slowest)", end="")
        browser.find_element("css selector", ".answer").click()
        assert until(lambda: played(browser) > 1)
        browser.execute_script("document.getElementById('video').pause()")
        for name, size in (("page", (1280, 1000)), ("page-narrow", (500, 1000))):
            browser.set_window_size(*size)
            time.sleep(1)
            browser.save_screenshot(str(ROOT / "docs" / f"{name}.png"))
    finally:
        browser.quit()
        process.terminate()
        process.wait(20)


def _time_answers(browser: Any, query: str) -> tuple[int, int]:
    """Milliseconds from enter to the first answers, and to all pictures in view."""
    box = browser.find_element("id", "query")
    box.clear()
    box.send_keys(query)
    browser.execute_script(STOPWATCH)
    box.send_keys("\n")
    assert until(lambda: browser.execute_script("return window.pictured") is not None)
    shown, pictured = browser.execute_script("return [window.shown, window.pictured]")
    return int(shown), int(pictured)


def test_the_page_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    process, port = start_server(folder)
    browser = start_browser(tmp_path / "profile")
    try:
        browser.get(f"http://127.0.0.1:{port}/?q=zebra&by=words")
        assert until(lambda: "Nothing found" in state_text(browser))
        browser.get(f"http://127.0.0.1:{port}/?q=egg&video=999&t=3")
        assert until(lambda: "no video number 999" in browser.find_element("id", "problem").text)
        process.kill()
        process.wait()
        browser.find_element("id", "query").send_keys("\n")
        assert until(lambda: "does not answer" in state_text(browser))
    finally:
        process.kill()
        process.wait()
        browser.quit()
