"""Lists of recordings: manifests, the layouts of known corpora, plain folders.

Each layout is one function from a path to utterances, entered in `LAYOUTS`.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_lightning.config import unknown_key
from lora_lightning.data.utterances import Utterance
from lora_lightning.errors import ConfigError, DataError

AUDIO = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au"}
# What a column may be called, the first that is there.
COLUMNS = {
    "path": ("path", "audio", "file", "audio_filepath", "filename"),
    "text": ("text", "transcript", "transcription", "sentence"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "domain": ("domain", "environment"),
    "target": ("target", "label"),
}


def load_utterances(source: Path | str, layout: str = "auto") -> list[Utterance]:
    """All recordings of a manifest, a corpus or a folder, in a fixed order.

    Args:
        source: A file (.csv, .tsv, .jsonl) or a folder.
        layout: ``"manifest"``: columns ``path``, ``text``, ``speaker``, ``domain``, ``target``
            (or what `COLUMNS` has for them), paths relative to the file. ``"librispeech"``:
            ``<speaker>/<chapter>/*.trans.txt`` beside the sound. ``"commonvoice"``:
            ``validated.tsv`` (else ``train.tsv``, …) and ``clips``. ``"vctk"``: ``wav48…`` and
            ``txt``, of two microphones the first. ``"folder"``: any audio files, their text in a
            .txt beside each, if at all, their speaker the first folder. ``"auto"``: what fits.

    Raises:
        ConfigError: there is no such layout.
        DataError: there is no such file or folder, it holds no recordings, or a line is wrong.
    """
    path = Path(source)
    if layout not in (*LAYOUTS, "auto"):
        raise ConfigError(unknown_key(layout, [*LAYOUTS, "auto"]).replace("key", "layout"))
    if not path.exists():
        raise DataError(f"there is no file or folder {path}; give a manifest or a folder of audio")
    found = LAYOUTS[_layout(path) if layout == "auto" else layout](path)
    if not found:
        raise DataError(
            f"{path} holds no recordings; expected a .csv, .tsv or .jsonl with a column path, or "
            f"audio files ({', '.join(sorted(AUDIO))})"
        )
    return found


def _layout(path: Path) -> str:
    if path.is_file():
        return "manifest"
    if (path / "clips").is_dir() and any(path.glob("*.tsv")):
        return "commonvoice"
    if (path / "txt").is_dir() and any(path.glob("wav48*")):
        return "vctk"
    return "librispeech" if any(path.rglob("*.trans.txt")) else "folder"


def _manifest(path: Path) -> list[Utterance]:
    rows = _json_lines(path) if path.suffix in (".jsonl", ".json") else _table(path)
    return [_utterance(row, path, number) for number, row in rows]


def _utterance(row: Mapping[str, Any], path: Path, number: int) -> Utterance:
    values = {k: next((row[c] for c in names if row.get(c)), None) for k, names in COLUMNS.items()}
    if not isinstance(values["path"], str):
        raise DataError(
            f"{path}, line {number}: no path; its columns are {', '.join(map(str, row))}"
        )
    target = values["target"]
    seconds = row.get("seconds")
    return Utterance(
        path=path.parent / values["path"],
        text=_word(values["text"]),
        speaker=_word(values["speaker"]),
        domain=_word(values["domain"]),
        target=_number(target) if isinstance(target, str) and path.suffix != ".jsonl" else target,
        seconds=float(seconds) if isinstance(seconds, (int, float)) else float("nan"),
    )


def _word(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {number}: expected an object such as {{"path": …}}')
        yield number, row


def _table(path: Path, delimiter: str | None = None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    delimiter = delimiter or ("\t" if path.suffix == ".tsv" else ",")
    # Sentences in a .tsv may hold a lone quotation mark.
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.DictReader(_lines(path), delimiter=delimiter, quoting=quoting)
    if not set(COLUMNS["path"]) & set(reader.fieldnames or ()):
        raise DataError(
            f"{path} has no column for the audio file: expected one of {', '.join(COLUMNS['path'])}"
            f"; the first line has {', '.join(reader.fieldnames or ['nothing'])}"
        )
    for row in reader:
        if None in row or None in row.values():
            raise DataError(
                f"{path}, line {reader.line_num}: {len(reader.fieldnames or ())} columns expected, "
                "as in the first line"
            )
        yield reader.line_num, row


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _librispeech(path: Path) -> list[Utterance]:
    found = []
    for listing in sorted(path.rglob("*.trans.txt")):
        for number, line in enumerate(_lines(listing), 1):
            name, _, text = line.strip().partition(" ")
            if name:
                file = _beside(listing.parent / name)
                if file is None:
                    raise DataError(f"{listing}, line {number}: there is no audio file {name}")
                found.append(Utterance(file, text, speaker=name.partition("-")[0]))
    return found


def _commonvoice(path: Path) -> list[Utterance]:
    names = ("validated.tsv", "train.tsv", "dev.tsv", "test.tsv")
    listing = next((path / name for name in names if (path / name).is_file()), None)
    if listing is None:
        raise DataError(f"{path} has none of {', '.join(names)}")
    found = [_utterance(row, listing, number) for number, row in _table(listing)]
    return [replace(u, path=path / "clips" / u.path.name) for u in found]


def _vctk(path: Path) -> list[Utterance]:
    sound = sorted(path.glob("wav48*"))[0]
    found = []
    for file in _audio_files(sound):
        if file.stem.endswith("_mic2"):
            continue
        speaker, name = file.parent.name, file.stem.removesuffix("_mic1")
        text = path / "txt" / speaker / f"{name}.txt"
        words = " ".join("".join(_lines(text)).split()) if text.is_file() else None
        found.append(Utterance(file, words, speaker))
    return found


def _folder(path: Path) -> list[Utterance]:
    found = []
    for file in _audio_files(path):
        parts, text = file.relative_to(path).parts, file.with_suffix(".txt")
        words = " ".join("".join(_lines(text)).split()) if text.is_file() else None
        found.append(Utterance(file, words, parts[0] if len(parts) > 1 else None))
    return found


def _audio_files(path: Path) -> list[Path]:
    files = (p for p in path.rglob("*") if p.suffix.lower() in AUDIO and p.is_file())
    hidden = (p for p in files if not any(q.startswith(".") for q in p.relative_to(path).parts))
    return sorted(hidden)


def _beside(stem: Path) -> Path | None:
    files = (stem.with_name(stem.name + suffix) for suffix in (".flac", *sorted(AUDIO)))
    return next((file for file in files if file.is_file()), None)


LAYOUTS: dict[str, Callable[[Path], list[Utterance]]] = {
    "manifest": _manifest,
    "librispeech": _librispeech,
    "commonvoice": _commonvoice,
    "vctk": _vctk,
    "folder": _folder,
}


def write_manifest(path: Path | str, utterances: Sequence[Utterance]) -> None:
    """Write a JSONL manifest that `load_utterances` reads back the same, in one step."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for u in utterances:
        row: dict[str, Any] = {
            "path": Path(os.path.relpath(u.path.absolute(), path.parent)).as_posix()
        }
        rest = {"text": u.text, "speaker": u.speaker, "domain": u.domain, "target": u.target}
        row |= {k: v for k, v in rest.items() if v is not None}
        row |= {"seconds": u.seconds} if u.seconds == u.seconds else {}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)
