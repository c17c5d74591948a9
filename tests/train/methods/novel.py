"""A novel written for the tests: chapters of a small grammar, so that a tiny model can learn its letters."""

from __future__ import annotations

_PEOPLE = ("Ada", "Bruno", "Clara", "the captain", "the old clerk")
_DEEDS = ("opened the door", "lit a lamp", "read the letter", "went to the harbour", "said nothing")
_WHEN = ("In the morning", "At noon", "That night", "After the rain", "Before the ball")


def chapter(number: int) -> str:
    """The text of a chapter, counted from 1: a heading and ten sentences."""
    lines = [f"CHAPTER {number}", ""]
    for k in range(10):
        who = _PEOPLE[(number * 3 + k) % 5]
        lines.append(f"{_WHEN[(number + 2 * k) % 5]} {who} {_DEEDS[(k * number + k) % 5]}.")
    return "\n".join([*lines, "", ""])


def novel(chapters: int = 8) -> list[dict[str, str]]:
    """The chapters as records."""
    return [{"text": chapter(number)} for number in range(1, chapters + 1)]


_ANIMALS = {
    "cat": ("meow", "milk"),
    "dog": ("woof", "bones"),
    "cow": ("moo", "grass"),
    "hen": ("cluck", "corn"),
    "bee": ("buzz", "nectar"),
    "frog": ("croak", "flies"),
}


def farm(count: int = 48) -> list[dict[str, str]]:
    """Sentences in which each word of a sentence tells the others."""
    names = list(_ANIMALS)
    rows = []
    for k in range(count):
        name = names[k % len(names)]
        sound, food = _ANIMALS[name]
        rows.append({"text": f"{k // len(names)} the {name} says {sound} and the {name} eats {food}."})
    return rows
