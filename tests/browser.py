"""A server as users start it, and a real browser for its page: Debian's Chromium, driven by Selenium.

Skips with its reason where there is no browser.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--autoplay-policy=no-user-gesture-required",
)


def start_browser(profile: Path, width: int = 1280, height: int = 900) -> Any:
    """A Chromium with an empty profile and no network but this machine's."""
    selenium = pytest.importorskip("selenium", reason="selenium is not installed")
    del selenium
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options=options, service=ChromeService(driver))


def prefer(browser: Any, scheme: str) -> None:
    """Let pages believe that their reader likes them `light` or `dark`."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def until(check: Callable[[], Any], seconds: float = 20) -> Any:
    """The first true value of `check()`."""
    end = time.monotonic() + seconds
    while True:
        value = check()
        if value or time.monotonic() > end:
            return value
        time.sleep(0.05)


def start_server(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """`videoclip serve` over the `model` and `index` of a folder, and its port."""
    words = [sys.executable, "-m", "pipelines.cli", "serve", "--port", "0"]
    words += ["--model", str(folder / "model"), "--index", str(folder / "index")]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r":(\d+)/", line)
    assert found, line + (process.stderr.read() if process.stderr else "")
    return process, int(found[1])
