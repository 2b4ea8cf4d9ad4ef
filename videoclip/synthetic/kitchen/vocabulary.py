"""What the cooking channel shows and says: actions, ingredients, vessels, places, and the phrases around them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """One thing the corpus can show: what the narrator calls it, and how held-out captions name it."""

    spoken: tuple[str, ...]
    written: str


@dataclass(frozen=True)
class Action:
    """A motion: its path, the direction it is followed in, and its verbs (base form, -ing form)."""

    path: str
    forward: bool
    spoken: tuple[tuple[str, str], ...]
    written: str


ACTIONS = (
    Action("across", True, (("slice", "slicing"), ("cut", "cutting")), "is sliced"),
    Action("across", False, (("scrape", "scraping"), ("push", "pushing")), "is scraped"),
    Action("vertical", True, (("pour", "pouring"), ("drop", "dropping")), "is poured"),
    Action("vertical", False, (("toss", "tossing"), ("flip", "flipping")), "is tossed"),
    Action("circle", True, (("stir", "stirring"), ("mix", "mixing")), "is stirred"),
    Action("circle", False, (("fold", "folding"), ("turn", "turning")), "is folded"),
    Action("size", True, (("roll", "rolling"), ("spread", "spreading")), "is rolled"),
    Action("size", False, (("press", "pressing"), ("squeeze", "squeezing")), "is pressed"),
)

INGREDIENTS = (
    (Word(("tomato", "tomatoes"), "the tomato"), (220, 40, 40), "disc"),
    (Word(("pepper", "chili"), "the pepper"), (220, 40, 40), "triangle"),
    (Word(("carrot", "carrots"), "the carrot"), (240, 140, 30), "triangle"),
    (Word(("pumpkin", "squash"), "the pumpkin"), (240, 140, 30), "disc"),
    (Word(("cheese", "cheddar"), "the cheese"), (245, 225, 60), "square"),
    (Word(("egg", "eggs"), "the egg"), (245, 225, 60), "ring"),
    (Word(("cucumber", "cucumbers"), "the cucumber"), (50, 180, 60), "disc"),
    (Word(("onion", "scallion"), "the onion"), (50, 180, 60), "ring"),
    (Word(("eggplant", "aubergine"), "the eggplant"), (150, 60, 190), "square"),
    (Word(("cabbage", "kale"), "the cabbage"), (150, 60, 190), "ring"),
    (Word(("fish", "salmon"), "the fish"), (60, 110, 230), "triangle"),
    (Word(("tofu", "paneer"), "the tofu"), (240, 240, 240), "square"),
)

VESSELS = (
    (Word(("pan", "skillet"), "in the pan"), "pan"),
    (Word(("bowl", "dish"), "in the bowl"), "bowl"),
    (Word(("board", "chopping board"), "on the board"), "board"),
    (Word(("pot", "saucepan"), "in the pot"), "pot"),
    (Word(("tray", "sheet"), "on the tray"), "tray"),
)

PLACES = (
    (Word(("window", "daylight"), "by the window"), "bright"),
    (Word(("stove", "cooker"), "at the stove"), "dark"),
    (Word(("sink", "tap"), "at the sink"), "tiles"),
    (Word(("counter", "worktop"), "on the counter"), "planks"),
    (Word(("garden", "patio"), "in the garden"), "grass"),
)

FILLER = (
    "so yeah you guys",
    "okay so what we are doing now",
    "as you can see here",
    "and just take your time",
    "it smells amazing already",
    "alright",
    "you know what i mean",
)

UNRELATED = (
    "do not forget to subscribe and hit the bell",
    "my grandma taught me this when i was little",
    "i got this apron from a friend last year",
    "let me know in the comments what you think",
    "we went on holiday and it was raining all week",
    "this video is sponsored by nobody at all",
    "sorry about the noise the neighbours are building",
    "i always loved {ingredient} even as a kid",
    "next week we will do something with {ingredient}",
)

SPOKEN = (
    "we are going to {verb} the {ingredient} {vessel}",
    "just keep {verbing} that {ingredient} {vessel}",
    "i like to {verb} my {ingredient} {vessel}",
    "now {verb} your {ingredient} real quick {vessel}",
    "start {verbing} this {ingredient} {vessel}",
)

WRITTEN = ("{ingredient} {verb} {vessel} {place}", "{place} {ingredient} {verb} {vessel}")
QUERY = "{ingredient} {verb} {vessel}"
