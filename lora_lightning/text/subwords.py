"""`Subwords`: tokenisation by byte-pair encoding."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

PAD, BEGIN, END, UNKNOWN = 0, 1, 2, 3
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_SPACE = "▁"  # before the first piece of a word


class Subwords:
    """A byte-pair encoding; unseen words are split into smaller pieces.

    Starting from single characters, the most frequent pair of neighbours is merged, repeatedly.
    Sennrich et al. 2016, "Neural machine translation of rare words with subword
    units", arXiv:1508.07909. Words are separated by spaces; an unseen character is
    `UNKNOWN`.

    Args:
        characters: The alphabet.
        merges: Pairs of pieces to merge, in order.
    """

    def __init__(self, characters: Sequence[str], merges: Sequence[Sequence[str]]):
        self.characters = list(characters)
        self.merges = [(str(a), str(b)) for a, b in merges]
        joined = [a + b for a, b in self.merges]
        # A text may contain "<s>", which is then no special token.
        self.pieces = [*SPECIAL, *dict.fromkeys([*self.characters, *joined])]
        self._ids = {piece: i for i, piece in enumerate(self.pieces) if i >= len(SPECIAL)}
        self._ranks = {pair: i for i, pair in enumerate(self.merges)}
        self._known: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.pieces)

    @classmethod
    def learn(cls, texts: Iterable[str], merges: int = 500) -> Subwords:
        """Learn at most this many merges from texts; fewer where no pair occurs twice."""
        words = Counter(word for text in texts for word in text.split())
        spelt = {word: list(_SPACE + word) for word in words}
        characters = sorted({c for pieces in spelt.values() for c in pieces})
        joined: list[tuple[str, str]] = []
        while len(joined) < merges:
            pairs: Counter[tuple[str, str]] = Counter()
            for word, pieces in spelt.items():
                for pair in pairwise(pieces):
                    pairs[pair] += words[word]
            # Ties are broken alphabetically, so that the result is deterministic.
            best = min(pairs, key=lambda p: (-pairs[p], p), default=None)
            if best is None or pairs[best] < 2:
                break
            joined.append(best)
            for word, pieces in spelt.items():
                if best[0] in pieces:
                    spelt[word] = _joined(pieces, best)
        return cls(characters, joined)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, followed by `END`."""
        return [i for word in text.split() for i in self._word(word)] + [END]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first `END`."""
        found = []
        for i in ids:
            if i == END:
                break
            if i not in (PAD, BEGIN):
                found.append(self.pieces[i])
        return "".join(found).replace(_SPACE, " ").strip()

    def _word(self, word: str) -> list[int]:
        if word not in self._known:
            pieces = list(_SPACE + word)
            while len(pieces) > 1:
                neighbours = pairwise(pieces)
                best = min(neighbours, key=lambda p: self._ranks.get(p, len(self._ranks)))
                if best not in self._ranks:
                    break
                pieces = _joined(pieces, best)
            self._known[word] = [self._ids.get(piece, UNKNOWN) for piece in pieces]
        return self._known[word]

    def dumps(self) -> str:
        """Serialise as JSON, for a model's file."""
        return json.dumps({"characters": self.characters, "merges": self.merges})

    @classmethod
    def loads(cls, text: str) -> Subwords:
        """From `dumps`."""
        return cls(**json.loads(text))


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with each occurrence of the pair merged."""
    found: list[str] = []
    for piece in pieces:
        if found and (found[-1], piece) == pair:
            found[-1] += piece
        else:
            found.append(piece)
    return found
