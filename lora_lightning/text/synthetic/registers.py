"""Parallel sentences in two languages and two registers beside the everyday one, by a grammar.

The source language is simple English. The target language, Tavi, is constructed for this purpose:
nothing of it can be copied from the source, and no word can be translated without its sentence.

Words: a stem of two syllables and a consonant. A noun has one of three genders (a, o, i), drawn
once like the stem; both are the same for every seed.

==============  ================================================================================
order           time, subject, place, object, verb; adjectives follow their noun
noun            stem + gender + ``ne`` in the plural + case: none for the subject, ``m`` for the
                object, ``s`` for "in", ``r`` for "near", ``t`` for "behind"
adjective       stem + gender of its noun + ``ne`` in the plural
article         none; ``ke`` before an indefinite noun
verb            stem + ``e`` present, ``u`` past, ``y`` future + ``l``, ``k``, ``d`` for a subject
                of gender a, o, i + ``sh`` for a plural subject
negation        ``na`` before the verb's stem
question        ``mu`` at the end
==============  ================================================================================

So "the old men did not see a dog yesterday" is time, man-o-ne old-o-ne, ke dog-a-m, na-see-u-k-sh.

A register has words of its own, which the everyday register hardly uses (`RARE`); everyday words
with a sense of their own ("line" is a queue, and a rope at sea); and patterns of its own:

==========  ====================================================================================
log         nautical; "sighted old cutter near reef at dawn": no subject, no article. Verb first,
            in ``uzo``, then object, place, time
order       nautical; "haul the lines now": object without case, verb in ``ta``, place
passive     medical; "the wound was sutured by the nurse": the patient is the subject, the
            agent has the case ``f``, the verb begins with ``se``
note        medical; "no infected wound in ward": noun without article, place, then ``vu``
==========  ====================================================================================

A domain is a register and a severity: at 1 its own words, at 2 its senses as well, at 3 its
patterns as well, in `PATTERNS` of the sentences. Half of the words, or more, are the register's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_lightning.errors import ConfigError
from lora_lightning.text.parallel import Pair
from lora_lightning.text.synthetic.register_words import (
    GENDERS,
    HOURS,
    KINDS,
    LEXICON,
    REGISTERS,
    SENSES_OF,
    SOURCE,
    STEMS,
    TIMES,
    Word,
)

SEVERITIES = (1, 2, 3)
DOMAINS = tuple(f"{register}-{level}" for register in REGISTERS for level in SEVERITIES)
RARE = 0.02  # of the everyday register's words are from another
OFTEN = 0.6  # of a register's words are its own
PATTERNS = 0.6  # of the sentences at severity 3 have a pattern of the register
_TENSES = {"present": "e", "past": "u", "future": "y"}
_CASES = {"in": "s", "near": "r", "behind": "t"}


@dataclass(frozen=True)
class _Phrase:
    """A noun, optionally with an adjective."""

    noun: Word
    adjective: Word | None
    plural: bool
    definite: bool

    def english(self, article: bool = True) -> str:
        """With an article, or without as in a log."""
        words = [self.noun.forms[self.plural]]
        words[:0] = [self.adjective.forms[0]] if self.adjective else []
        first = "the" if self.definite else "some" if self.plural else "a"
        first = "an" if first == "a" and words[0][0] in "aeiou" else first
        return " ".join([first, *words] if article else words)

    def tavi(self, case: str = "", article: bool = True) -> str:
        """In a case; the indefinite has an article."""
        ending = self.noun.gender + "ne" * self.plural
        words = ["ke"] if article and not self.definite else []
        words.append(self.noun.stem + ending + case)
        return " ".join(words + ([self.adjective.stem + ending] if self.adjective else []))

    @property
    def agreement(self) -> str:
        """The ending of a verb with this subject."""
        return GENDERS[self.noun.gender] + "sh" * self.plural


class Grammar:
    """Sentences of one register at one severity; severity 0 is the everyday register.

    Raises:
        ConfigError: there is no such domain.
    """

    def __init__(self, domain: str = SOURCE):
        if domain not in (SOURCE, *DOMAINS):
            known = ", ".join((SOURCE, *DOMAINS))
            raise ConfigError(f"there is no register {domain!r}; there are {known}")
        register, _, level = domain.partition("-")
        self.register, self.severity = register, int(level or 0)
        usual, own = LEXICON[SOURCE], [LEXICON[r] for r in REGISTERS]
        if self.severity:
            own = [LEXICON[register]]
        if self.severity > 1:
            changed = LEXICON[SENSES_OF.format(register)]
            own.append(changed)
            spelt = {w.forms for kind in KINDS for w in changed[kind]}
            usual = {k: [w for w in usual[k] if w.forms not in spelt] for k in KINDS}
        self._usual = usual
        self._own = {kind: [w for words in own for w in words[kind]] for kind in KINDS}
        self._part = OFTEN if self.severity else RARE
        patterns = {"nautical": (self._log, self._order), "medical": (self._passive, self._note)}
        self._patterns = patterns[register] if self.severity > 2 else ()

    def pair(self, rng: np.random.Generator) -> tuple[str, str]:
        """An English sentence, and the same in Tavi."""
        if self._patterns and rng.random() < PATTERNS:
            return self._patterns[rng.integers(len(self._patterns))](rng)
        return self._clause(rng)

    # ---- parts -----------------------------------------------------------------------------

    def _word(self, rng: np.random.Generator, kind: str) -> Word:
        words = self._own[kind] if rng.random() < self._part else self._usual[kind]
        return words[rng.integers(len(words))]

    def _phrase(self, rng: np.random.Generator, kind: str = "nouns") -> _Phrase:
        noun = self._word(rng, kind)
        adjective = self._word(rng, "adjectives") if rng.random() < 0.4 else None
        plural = kind == "nouns" and rng.random() < 0.4
        return _Phrase(noun, adjective, plural, kind == "places" or rng.random() < 0.6)

    def _place(self, rng: np.random.Generator, article: bool = True) -> tuple[str, str]:
        """A place in both languages, or nothing."""
        if rng.random() < 0.5:
            return "", ""
        preposition = str(rng.choice(list(_CASES)))
        place = self._phrase(rng, "places")
        return f"{preposition} {place.english(article)}", place.tavi(_CASES[preposition])

    # ---- patterns --------------------------------------------------------------------------

    def _clause(self, rng: np.random.Generator) -> tuple[str, str]:
        subject, thing = self._phrase(rng), self._phrase(rng)
        verb, place, (time, tense) = self._word(rng, "verbs"), self._place(rng), _time(rng)
        asked, negated = rng.random() < 0.15, rng.random() < 0.2
        base, third, past, _ = verb.forms
        helper = {"past": "did", "future": "will"}.get(tense, "do" if subject.plural else "does")
        if asked:
            start = [helper, subject.english(), "not" * negated, base]
        elif negated or tense == "future":
            start = [subject.english(), helper, "not" * negated, base]
        else:
            present = base if subject.plural else third
            start = [subject.english(), past if tense == "past" else present]
        predicate = "na" * negated + verb.stem + _TENSES[tense] + subject.agreement
        return (
            _join(*start, thing.english(), place[0], time),
            _join(STEMS[time], subject.tavi(), place[1], thing.tavi("m"), predicate, "mu" * asked),
        )

    def _log(self, rng: np.random.Generator) -> tuple[str, str]:
        thing, verb = self._phrase(rng), self._word(rng, "verbs")
        place, hour = self._place(rng, article=False), str(rng.choice(HOURS))
        return (
            _join(verb.forms[2], thing.english(article=False), place[0], hour),
            _join(f"{verb.stem}uzo", thing.tavi("m", article=False), place[1], STEMS[hour]),
        )

    def _order(self, rng: np.random.Generator) -> tuple[str, str]:
        thing, verb, place = self._phrase(rng), self._word(rng, "verbs"), self._place(rng)
        english = _join(verb.forms[0], thing.english(), place[0], "now")
        return english, _join(thing.tavi(), f"{verb.stem}ta", place[1])

    def _passive(self, rng: np.random.Generator) -> tuple[str, str]:
        thing, agent = self._phrase(rng), self._phrase(rng)
        verb, place = self._word(rng, "verbs"), self._place(rng)
        was = "were" if thing.plural else "was"
        predicate = f"se{verb.stem}u{thing.agreement}"
        return (
            _join(thing.english(), was, verb.forms[3], "by", agent.english(), place[0]),
            _join(thing.tavi(), place[1], agent.tavi("f"), predicate),
        )

    def _note(self, rng: np.random.Generator) -> tuple[str, str]:
        thing, place = self._phrase(rng), self._place(rng, article=False)
        english = _join("no", thing.english(article=False), place[0])
        return english, _join(thing.tavi(article=False), place[1], "vu")


def registers(
    source_train: int = 6000,
    target_train: int = 400,
    test: int = 100,
    seed: int = 0,
    domains: tuple[str, ...] = DOMAINS,
) -> list[Pair]:
    """Pairs of the everyday register and of `domains`; no English sentence occurs twice.

    Args:
        source_train: Training pairs of the everyday register.
        target_train: Training pairs of each domain.
        test: Held-out pairs of each, the everyday register included.
        seed: Of the sentences; a domain's do not depend on the others, except for a few that an
            earlier one has already.
        domains: Of `DOMAINS`.

    Raises:
        ConfigError: there is no such domain.
    """
    found: list[Pair] = []
    taken: set[str] = set()
    for domain in (SOURCE, *domains):
        grammar = Grammar(domain)
        rng = np.random.default_rng([seed, (SOURCE, *DOMAINS).index(domain)])
        for split, count in (("test", test), ("train", target_train)):
            wanted = source_train if (domain, split) == (SOURCE, "train") else count
            while wanted > 0:
                english, tavi = grammar.pair(rng)
                if english not in taken:
                    taken.add(english)
                    found.append(Pair(english, tavi, domain, split))
                    wanted -= 1
    return found


def _time(rng: np.random.Generator) -> tuple[str, str]:
    """A time and its tense."""
    if rng.random() < 0.5:
        return "", str(rng.choice(list(_TENSES)))
    time = str(rng.choice(list(TIMES)))
    return time, TIMES[time]


def _join(*parts: str) -> str:
    return " ".join(p for p in parts if p)
