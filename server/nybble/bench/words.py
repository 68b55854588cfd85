"""Prompts of a wanted length that no cache has seen: common words in a seeded order."""

from __future__ import annotations

import random

# fmt: off
WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case",
    "week", "company", "system", "program", "question", "work", "government", "number", "night",
    "point", "home", "water", "room", "mother", "area", "money", "story", "fact", "month", "lot",
    "right", "study", "book", "eye", "job", "word", "business", "issue", "side", "kind", "head",
    "house", "service", "friend", "father", "power", "hour", "game", "line", "end", "member", "law",
    "car", "city", "community", "name", "president", "team", "minute", "idea",
)
# fmt: on


def prompt(tokens: int, seed: int) -> str:
    """About `tokens` tokens; different seeds differ from the first word on."""
    draw = random.Random(seed)
    return " ".join([str(draw.randrange(100, 1000)), *draw.choices(WORDS, k=max(tokens - 1, 0))])
