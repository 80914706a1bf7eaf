"""Lexicon-constrained CTC decoding with a bigram language model."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.lora.values import check_count, check_number
from lora_lightning.runner.tables import read_text
from lora_lightning.speech.data.synthetic.phrases import phrases
from lora_lightning.speech.tasks.decoding import NEVER, Prefix, prefixes, valid_frames
from lora_lightning.speech.tasks.labels import Labels

START, END = "<s>", "</s>"
SEED = 99  # of the sentences of `spoken_lexicon`
Node = dict[int, "Node"]


class Lexicon:
    r"""A vocabulary with, where texts are given, bigram probabilities.

    The probability of a word after another is the interpolated bigram
    :math:`p(w|v) = (1-\lambda)\,c(v,w)/c(v) + \lambda\,(c(w) + 1)/(N + V)` (Jelinek & Mercer
    1980), without texts :math:`1/V`.

    Args:
        words: The words; one that the recogniser cannot spell is refused by `LexiconSearch`.
        texts: Sentences of the domain; their words are added to the list.
        smoothing: λ, in (0, 1].

    Raises:
        ConfigError: there is no word, or smoothing is out of range.
    """

    def __init__(
        self, words: Iterable[str] = (), texts: Iterable[str] = (), smoothing: float = 0.1
    ):
        check_number("smoothing", smoothing, "(0, 1]")
        sentences = [text.split() for text in texts]
        self.words = sorted({*words, *(w for s in sentences for w in s)} - {""})
        if not self.words:
            raise ConfigError("a lexicon needs at least one word; the list is empty")
        if spaced := [w for w in self.words if len(w.split()) != 1]:
            raise ConfigError(f"a lexicon holds single words, not {spaced[0]!r}; give it as a text")
        self.smoothing = smoothing
        chains = [[START, *s, END] for s in sentences]
        self._after = Counter(pair for c in chains for pair in pairwise(c))
        self._before = Counter(word for c in chains for word in c[:-1])
        self._count = Counter(word for c in chains for word in c[1:])
        self._total = sum(self._count.values())

    @classmethod
    def read(cls, path: Path | str) -> Lexicon:
        """From a text file: a list of words, one a line, or else sentences.

        Raises:
            DataError: it cannot be read, or is empty.
        """
        try:
            lines = [x for line in read_text(Path(path)).splitlines() if (x := line.strip())]
        except DataError as error:
            raise DataError(f"{path} cannot be read as a lexicon: {error}") from error
        if not lines:
            raise DataError(f"{path} holds no word")
        return cls(texts=lines) if any(" " in x for x in lines) else cls(lines)

    def log_probability(self, word: str, before: str) -> float:
        """log p(word | before); `START` comes before the first word, `END` after the last."""
        if not self._total:
            return 0.0 if word == END else -math.log(len(self.words))
        seen = self._before[before]
        bigram = self._after[before, word] / seen if seen else 0.0
        unigram = (self._count[word] + 1) / (self._total + len(self.words) + 1)
        weight = self.smoothing if seen else 1.0
        return math.log((1 - weight) * bigram + weight * unigram)

    def divergence(self, texts: Iterable[str]) -> float | None:
        """How differently words are used in these texts, in nats a word; None for a bare list.

        The Kullback-Leibler divergence of their frequencies of words (and of the end) from the
        lexicon's. It rises where a recogniser takes words for others, not for one another.
        """
        if not self._total:
            return None
        count = Counter(word for text in texts for word in (*text.split(), END))
        total, known = sum(count.values()), self._total + len(self.words) + 1
        return sum(
            n / total * math.log(n / total * known / (self._count[word] + 1))
            for word, n in count.items()
        )


def spoken_lexicon(sentences: int = 2000) -> Lexicon:
    """The lexicon of the spoken data, with bigrams of sentences of its kind.

    The sentences have a seed of their own, so that few of them are in the spoken data.
    """
    return Lexicon(texts=phrases(sentences, np.random.default_rng(SEED)))


class State(NamedTuple):
    """State of a prefix: its node in the trie, the previous word, and the score."""

    node: Node
    word: str
    score: float


class LexiconSearch:
    """The prefix beam search over sentences of the lexicon's words.

    The score of a text of n words is
    log p(text | sound) + weight · Σ log p(word | the one before) + bonus · n.

    Args:
        lexicon: The words.
        labels: The symbols of the recogniser's classes.
        beam_size: Prefixes that are kept after each frame.
        weight: Of the language model.
        bonus: Added for each word; above 0 it counteracts deletions.

    Raises:
        ConfigError: a word cannot be spelt with the labels, or `beam_size` is below 1.
    """

    def __init__(
        self,
        lexicon: Lexicon,
        labels: Labels,
        beam_size: int = 16,
        weight: float = 1.0,
        bonus: float = 0.0,
    ):
        check_count("beam_size", beam_size)
        self.lexicon, self.labels, self.beam_size = lexicon, labels, beam_size
        self.weight, self.bonus = weight, bonus
        self._separator = labels.symbols.index(labels.separator)
        self._tree: Node = {}
        self._whole: dict[int, str] = {}  # id of a node → the word that ends there
        for word in lexicon.words:
            self._add(word)

    def _add(self, word: str) -> None:
        digits = any(c.isdigit() and c not in self.labels.symbols for c in word)
        normal = "" if digits else self.labels.normalise(word)
        if len(normal) != len(word) or " " in normal:
            raise ConfigError(
                f"the recogniser cannot write {word!r} of the lexicon with its symbols "
                f"{''.join(self.labels.symbols)!r}; leave it out or spell it differently"
            )
        node = self._tree
        for c in self.labels.encode(word):
            node = node.setdefault(c, {})
        self._whole[id(node)] = word

    def decode(self, log_probs: Tensor, lengths: Tensor) -> list[str]:
        """(B, F, C) log-probabilities and frames (B,) → texts; "" where no word fits."""
        return [text for text, _ in self.compared(log_probs, lengths)]

    def compared(self, log_probs: Tensor, lengths: Tensor) -> list[tuple[str, float]]:
        """Each text, with what the lexicon costs it.

        That is, in nats a frame, how far the text's score lies below the log-probability of the
        best path of any symbols: 0 where the sound alone says the same. Near 0 the lexicon only
        confirms; where it is large it had to choose a sentence that the sound does not support.

        Args:
            log_probs: (B, F, C).
            lengths: Frames (B,).
        """
        found = []
        for row in valid_frames(log_probs, lengths):
            text, score = self._one(row.double().tolist())
            best, silent = float(row.double().amax(1).sum()), float(row[:, self.labels.blank].sum())
            found.append((text, (best - (score if text else silent)) / max(len(row), 1)))
        return found

    def _one(self, frames: Sequence[Sequence[float]]) -> tuple[str, float]:
        states: dict[Prefix, State] = {(): State(self._tree, START, 0.0)}

        @functools.cache
        def grow(prefix: Prefix) -> dict[int, float]:
            node = states[prefix].node
            found = {c: self._next(states[prefix], c) for c in (*node, self._separator)}
            possible = {c: state for c, state in found.items() if state is not None}
            states.update({(*prefix, c): state for c, state in possible.items()})
            return {c: state.score for c, state in possible.items()}

        ranked = prefixes(frames, self.labels.blank, self.beam_size, grow=grow)
        ends = [(p + e, prefix) for prefix, p in ranked if (e := self._end(states[prefix])) > NEVER]
        score, best = max(ends, default=(NEVER, ()))
        return self.labels.decode(best), score

    def _next(self, state: State, c: int) -> State | None:
        if c == self._separator:
            word = self._whole.get(id(state.node))
            return None if word is None else State(self._tree, word, self._score(state, word))
        node = state.node.get(c)
        return None if node is None else state._replace(node=node)

    def _score(self, state: State, word: str) -> float:
        p = self.lexicon.log_probability(word, state.word)
        return state.score + self.weight * p + self.bonus

    def _end(self, state: State) -> float:
        """What the end of the text adds to the score; NEVER in the middle of a word."""
        before, score = state.word, state.score
        if state.node is not self._tree:
            word = self._whole.get(id(state.node))
            if word is None:
                return NEVER
            before, score = word, self._score(state, word)
        return score - state.score + self.weight * self.lexicon.log_probability(END, before)
