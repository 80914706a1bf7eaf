"""The sentences of the spoken data: digit strings and short commands, drawn at random.

About sixty words, so that a small recogniser learns them in minutes, in about ten million
sentences, so that a test sentence is unlikely to occur in training.
"""

from __future__ import annotations

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ROOMS = ("kitchen", "bedroom", "office", "garden", "hall")
_NAMES = ("anna", "peter", "maria", "john", "laura", "victor")
_TENS = ("ten", "twenty", "thirty", "forty", "fifty")
# A word in braces is drawn from that list; each command is as likely as the others.
_LISTS: dict[str, tuple[str, ...]] = {
    "digit": DIGITS,
    "room": _ROOMS,
    "name": _NAMES,
    "tens": _TENS,
    "switch": ("turn on", "turn off"),
    "thing": ("light", "heating", "fan", "radio"),
    "way": ("up", "down"),
    "act": ("open", "close"),
    "part": ("door", "window", "blinds"),
    "media": ("song", "album", "message"),
}
_COMMANDS = (
    "{switch} the {thing} in the {room}",
    "set the {thing} in the {room} to {tens} {digit}",
    "{act} the {part} in the {room}",
    "call {name} at {digit} {digit} {digit} {digit}",
    "wake me in {tens} {digit} minutes",
    "turn the {thing} {way} by {digit}",
    "play {media} number {tens} {digit}",
    "send {media} {digit} to {name}",
)


def phrase(rng: np.random.Generator) -> str:
    """A digit string of 3 to 7 (half of all) or a command, in lower case."""
    if rng.random() < 0.5:
        return " ".join(rng.choice(DIGITS, size=rng.integers(3, 8)))
    words = str(rng.choice(_COMMANDS)).split(" ")
    return " ".join(str(rng.choice(_LISTS[w[1:-1]])) if w[0] == "{" else w for w in words)


def phrases(count: int, rng: np.random.Generator) -> list[str]:
    """`count` distinct phrases."""
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault(phrase(rng))
    return list(found)
