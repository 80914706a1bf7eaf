"""Target selection: from patterns to tensors of a model.

`target_modules` takes the patterns of `lora_lightning.model.patterns` and two keywords: ``"auto"``,
the family's table or else a rule by structure, never the classifier; and ``"all"``, every
adaptable layer except those trained in full. A pattern that matches no layer is tried on bare
parameters (``"pos_embed"``); one that matches nothing at all is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lora_lightning.errors import TargetError
from lora_lightning.lora import layers
from lora_lightning.lora.adapted_module import raw_tensor
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.module_tree import every_name, find
from lora_lightning.lora.precision import is_quantised
from lora_lightning.model import families
from lora_lightning.model.introspection import block_list, classifier_modules
from lora_lightning.model.left_out import reason
from lora_lightning.model.patterns import KEYWORDS, Target, matches
from lora_lightning.model.view import View


def select(model: nn.Module | View, config: LoRAConfig) -> list[Target]:
    """The tensors of `model` that `config` adapts, in the model's own order.

    Raises:
        TargetError: a pattern matches nothing, a block index does not exist, nothing is left
            after the exclusions, or something named cannot be adapted (with the reason).
    """
    view = View.of(model)
    chosen: dict[str, Target] = {}
    for pattern in config.target_modules:
        keyword = pattern in KEYWORDS
        found = _keyword(view, pattern, config) if keyword else _named(view, pattern)
        chosen |= {target.path: target for target in found}
    _check_exclusions(view, config.exclude_modules)
    left = config.exclude_modules
    chosen = {path: t for path, t in chosen.items() if not any(map(t.hit_by, left))}
    if config.blocks is not None:
        prefixes = _block_prefixes(view.model, config.blocks)
        chosen = {p: t for p, t in chosen.items() if p.startswith(prefixes)}
    if not chosen:
        raise TargetError(
            f"no layer is left to adapt: target_modules={config.target_modules}, "
            f"exclude_modules={config.exclude_modules}, blocks={config.blocks}"
        )
    order = {name: i for i, (name, _) in enumerate(view.modules)}
    targets = sorted(chosen.values(), key=lambda t: (order[t.name], t.tensor))
    _refuse(targets)
    return targets


def trainable_names(view: View, patterns: Iterable[str]) -> list[str]:
    """Names of the parameters that `trainable` selects, whether they are adapted or not.

    Raises:
        TargetError: a name or pattern matches no module and no parameter.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = set(_trainable(view, pattern))
        if not found and pattern not in ("head", "norms", "biases"):
            raise TargetError(
                f"trainable: {pattern!r} matches no module and no parameter{_near(pattern, view)}"
            )
        chosen |= found
    if packed := [n for n in view.parameters if n in chosen and is_quantised(view.parameters[n])]:
        raise TargetError(
            f"{packed[0]} is quantised and cannot be trained in full: pass trainable=[] (the "
            "factors alone), or leave it out when you quantise (torchao: filter_fn)"
        )
    return [n for n in view.parameters if n in chosen]


def _trainable(view: View, pattern: str) -> Iterable[str]:
    parameters = list(view.parameters)
    if pattern == "head":
        heads = classifier_modules(view)
        return [p for p in parameters if any(p.startswith(f"{h}.") or not h for h in heads)]
    if pattern == "biases":
        return [p for p in parameters if p.split(".")[-1].startswith("bias")]
    if pattern == "norms":
        named = [(n, m) for n, m in view.modules if "Norm" in type(m).__name__]
        # A norm holds no adaptable layer; timm's `NormMlpClassifierHead` does.
        hit = [n for n, m in named if not any(map(layers.tensors_of, m.modules()))]
    else:
        hit = [n for n, m in view.modules if n and matches(pattern, n, m)]
    prefixes = tuple(f"{n}." for n in hit)
    return [p for p in parameters if p.startswith(prefixes) or matches(pattern, p)]


def _keyword(view: View, keyword: str, config: LoRAConfig) -> list[Target]:
    every = list(_layers(view))
    if keyword == "all":
        whole = set(trainable_names(view, config.trainable))
        found = [t for t in every if t.path not in whole]
    else:
        heads = classifier_modules(view)
        found = [t for t in families.auto(view, every) if t.name not in heads]
    if not found:
        raise TargetError(
            f'target_modules="{keyword}" finds no adaptable layer in {type(view.model).__name__}; '
            "name the modules to adapt"
        )
    return found


