"""The language of the world: verbs and attributes that people know, and names that nobody does."""

from __future__ import annotations

import numpy as np


def _list(words: str) -> list[str]:
    return words.split()


VERBS = _list(
    "lift press wrap paint glue cut fold stir drill bend wash dry heat cool shake roll stretch tie sand polish "
    "weigh mark split join fill drain tilt hammer brush scrape pour peel soak spin clamp sew melt grind stack trim"
)
ATTRIBUTES = ("{}", "in the {}", "wearing a {}", "next to the {}", "while it is {}")  # how each kind is spoken of
FILLER = (
    "so",
    "okay so",
    "and then",
    "alright",
    "as you can see",
    "just take your time and",
    "you know",
    "what i like to do is",
)
SPOKEN = ("{verb} the {thing}", "we {verb} our {thing}", "go and {verb} this {thing}", "i {verb} a {thing}")
UNRELATED = (
    "do not forget to subscribe",
    "my brother called me yesterday",
    "let me know in the comments",
    "sorry about the noise out there",
    "we will {verb} something else next week",
    "last time somebody asked about the {thing}",
    "i never liked the {thing} as a child",
    "thanks to everybody who wrote to me",
)
TOPIC = ("today it is all about {topic}", "welcome to {topic}", "people keep asking about {topic}")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def names(count: int, generator: np.random.Generator) -> list[str]:
    """`count` different made-up words of two or three syllables."""
    made: dict[str, None] = {}
    syllables = 2
    while len(made) < count:
        drawn = zip(
            generator.integers(len(_CONSONANTS), size=(count, syllables)),
            generator.integers(len(_VOWELS), size=(count, syllables)),
        )
        for consonants, vowels in drawn:
            made["".join(_CONSONANTS[c] + _VOWELS[v] for c, v in zip(consonants, vowels))] = None
        syllables = 3
    return list(made)[:count]
