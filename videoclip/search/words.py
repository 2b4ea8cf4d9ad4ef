"""Full text over what was said: SQLite's FTS5, one document a window, its words those of the lines inside it.

A query is plain words, `"phrases in quotes"` that must be there, and `beginnings*`. Words are joined by OR and ranked
by bm25, so a narrator who says half of them is found. Words that nearly every window has cost the most and tell the
least: beyond a budget of windows to look at, the most frequent are left out.
"""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass
from functools import lru_cache

from videoclip.search.store import TOKENIZER, Line

MAX_TERMS = 24
STEMS_KEPT = 65_536
WINDOWS_RANKED = 5_000  # bm25 scores about two windows a microsecond
FREQUENT = 1000  # words of fewer windows need no count
# Scripts written without spaces: each sign is a word of its own, and what is asked for is a phrase of them.
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
# Descriptions are full of words that say nothing of a moment, and that a narrator may happen to say only elsewhere,
# which makes them look rare. English alone; other languages' are left to bm25.
FUNCTION_WORDS = (
    "a an and are as at be been being but by do does for from had has have he her his how i in into is it its me my of "
    "off on onto or our out over she so some than that the their them then there these they this those to up us was we "
    "were what when where which while who will with you your"
)
SAYING_NOTHING = frozenset(FUNCTION_WORDS.split())
ITEM = re.compile(r'"([^"]*)"|(\S+)')


@dataclass(frozen=True)
class Term:
    """A word or phrase of a query; `required` where it stood in quotes, `prefix` where a star ended it."""

    text: str
    required: bool = False
    prefix: bool = False

    def as_match(self) -> str:
        """In FTS5's language, quoted, so that nothing in it can be an operator."""
        return '"' + self.text.replace('"', " ") + '"' + ("*" if self.prefix else "")


def spaced(text: str) -> str:
    """Text in small letters, with a space around every sign of a script that has none between words."""
    return UNSPACED.sub(lambda sign: f" {sign[0]} ", text.casefold())


def parse_query(query: str) -> list[Term]:
    """The words and phrases of a query that full text can look for; none of one that is all emoji."""
    terms: list[Term] = []
    for phrase, word in ITEM.findall(query.replace("\x00", " ")):
        text = " ".join(re.findall(r"\w+", spaced(phrase or word)))
        if text:
            term = Term(text, bool(phrase), word.endswith("*") and len(word) > 3)
            if term not in terms:
                terms.append(term)
    telling = [term for term in terms if term.required or term.prefix or term.text not in SAYING_NOTHING]
    return telling or terms


class WordSearch:
    """Full-text search over one connection to the archive's SQLite file."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self._stems = sqlite3.connect(":memory:", check_same_thread=False)
        self._stems.execute(f"CREATE VIRTUAL TABLE t USING fts5(text, tokenize='{TOKENIZER}')")
        self._stems.execute("CREATE VIRTUAL TABLE v USING fts5vocab(t, instance)")
        self._stems_of_word = lru_cache(STEMS_KEPT)(self._stem)
        self._stems_of_query = lru_cache(64)(self._wanted)

    def search(self, query: str, count: int) -> list[tuple[int, float]]:
        """(window, bm25, higher is better) of the `count` windows that say most of the query, best first."""
        match = self.match(query)
        if not match:
            return []
        rows = self.connection.execute(
            "SELECT rowid, rank FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?", (match, count)
        )
        return [(int(window), -float(score)) for window, score in rows]

    def match(self, query: str) -> str:
        """The query in FTS5's language; "" where there is nothing to look for."""
        terms = parse_query(query)
        required = [term.as_match() for term in terms if term.required][:MAX_TERMS]
        optional = [term.as_match() for term in self._affordable([t for t in terms if not t.required])]
        if not required:
            return " OR ".join(optional)
        phrases = " AND ".join(required)
        return f"({phrases}) OR ({phrases} AND ({' OR '.join(optional)}))" if optional else phrases

    def stems(self, text: str) -> list[str]:
        """The words of a text as the index keeps them: `slicing` is `slice`."""
        return [stem for word in re.findall(r"\w+", spaced(text)) for stem in self._stems_of_word(word)]

    def _stem(self, word: str) -> tuple[str, ...]:
        """FTS5 itself is asked, by way of a table of one word."""
        self._stems.execute("DELETE FROM t")
        self._stems.execute("INSERT INTO t VALUES (?)", (word,))
        return tuple(row[0] for row in self._stems.execute("SELECT term FROM v ORDER BY offset"))

    def _affordable(self, terms: list[Term]) -> list[Term]:
        """The rarest words, as many as the budget allows; at least one."""
        counted = sorted((self._windows(term), place) for place, term in enumerate(terms))
        kept: list[int] = []
        total = 0
        for windows, place in counted[:MAX_TERMS]:
            total += windows
            if kept and total > WINDOWS_RANKED:
                break
            kept.append(place)
        return [terms[place] for place in sorted(kept)]

    def _windows(self, term: Term) -> int:
        """In about how many windows a term stands; 0 for any that is not frequent."""
        counts = []
        for stem in self.stems(term.text):
            row = self.connection.execute("SELECT windows FROM frequent WHERE term = ?", (stem,)).fetchone()
            counts.append(int(row[0]) if row else 0)
        return min(counts, default=0)

    def best_line(self, lines: list[Line], query: str, start: float, end: float) -> Line | None:
        """Of lines said from `start` to `end` the one with most words of the query; of equals the longest there."""
        wanted = self._stems_of_query(query)

        def fit(line: Line) -> tuple[int, float]:
            return len(wanted.intersection(self.stems(line.text))), min(line.end, end) - max(line.start, start)

        return max(lines, key=fit, default=None)

    def _wanted(self, query: str) -> frozenset[str]:
        return frozenset(stem for term in parse_query(query) for stem in self.stems(term.text))


def count_frequent(connection: sqlite3.Connection) -> None:
    """Note in how many windows the frequent words stand, for `WordSearch` to plan by."""
    connection.execute("DELETE FROM frequent")
    connection.execute("INSERT INTO frequent SELECT term, doc FROM vocabulary WHERE doc >= ?", (FREQUENT,))
