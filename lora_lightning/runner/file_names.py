"""Names of files and adapters from names that people and data sets give: speakers, domains."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_adapter_name

LONGEST = 120  # bytes: file systems take 255, and what is added must fit
# Not in a file's name: separators, what Windows and shells take for something else, control
# characters, marks that turn the direction of text, lone surrogates.
_UNSAFE = re.compile(
    r"[\\/:*?\"<>|\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]+"
)
_NO_ADAPTER = re.compile(r"[^A-Za-z0-9_-]+")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Name → a name for its file, without a suffix: safe on every file system, distinct, readable.

    A name stays what it is where it can. Else what can stay is kept, and eight digits of the name's
    hash are added: the same in every run, whatever other names there are. Names that some file
    systems take for one (in upper and lower case, composed and decomposed) get such digits each.
    """
    wanted = {name: _safe(name) for name in names}
    count = Counter(_folded(stem) for stem in wanted.values())
    return {
        name: stem if stem == name and count[_folded(stem)] == 1 else _marked(stem, name)
        for name, stem in wanted.items()
    }


def adapter_name(name: str) -> str:
    """A name for an adapter: the same where it can be, see `check_adapter_name`."""
    try:
        check_adapter_name(name)
    except ConfigError:
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        return _marked(_NO_ADAPTER.sub("_", plain).strip("_"), name)
    return name


def _safe(name: str) -> str:
    stem = _UNSAFE.sub("_", unicodedata.normalize("NFC", name))
    stem = _cut(re.sub(r"^[.~\s-]+|[.\s]+$", "", stem), LONGEST)
    return "" if _DEVICE.fullmatch(stem) else stem


def _cut(text: str, most: int) -> str:
    return text.encode("utf-8", "ignore")[:most].decode("utf-8", "ignore")


def _folded(stem: str) -> str:
    return unicodedata.normalize("NFKC", stem).casefold()


def _marked(stem: str, name: str) -> str:
    digits = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{_cut(stem, 60) or 'unnamed'}-{digits}"
