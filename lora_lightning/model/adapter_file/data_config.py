"""The part of a file's header about the items and classes of a network.

A network says it by an attribute ``pretrained_cfg``, a mapping: timm's own for pictures; for
recordings ``{"labels": {"symbols": […], "blank": 0, "separator": " "}, "sample_rate": 16000}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_lightning.model.adapter_file.schema import Kind, Leaf, Listed, Record, real, text, whole

# Of any script, invisible joiners included.
_SYMBOL = Leaf("a text of up to 100 characters", lambda v: isinstance(v, str) and len(v) <= 100)
LABELS = Record(  # of a recogniser
    {"symbols": Listed(_SYMBOL, 100_000), "blank": whole(), "separator": _SYMBOL},
    others=Leaf("no such field", lambda value: False),
)
RATE = whole(1000, 200_000)
_KINDS: dict[str, Kind] = {
    "class_names": Listed(text(), 100_000),
    "input_size": Listed(whole(1, 2**20), 3, exactly=True),
    "mean": Listed(real(-1e6, 1e6), 1000),
    "std": Listed(real(1e-6, 1e6), 1000),
    "interpolation": text(40),
    "crop_pct": real(0.01, 10.0),
    "labels": LABELS,
    "sample_rate": RATE,
}
DATA = Record({}, _KINDS)


def data_config(model: nn.Module) -> dict[str, Any]:
    """What a network says of its items and classes, as far as it is known.

    Of pictures class names, input size, mean, std, interpolation and crop; of recordings labels
    and sample rate. Class names are ``label_names``, where there is one for each class.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, Mapping):
        return {}
    names = [_printable(name) for name in cfg.get("label_names") or ()]
    many = getattr(model, "num_classes", len(names))
    found = {key: cfg.get(key) for key in _KINDS}
    found |= {"class_names": names if len(names) == many else None}
    if side := getattr(getattr(model, "patch_embed", None), "img_size", None):  # as it was built
        found["input_size"] = (3, *side)
    plain = {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in found.items()}
    return {key: value for key, value in plain.items() if value and _KINDS[key].fits(value)}


def _printable(name: Any) -> str:
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name)[:1000]
    )
