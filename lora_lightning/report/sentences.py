"""`sentence`: an error in words, for a command line or a summary."""

from __future__ import annotations

import errno
import traceback
from collections import Counter
from collections.abc import Iterable

from lora_lightning.errors import LoRALightningError

_FULL = "free some space, or give a folder elsewhere"
_DENIED = "change its permissions, or give another path"
_PLACE = "give another path"
_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: "give a folder that can be written to",
    errno.ENAMETOOLONG: "give a shorter one: most file systems take 255 bytes for a name",
    errno.EISDIR: "a file is expected here",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: _PLACE,
    errno.ENOENT: _PLACE,
    errno.ELOOP: "its links lead in a circle",
    errno.EMFILE: "close some, or raise the limit (ulimit -n)",
}
_MEMORY = "the memory is full: take smaller batches, a smaller model, or fewer items"
# By name: importing their packages takes long, and nothing can be raised by one that is not there.
_KINDS = {
    "MemoryError": _MEMORY,
    "OutOfMemoryError": _MEMORY,  # of torch, on a device
    "LinAlgError": "a matrix cannot be decomposed ({}): the model's outputs or weights are not "
    "finite, or all alike; lower the learning rate, or leave this method out",
    "OmegaConfBaseException": "a setting cannot be used: {}",
    "LibsndfileError": "a sound cannot be read or written: {}",
}


def sentence(error: BaseException) -> str | None:
    """What happened and what to do; ``None`` where that is unknown and the traceback is needed."""
    if isinstance(error, LoRALightningError):
        return str(error)
    if isinstance(error, OSError):
        return _of_system(error)
    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, ValueError) and first.startswith("embedded null"):
        return "a path holds a NUL character, which no name of a file can: give another"
    if isinstance(error, RuntimeError) and "allocate memory" in first:  # torch, on the CPU
        return _MEMORY
    names = [kind.__name__.removeprefix("_") for kind in type(error).__mro__]
    return next((_KINDS[n].format(first) for n in names if n in _KINDS), None)


def failure(error: BaseException) -> str:
    """`sentence`, or the kind of a fault of ours, whose traceback is printed."""
    if said := sentence(error):
        return said
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error} (its traceback is above)"


def _of_system(error: OSError) -> str:
    if error.strerror is None:  # of a library: a download, for instance
        return " ".join(str(error).split()) or type(error).__name__
    where = "" if error.filename is None else f"{error.filename}: "
    advice = _ADVICE.get(error.errno or 0)
    return f"{where}{error.strerror}" + (f"; {advice}" if advice else "")


def by_reason(skipped: Iterable[tuple[str, str]]) -> Counter[str]:
    """How many of (path, reason) were left out for each reason, whatever follows its colon."""
    return Counter(reason.partition(":")[0] for _, reason in skipped)
