"""A JSON object that is larger than the memory: its members are found once, and read when they are asked for.

HowTo100M's `raw_caption.json` is 9 GB and 1.2 million members. In memory are their names and where they stand.
"""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from videoclip.errors import InputError

CHUNK = 1 << 24  # bytes read at once
LONGEST_MEMBER = 1 << 30
SOON = 1 << 26  # bytes of a file that is looked through at once; larger ones by a thread, while others go on
SPACE = " \t\n\r"
_decoder = json.JSONDecoder()


class JsonMembers(Mapping[str, Any]):
    """The members of the object in a JSON file. Of a name that stands there twice the last one counts, as everywhere.

    Raises InputError if the file is missing or is no such object: at once if it is small, else when it is first asked.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise InputError(f"{path}: no such file")
        self._starts, self._ends = array("Q"), array("Q")
        self._numbers: dict[str, int] = {}
        self._error: InputError | None = None
        self._thread = threading.Thread(target=self._look_through, name="members", daemon=True)
        self._thread.start()
        if self._path.stat().st_size < SOON:
            self._wait()

    def __getitem__(self, name: str) -> Any:
        self._wait()
        number = self._numbers[name]
        with open(self._path, "rb") as file:
            file.seek(self._starts[number])
            text = file.read(self._ends[number] - self._starts[number])
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self._path}: {name!r} cannot be read ({error})") from None

    def __contains__(self, name: object) -> bool:
        self._wait()
        return name in self._numbers

    def __iter__(self) -> Iterator[str]:
        self._wait()
        return iter(self._numbers)

    def __len__(self) -> int:
        self._wait()
        return len(self._numbers)

    def _wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _look_through(self) -> None:
        try:
            with open(self._path, "rb") as file:
                for name, start, end in _members(file, self._path):
                    self._numbers[name] = len(self._starts)
                    self._starts.append(start)
                    self._ends.append(end)
        except InputError as error:
            self._error = error
        except (OSError, MemoryError, RecursionError) as error:
            self._error = InputError(f"{self._path}: cannot be read ({error})")


class _Text:
    """A file as text of one letter a byte, so that places in it are places in the file; the past is forgotten."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.text, self.place, self.before = "", 0, 0  # `before` bytes of the file precede `text`
        self.ended = False

    def more(self) -> None:
        """Read on. Raises InputError at the end, or where a member has no end."""
        if self.ended:
            raise self.error("it ends in the middle")
        if len(self.text) - self.place > LONGEST_MEMBER:
            raise self.error(f"a member of more than {LONGEST_MEMBER} bytes")
        data = self._file.read(max(CHUNK, len(self.text) - self.place))
        self.ended = not data
        self.before, self.text, self.place = (
            self.before + self.place,
            self.text[self.place :] + data.decode("latin-1"),
            0,
        )

    def sign(self) -> str:
        """The next letter that is no space; it is not taken."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in SPACE:
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            self.more()

    def take(self, sign: str) -> None:
        if self.sign() != sign:
            raise self.error(f"expected {sign!r}")
        self.place += 1

    def value(self) -> tuple[Any, int, int]:
        """The next value, and where in the file it begins and ends."""
        self.sign()
        while True:
            try:
                value, end = _decoder.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or len(self.text) - error.pos <= 64
                if self.ended or not cut_off:  # not because the text stops here
                    raise self.error(error.msg) from None
                self.more()
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists in lists in lists
                raise self.error(str(error)) from None
            if end == len(self.text) and not self.ended:  # a number may go on
                self.more()
                continue
            start, self.place = self.place, end
            return value, self.before + start, self.before + end

    def error(self, what: str) -> InputError:
        return InputError(f"{self._path}: not valid JSON ({what} at byte {self.before + self.place})")


def _members(file: BinaryIO, path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of every member's value."""
    text = _Text(file, path)
    if file.read(3) != b"\xef\xbb\xbf":
        file.seek(0)
    else:
        text.before = 3
    text.more()
    if text.sign() != "{":
        raise InputError(f"{path}: expected a JSON object of members by name")
    text.take("{")
    if text.sign() == "}":
        return
    while True:
        if text.sign() != '"':
            raise text.error("expected a name")
        _, start, end = text.value()
        name = text.text[text.place - (end - start) : text.place].encode("latin-1").decode("utf-8", "replace")
        text.take(":")
        _, start, end = text.value()
        yield json.loads(name), start, end
        if text.sign() == "}":
            return
        text.take(",")
