"""Weights of a file under a model's own names: prefixes found, differences explained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.model.introspection import classifier_modules


def own_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    path: str,
    prefix: str | None = None,
    notices: list[str] | None = None,
) -> dict[str, Tensor]:
    """The weights of a model in a file that may hold more, under the model's own names.

    Args:
        model: Whose weights.
        weights: Of the file.
        path: Of the file, for messages.
        prefix: Of the model's names in the file; None: the one under which most of them are found.
        notices: A message about what lies outside the prefix is appended to this list.

    Raises:
        ConfigError: nothing has this prefix, or several have all of the model's names.
    """
    if prefix is None:
        prefix = _prefix(model.state_dict(), weights, path)
    elif prefix and not prefix.endswith("."):
        prefix += "."
    found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if not found:
        tops = sorted({f"{k.partition('.')[0]}." for k in weights})
        raise ConfigError(
            f"model.checkpoint: no name in {path} begins with {prefix!r}; they begin with "
            f"{_some(tops)}"
        )
    others = [k for k in weights if not k.startswith(prefix)]
    if others and notices is not None:
        notices.append(
            f"{path}: the network is taken from {prefix!r}; {len(others)} other tensors are left "
            f"out ({_some(others)})."
        )
    return found


def _prefix(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: str) -> str:
    """The prefix in front of most of the model's names; the shortest of several."""
    count: Counter[str] = Counter()
    for key in weights:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in own:
                count[".".join([*parts[:i], ""]).lstrip(".")] += 1
    most = max(count.values(), default=0)
    best = sorted((p for p, n in count.items() if n == most), key=lambda p: (p.count("."), p))
    if "" in best or not best:
        return ""
    if len(best) > 1 and most > len(own) / 2:
        raise ConfigError(
            f"model.checkpoint: {path} holds this network {len(best)} times, under "
            f"{_some(best)}; say which by model.prefix (--prefix)"
        )
    return best[0]


def fit_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    path: str,
    name: str = "",
    settings: Mapping[str, Any] | None = None,
) -> list[str]:
    """Load `weights`; returns the names of a classifier that was left out for its size.

    Args:
        model: Into which.
        weights: A state dict.
        path: Of its file, for messages.
        name: Of the architecture that was asked for.
        settings: Of its training, see `lora_lightning.runner.weights.Checkpoint`.

    Raises:
        ConfigError: keys are missing, left over or of another shape; names the first of them, and
            a likely cause.
    """
    own = model.state_dict()
    heads = tuple(f"{name}." for name in classifier_modules(model))
    other = [k for k, v in weights.items() if k in own and v.shape != own[k].shape]
    dropped = [k for k in other if heads and k.startswith(heads)]
    shapes = [k for k in other if k not in dropped]
    wrong = {
        "of another shape": [
            f"{k} {tuple(weights[k].shape)}, expected {tuple(own[k].shape)}" for k in shapes
        ],
        "missing": [k for k in own if k not in weights],
        "unknown": [k for k in weights if k not in own],
    }
    if any(wrong.values()):
        lines = [f"  {len(k)} {what}: {_some(k)}" for what, k in wrong.items() if k]
        cause = _cause(own, weights, shapes, name, (settings or {}).get("model"))
        raise ConfigError(
            f"model.checkpoint: {path} does not fit {type(model).__name__}:\n"
            + "\n".join(lines)
            + f"\n{cause}"
        )
    keep = {k: (own[k] if k in dropped else v) for k, v in weights.items()}
    model.load_state_dict(keep, strict=True)
    return dropped


def _cause(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    shapes: list[str],
    name: str,
    trained: Any,
) -> str:
    """What may have gone wrong, and what to do."""
    if any(".lora_" in k for k in weights):
        return "it holds the factors of an adapter: give the weights of its base"
    if trained and name and trained != name:
        return f"the file says that it was trained as {trained}: give that as the model's name"
    shared = own.keys() & weights.keys()
    if not shared:
        return (
            "no name is shared: it was saved from another architecture, or by another library; "
            "check that model.name is the architecture that the file was saved from"
        )
    if shapes and all("pos" in k for k in shapes) and len(shared) == len(own):
        return "it was trained on pictures of another size: give that (data.size, --size)"
    if shapes and len(shared) == len(own):
        return "the names are this architecture's, the sizes another's: a larger or smaller variant"
    return "check that model.name is the architecture that the file was saved from"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (" …" if len(keys) > 4 else "")
