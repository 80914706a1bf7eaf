"""Decoding with a lexicon, against all of its sentences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.speech.tasks.decoding import NEVER, prefixes
from lora_lightning.speech.tasks.lexicon import END, START, Lexicon, LexiconSearch
from tests.helpers.speech import AB


def test_the_best_sentence_is_found_as_by_trying_all():
    torch.manual_seed(3)
    lexicon = Lexicon(texts=["ab a", "ab b a", "b"])
    search = LexiconSearch(lexicon, AB, beam_size=200, weight=0.7, bonus=0.3)
    for _ in range(10):
        log_probs = torch.randn(5, 4).log_softmax(1)
        sounds = dict(prefixes(log_probs.tolist(), 0, 5000))
        best, text = NEVER, ""
        for n in range(4):
            for words in itertools.product(lexicon.words, repeat=n):
                chain = [START, *words, END]
                said = sum(lexicon.log_probability(w, v) for v, w in itertools.pairwise(chain))
                heard = sounds.get(tuple(AB.encode(" ".join(words))), NEVER)
                score = heard + 0.7 * said + 0.3 * n
                # A separator at the end says the same.
                ended = sounds.get((*AB.encode(" ".join(words)), 1), NEVER) if n else NEVER
                score = max(score, ended + 0.7 * said + 0.3 * n)
                if score > best:
                    best, text = score, " ".join(words)
        assert search.decode(log_probs[None], torch.tensor([5])) == [text]


def test_what_the_lexicon_costs():
    """0 where the sound says a sentence of the lexicon by itself, more where it must be bent."""
    search = LexiconSearch(Lexicon(["ab"]), AB)

    def cost(text):
        frames = torch.full((len(text), 4), -9.0)
        frames[range(len(text)), AB.encode(text)] = 0.0
        [(found, cost)] = search.compared(frames[None], torch.tensor([len(text)]))
        assert found == search.decode(frames[None], torch.tensor([len(text)]))[0] == "ab"
        return cost

    assert cost("ab") == pytest.approx(0, abs=1e-3)
    assert cost("aa") == pytest.approx(9 / 2, abs=1e-3)  # one of two frames must be another


def test_words_used_otherwise_than_in_the_lexicon():
    lexicon = Lexicon(texts=["a b", "b a"] * 50)
    assert abs(lexicon.divergence(["a b", "b a"])) < 0.02
    assert lexicon.divergence(["a a", "a a"]) > 0.3
    assert Lexicon(["a", "b"]).divergence(["a a"]) is None


def test_nothing_but_words_is_written():
    torch.manual_seed(0)
    search = LexiconSearch(Lexicon(["ab", "ba"]), AB)
    texts = search.decode(torch.randn(8, 12, 4).log_softmax(2), torch.full((8,), 12))
    assert {word for text in texts for word in text.split()} <= {"ab", "ba"}
    assert any(texts)


def test_the_bigram_by_hand():
    lexicon = Lexicon(texts=["a b", "a a"], smoothing=0.5)
    # After a: b once, a once, the end once, of three; a twice of 6 words, 2 words and the end.
    expected = 0.5 * (1 / 3) + 0.5 * (3 + 1) / (6 + 2 + 1)
    assert lexicon.log_probability("a", "a") == pytest.approx(math.log(expected))
    assert Lexicon(["a", "b"]).log_probability("a", "b") == pytest.approx(-math.log(2))


def test_a_file_holds_words_or_sentences(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("ab\n\nba\n")
    assert Lexicon.read(path).words == ["ab", "ba"]
    path.write_text("ab ba\nb\n")
    assert Lexicon.read(path).words == ["ab", "b", "ba"]
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no word"):
        Lexicon.read(path)
    with pytest.raises(DataError, match="cannot be read"):
        Lexicon.read(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lexicon([]), "at least one word"),
        (lambda: Lexicon(["a b"]), "single words"),
        (lambda: Lexicon(["a"], smoothing=0), "smoothing must lie"),
        (lambda: LexiconSearch(Lexicon(["ac"]), AB), "cannot write 'ac'"),
        (lambda: LexiconSearch(Lexicon(["a"]), AB, beam_size=0), "beam_size"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
