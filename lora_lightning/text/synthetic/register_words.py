"""The words of `synthetic.registers`: English forms as tables, Tavi stems drawn at random.

A noun is its singular and plural, a verb its base, third person, past and participle. A word
under ``senses`` is an everyday word too, and means something else in the register.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SOURCE = "everyday"
SENSES_OF = "{} senses"
KINDS = ("nouns", "places", "adjectives", "verbs")
GENDERS = {"a": "l", "o": "k", "i": "d"}  # and the verb's agreement with such a subject
TIMES = {
    "yesterday": "past", "last week": "past", "today": "present", "often": "present",
    "tomorrow": "future", "soon": "future",
}  # fmt: skip
HOURS = ("at dawn", "at noon", "at dusk")


@dataclass(frozen=True)
class Words:
    """The words of a register, each as its forms in English."""

    nouns: tuple[str, ...]
    places: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]


EVERYDAY = Words(
    nouns=(
        "man men", "woman women", "child children", "teacher teachers", "farmer farmers",
        "neighbour neighbours", "friend friends", "driver drivers", "dog dogs", "cat cats",
        "horse horses", "bird birds", "chair chairs", "book books", "letter letters",
        "apple apples", "cup cups", "box boxes", "key keys", "lamp lamps", "coat coats",
        "picture pictures",
    ),
    places=(
        "house houses", "garden gardens", "street streets", "kitchen kitchens", "school schools",
        "market markets", "field fields", "park parks",
    ),
    adjectives=(
        "old", "new", "big", "small", "red", "green", "good", "bad", "quiet", "dirty", "heavy",
        "strong", "warm", "cheap",
    ),
    verbs=(
        "see sees saw seen", "find finds found found", "carry carries carried carried",
        "buy buys bought bought", "sell sells sold sold", "paint paints painted painted",
        "clean cleans cleaned cleaned", "like likes liked liked", "hear hears heard heard",
        "wash washes washed washed", "move moves moved moved", "bring brings brought brought",
        "follow follows followed followed", "call calls called called",
    ),
)  # fmt: skip

# Words of the register alone.
OWN = {
    "nautical": Words(
        nouns=(
            "sail sails", "mast masts", "anchor anchors", "cutter cutters", "captain captains",
            "sailor sailors", "helm helms", "buoy buoys", "pilot pilots", "schooner schooners",
        ),
        places=("harbour harbours", "cabin cabins", "reef reefs", "hold holds"),
        adjectives=("leeward", "tarred", "seaworthy", "rigged"),
        verbs=(
            "haul hauls hauled hauled", "hoist hoists hoisted hoisted",
            "sight sights sighted sighted", "moor moors moored moored", "tow tows towed towed",
        ),
    ),
    "medical": Words(
        nouns=(
            "nurse nurses", "doctor doctors", "surgeon surgeons", "patient patients",
            "fever fevers", "wound wounds", "drug drugs", "lung lungs", "bandage bandages",
            "vein veins",
        ),
        places=("clinic clinics", "ward wards", "pharmacy pharmacies", "hospital hospitals"),
        adjectives=("swollen", "infected", "chronic", "sterile"),
        verbs=(
            "examine examines examined examined", "inject injects injected injected",
            "prescribe prescribes prescribed prescribed", "suture sutures sutured sutured",
            "diagnose diagnoses diagnosed diagnosed",
        ),
    ),
}  # fmt: skip

# Everyday words with another meaning in the register.
SENSES = {
    "nautical": Words(
        nouns=("watch watches", "line lines", "sheet sheets", "log logs", "glass glasses",
               "hand hands"),
        places=("bridge bridges", "bank banks"),
        adjectives=("fair", "foul"),
        verbs=("make makes made made", "raise raises raised raised"),
    ),
    "medical": Words(
        nouns=("organ organs", "chart charts", "tissue tissues", "cell cells", "plate plates",
               "stool stools"),
        places=("theatre theatres", "practice practices"),
        adjectives=("stable", "positive"),
        verbs=("treat treats treated treated", "admit admits admitted admitted"),
    ),
}  # fmt: skip

REGISTERS = tuple(OWN)


@dataclass(frozen=True)
class Word:
    """A word in one sense: its English forms, and stem and gender in Tavi."""

    forms: tuple[str, ...]
    stem: str
    gender: str


def _lexicon() -> tuple[dict[str, dict[str, list[Word]]], dict[str, str]]:
    """Register → kind → words, and the stem of each time; drawn once, the same for every seed."""
    rng = np.random.default_rng(1)
    stems: dict[str, None] = {}

    def stem() -> str:
        while True:
            c, v = rng.choice(list("bdfgklmnprstvz"), 3), rng.choice(list("aeiou"), 2)
            made = f"{c[0]}{v[0]}{c[1]}{v[1]}{c[2]}"
            if made not in stems:
                stems[made] = None
                return made

    def of(words: Words) -> dict[str, list[Word]]:
        return {
            kind: [
                Word(tuple(forms.split()), stem(), str(rng.choice(list(GENDERS))))
                for forms in getattr(words, kind)
            ]
            for kind in KINDS
        }

    found = {SOURCE: of(EVERYDAY)}
    for register in OWN:
        # Each of these words has an everyday sense first.
        for kind, words in of(SENSES[register]).items():
            found[SOURCE][kind] += words
        found[SENSES_OF.format(register)], found[register] = of(SENSES[register]), of(OWN[register])
    return found, {"": "", **{time: stem() for time in (*TIMES, *HOURS)}}


LEXICON, STEMS = _lexicon()
