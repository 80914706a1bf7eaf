"""Validation of settings."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import ConfigError

if TYPE_CHECKING:  # the command line checks numbers before it imports torch
    from torch import Tensor

SEEDS = "[0, 4294967295]"  # what Lightning's seed_everything takes
LONGEST_NAME = 150  # of an adapter: file names hold 255 bytes, and a step is added
LONGEST_TEXT = 1000  # in a header; a longer pattern can be split into several
# What Windows takes for a device, whatever the ending.
_DEVICES = re.compile(r"con|prn|aux|nul|com\d|lpt\d", re.IGNORECASE)


def plain(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings in a mapping, also an OmegaConf one; an empty dictionary for None."""
    if config is None:
        return {}
    if type(config).__module__.startswith("omegaconf"):
        from omegaconf import OmegaConf

        return dict(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    return dict(config)


def patterns(key: str, value: Any) -> list[str]:
    """A list of pattern strings from a string, a class, or an iterable of both."""
    if isinstance(value, (str, type)):
        value = [value]
    if value is None or isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"{key} must be a string, a class or a list of them, got {value!r}")
    found = []
    for item in value:
        if isinstance(item, type):
            item = f"type:{item.__module__}.{item.__qualname__}"
        if not isinstance(item, str) or not item.strip():
            raise ConfigError(f"{key} holds {item!r}; expected a pattern (a string) or a class")
        found.append(item)
    return found


def keyed(key: str, mapping: Any) -> dict[str, Any]:
    """Name of each value in errors → the value."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{key} must map patterns to numbers, got {mapping!r}")
    return {f"{key}[{pattern!r}]": value for pattern, value in mapping.items()}


def check_choice(key: str, value: Any, choices: Collection[str]) -> None:
    """Raise ConfigError for a value that is not one of these names."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def is_whole(value: Any) -> bool:
    """Whether this is a whole number; True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether this is a number; True is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_number(key: str, value: Any, interval: str, unit: str = "") -> None:
    """Raise ConfigError for what is no number in an interval, as it is written: "[0, 1)".

    "(0, inf)" and "[2, inf)" leave out infinity; NaN lies in no interval.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    real = isinstance(value, Real) and not isinstance(value, bool)
    above = real and (value > low if interval[0] == "(" else value >= low)
    if above and (value < high if interval[-1] == ")" else value <= high):
        return
    where = f"lie in {interval}{unit and ' '}{unit}"
    if high == math.inf:
        least = f"be above {low:g}" if interval[0] == "(" else f"be {low:g} or more"
        where = f"{least}{unit and ' '}{unit}{' and finite' if value == math.inf else ''}"
    raise ConfigError(f"{key} must {where if real else f'be a number and {where}'}, got {value!r}")


def check_count(key: str, value: Any, least: int = 1, unit: str = "") -> None:
    """Raise ConfigError for what is no whole number of at least `least`; True is none."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        what = f"a whole number of at least {least}{unit and ' '}{unit}"
        raise ConfigError(f"{key} must be {what}, got {value!r}")


def is_plain(value: Any, depth: int = 3) -> bool:
    """Whether the header of a file can hold this: finite numbers, printable texts, not too long."""
    if isinstance(value, str):
        return (
            len(value) <= LONGEST_TEXT and value.replace("\n", "").replace("\t", "").isprintable()
        )
    if isinstance(value, (list, dict)) and depth:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return all(is_plain(part, depth - 1) for part in parts)
    if is_whole(value):
        return -(2**63) < int(value) < 2**63
    return value is None or isinstance(value, bool) or (is_real(value) and math.isfinite(value))


def check_plain(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that a file could not hold after the training."""
    for key, value in settings.items():
        if not is_plain(value):
            raise ConfigError(
                f"{key} cannot be written to an adapter's file, which takes finite numbers below "
                f"2**63 and printable texts of at most {LONGEST_TEXT} characters; got "
                f"{reprlib.repr(value)}"
            )


def check_adapter_name(name: Any) -> None:
    """Raise ConfigError for a name under which no module, or no file, can be kept."""
    from torch import nn

    fits = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name)
    # Of an instance: "training" is no attribute of the class.
    if not fits or hasattr(nn.ModuleDict(), name) or _DEVICES.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot name an adapter: use letters, digits, '_' and '-', and no name of an "
            "attribute of torch modules or of a device (con, nul, …)"
        )
    if len(name) > LONGEST_NAME:
        raise ConfigError(
            f"{name[:20]!r} … cannot name an adapter: it has {len(name)} characters, and at most "
            f"{LONGEST_NAME} fit into the name of a file"
        )


def finite(*tensors: Tensor) -> bool:
    """Whether all of these numbers are finite."""
    return all(bool(t.isfinite().all()) for t in tensors)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    import torch

    floats = {k: t for k, t in tensors.items() if t.is_floating_point() and not t.is_meta}
    if not floats:
        return []
    # A sum has every NaN and infinity in it; asking each tensor takes longer.
    parts = [t.detach().flatten().float() for t in floats.values()]
    if len({t.device for t in parts}) == 1 and bool(torch.cat(parts).sum().isfinite()):
        return []
    return [key for key, t in floats.items() if not bool(t.detach().double().isfinite().all())]
