"""The page's section of recordings: audio players, references and hypotheses."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from lora_lightning.report.results import Run, Transcript
from lora_lightning.report.word_errors import SAMPLE_RATE, Piece, compare, sound, telling

MOST = 8
MOST_CHARACTERS = 1_800_000  # of sound in the page, which stays below 3 MB
_PLAYER = '<audio controls preload="none" aria-label="{}" src="{}"></audio>'
_TAGS = {"substitute": "mark", "insert": "ins", "delete": "del"}


def section(run: Run) -> str:
    """An audio player, the reference and both hypotheses for a few recordings; "" without any.

    In a run of translation the source sentence replaces the player.
    """
    if run.texts == "translations":
        title, texts, reference = "Read", "sentences", "wanted"
        chosen = [(t, "") for t in telling(run.heard(), MOST)]
    else:
        title, texts, reference = "Listen", "recordings", "said"
        chosen = [(t, _PLAYER.format(escape(t.item), uri)) for t, uri in _playable(run)]
    if not chosen:
        return ""
    return (
        f'<h2>{title}</h2><p class="note">Errors are marked: <mark>wrong word</mark>, '
        f"<ins>word too many</ins>, <del>word missed</del>. The {texts} in which most words were "
        "mended, of each target in turn; last, the one in which least was won.</p>"
        + "".join(_one(t, reference, player) for t, player in chosen)
    )


def _one(t: Transcript, reference: str, player: str) -> str:
    lines = (
        (reference, escape(t.reference)),
        ("before", _marked(compare(t.reference, t.source), reference)),
        ("after", _marked(compare(t.reference, t.adapted), reference)),
    )
    rows = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in lines)
    return (
        f'<div class="heard"><p><b>{escape(t.domain)}</b> · {escape(t.item)}</p>'
        f"{player}<dl>{rows}</dl></div>"
    )


def _marked(pieces: Sequence[Piece], reference: str) -> str:
    """The hypothesis with its errors marked; missing words are struck out."""
    found = []
    for piece in pieces:
        text = escape(piece.said if piece.kind == "delete" else piece.heard)
        tag = _TAGS.get(piece.kind)
        hint = f' title="{reference}: {escape(piece.said)}"' if piece.kind == "substitute" else ""
        found.append(f"<{tag}{hint}>{text}</{tag}>" if tag else text)
    return " ".join(found) or "<i>nothing</i>"


def _playable(run: Run) -> list[tuple[Transcript, str]]:
    """Transcripts whose audio can be read and fits the page, with their audio."""
    found, room = [], MOST_CHARACTERS
    for t in telling(run.heard(), MOST):
        uri = _sound(t, run)
        if uri and len(uri) <= room:
            found.append((t, uri))
            room -= len(uri)
    return found


def _sound(t: Transcript, run: Run) -> str:
    """The recording as a data URI, in FLAC, which every browser plays; "" where it is missing."""
    import soundfile

    samples = sound(t, run)
    if samples is None:
        return ""
    file = io.BytesIO()
    soundfile.write(file, samples.clamp(-1, 1).numpy(), SAMPLE_RATE, "PCM_16", format="FLAC")
    return f"data:audio/flac;base64,{base64.b64encode(file.getvalue()).decode()}"
