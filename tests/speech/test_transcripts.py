"""Transcripts with characters that are not among the recogniser's symbols."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_lightning.errors import ConfigError, DataError, MissingDependencyError
from lora_lightning.speech.data.utterances import Utterance
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.transcripts import spelt_out, told

BUNDLE = Labels(["-", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"], separator="|")
PLAIN = Labels(["-", " ", *"abcdefghijklmnopqrstuvwxyzé"])


@pytest.mark.parametrize(
    ("given", "bundle", "plain"),
    [
        ("It’s well-known", "IT'S WELL KNOWN", "its well known"),
        ("‘Yes’, he said\u2014no/maybe.", "YES HE SAID NO MAYBE", "yes he said no maybe"),
        ("cafe\u0301 naïve", "CAFE NAIVE", "café naive"),
        ("Straße, Øre ﬁn", "STRASSE ORE FIN", "strasse ore fin"),
        ("rock & roll", "ROCK ROLL", "rock roll"),
    ],
)
def test_words_are_not_joined_or_lost(given, bundle, plain):
    assert BUNDLE.normalise(given) == bundle
    assert PLAIN.normalise(given) == plain


def test_what_is_rewritten_is_counted():
    changes = BUNDLE.changes(["It’s well-known.", None, "Café, don’t"])
    assert changes == {
        "’ as '": 2,
        "- as a space": 1,
        "É as E": 1,
        ". left out": 1,
        ", left out": 1,
    }
    assert told(changes).startswith(
        "The transcripts are written in the recogniser's symbols: ’ as "
    )
    assert told(PLAIN.changes(["as it is"])) == ""


def test_digits_are_refused_or_spelt_out(monkeypatch):
    with pytest.raises(DataError, match=r"'ROOM 12 PLEASE' holds digits.*--numbers en"):
        BUNDLE.encode("room 12 please")
    assert Labels(["-", " ", *"rom12"]).normalise("room 12") == "room 12"
    heard = [Utterance(Path("a"), "room 12 please"), Utterance(Path("b"), None)]
    monkeypatch.setitem(sys.modules, "num2words", None)
    assert spelt_out(heard[1:], "en") == heard[1:]
    with pytest.raises(MissingDependencyError, match=r"lora-lightning\[numbers\]"):
        spelt_out(heard, "en")

    def words(number, lang):
        if lang != "en":
            raise NotImplementedError
        return {12: "twelve", 1000: "one thousand", 1.5: "one point five"}[number]

    monkeypatch.setitem(sys.modules, "num2words", SimpleNamespace(num2words=words))
    assert spelt_out(heard, "en")[0].text == "room twelve please"
    assert spelt_out([Utterance(Path("c"), "1,000 or 1.5")], "en")[0].text == (
        "one thousand or one point five"
    )
    with pytest.raises(ConfigError, match="no language 'xx'"):
        spelt_out(heard, "xx")