def _named(view: View, pattern: str) -> list[Target]:
    found = [t for t in _layers(view) if matches(pattern, t.name, t.module)]
    found = found or _by_alias(view, pattern)
    found = found or [t for t in _bare(view) if matches(pattern, t.path)]
    if found:
        return found
    other = [n for n, m in view.modules if n and matches(pattern, n, m)]
    reasons = {n: why for n in other if (why := reason(view.model.get_submodule(n)))}
    if reasons:
        first = next(iter(reasons))
        raise TargetError(
            f"target_modules: {pattern!r} matches {len(reasons)} layers that cannot be adapted "
            f"(first: {first}, {reasons[first]})"
        )
    if other:
        kinds = sorted({type(find(view.model, n)).__name__ for n in other})
        raise TargetError(
            f"target_modules: {pattern!r} matches only modules without a weight of their own to "
            f"adapt ({', '.join(kinds)}; first: {other[0]}). For the layers inside write "
            f"{other[0] + '.*'!r}; to train them in full, list them in `trainable`"
        )
    raise TargetError(f"target_modules: {pattern!r} matches nothing{_near(pattern, view)}")


def _by_alias(view: View, pattern: str) -> list[Target]:
    """Layers of which this is a further name: the module is in several places."""
    names: dict[int, list[str]] = {}
    for name, _, module in every_name(view.model):
        names.setdefault(id(module), []).append(name)
    found = [(t, Target(n, t.module, t.tensor)) for t in _layers(view) for n in names[id(t.module)]]
    return [target for target, alias in found if alias.hit_by(pattern)]


def _layers(view: View) -> Iterable[Target]:
    for name, module in view.modules:
        for tensor in layers.tensors_of(module):
            yield Target(name, module, tensor)


def _bare(view: View) -> Iterable[Target]:
    for name, module in view.modules:
        known = layers.tensors_of(module)
        for tensor, value in module._parameters.items():
            if value is not None and tensor not in known:
                yield Target(name, module, tensor, bare=True)


def _check_exclusions(view: View, patterns: list[str]) -> None:
    names: list[tuple[str, nn.Module | None]] = list(view.modules) if patterns else []
    names += [(n, None) for n in view.parameters] if patterns else []
    for pattern in patterns:
        if not any(matches(pattern, n, m) for n, m in names):
            raise TargetError(f"exclude_modules: {pattern!r} matches nothing{_near(pattern, view)}")


def _refuse(targets: list[Target]) -> None:
    reasons = {}
    for t in targets:
        try:
            weight = raw_tensor(t.module, t.tensor)
        except (KeyError, AttributeError):
            weight = None
        reason = layers.refusal(t.module, t.tensor, weight)
        if reason:
            reasons[t.path] = reason
    if reasons:
        lines = "\n".join(f"  {path}: {reason}" for path, reason in sorted(reasons.items()))
        raise TargetError(
            f"cannot be adapted:\n{lines}\nleave them out with exclude_modules, or do as said"
        )


def _block_prefixes(model: nn.Module, indices: list[int]) -> tuple[str, ...]:
    blocks = block_list(model)
    if not blocks:
        raise TargetError(
            f"blocks={indices}: {type(model).__name__} has no outermost list of blocks to count; "
            "choose by name instead"
        )
    wrong = [i for i in indices if not -len(blocks) <= i < len(blocks)]
    if wrong:
        raise TargetError(
            f"blocks={wrong} do not exist: the model has {len(blocks)} blocks, "
            f"{blocks[0]} … {blocks[-1]}"
        )
    return tuple(f"{blocks[i]}." for i in indices)


def _near(pattern: str, view: View) -> str:
    """The most similar last components of the model's own names, as suggestions."""
    names = {part for n, _ in view.modules if n for part in (n, n.split(".")[-1])}
    near = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    adaptable = sorted({t.name.split(".")[-1] for t in _layers(view)} - {""})
    return f"; adaptable layers end in {', '.join(adaptable[:12])}"


def without_head(
    lora: LoRAConfig, model: nn.Module, targets: Any = None, trainable: Sequence[str] = ()
) -> LoRAConfig:
    """The same adapter, on `targets` if given, without the head: the reference for the features.

    `trainable` is trained in full.
    """
    left = [*lora.exclude_modules, *sorted(classifier_modules(model))]
    named = lora.target_modules if targets is None else targets
    whole = list(trainable)
    return LoRAConfig.make(lora, trainable=whole, exclude_modules=left, target_modules=named)
