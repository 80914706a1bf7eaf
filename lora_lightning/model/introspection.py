"""Introspection of a model: its own tensors, its classifier, its outermost blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from torch import nn

from lora_lightning.lora import layers
from lora_lightning.lora.module_tree import Modules, find, join, walk
from lora_lightning.model.family_tables import TORCHAUDIO_HEADS
from lora_lightning.model.patterns import matches
from lora_lightning.model.view import View

_HEAD_NAMES = frozenset(
    ("head", "heads", "fc", "classifier", "last_linear", "logits", "head_dist", "pre_classifier")
)


def classifier_modules(model: nn.Module | View) -> set[str]:
    """Paths of the final classifier's layers; empty where the model ends without one.

    Taken from the model where it knows them (timm's ``get_classifier`` and ``pretrained_cfg``) or
    looked up for a family of torchaudio, else the last adaptable layer under a customary name
    (``head``, ``fc``, ``classifier`` …) or, failing that, at the very end and outside every list
    of blocks.
    """
    view = View.of(model)
    model, modules = view.model, view.modules
    for prefix, module in modules:
        if callable(getattr(module, "get_classifier", None)):
            inside = modules if module is model else walk(module)
            return {join(prefix, name) for name in _timm_classifier(module, inside)}
        found = {join(prefix, name) for name in _torchaudio_head(module)}
        if found or (not prefix and below(module, "torchaudio.models")):
            return found  # an encoder on its own has no head; inside a model, that may have one
    ordered = [n for n, m in modules if layers.tensors_of(m)]
    for name, _ in model.named_children():
        under = [n for n in ordered if n == name or n.startswith(f"{name}.")]
        if name in _HEAD_NAMES and under:
            return {under[-1]}
    blocks = tuple(f"{block}." for block in block_list(model))
    last = ordered[-1:]
    return {
        n
        for n in last
        if n  # a model that is one layer has no head
        and isinstance(find(model, n), nn.Linear)
        and n.count(".") < 2
        and not n.startswith(blocks or ("\0",))
    }


def _timm_classifier(model: Any, modules: Modules) -> Iterable[str]:
    try:
        found = model.get_classifier()
    except (AttributeError, NotImplementedError):
        found = None
    if isinstance(found, dict):
        found = list(found.values())
    found = list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    heads = {id(m) for f in found if isinstance(f, nn.Module) for m in f.modules()}
    cfg = getattr(model, "pretrained_cfg", None) or {}
    declared = cfg.get("classifier") or ()
    declared = (declared,) if isinstance(declared, str) else tuple(declared)
    return {n for n, m in modules if m._parameters and (id(m) in heads or n in declared)}


def _torchaudio_head(module: nn.Module) -> Iterable[str]:
    patterns = TORCHAUDIO_HEADS.get(below(module, "torchaudio.models"), ())
    weighted = [n for n, m in walk(module) if n and m._parameters] if patterns else []
    for pattern in patterns:
        yield from [n for n in weighted if matches(pattern, n)][-1:]


def below(module: nn.Module, package: str) -> str:
    """Where in `package` the module's class is defined; empty where it is not from there."""
    where = layers.base_class(module).__module__
    return where.removeprefix(f"{package}.") if where.startswith(f"{package}.") else ""


def block_list(model: nn.Module) -> list[str]:
    """Paths of the outermost blocks: ViT's ``blocks.*``, Swin's ``layers.*``, ResNet's ``layer*``.

    The shallowest list (or series of numbered siblings) that holds at least half of the
    adaptable weights, no single member holding nearly all of them. Empty where there is none.
    """
    sizes = _layer_sizes(model)
    total = sum(sizes.values()) or 1
    best: tuple[int, float, list[str]] | None = None
    for name, module in walk(model):
        for members in _series(name, module):
            shares = [_share(sizes, member) / total for member in members]
            depth = members[0].count(".")
            if sum(shares) < 0.5 or max(shares) > 0.9:
                continue
            if best is None or (depth, -sum(shares)) < best[:2]:
                best = (depth, -sum(shares), members)
    return best[2] if best else []


def _series(name: str, module: nn.Module) -> Iterable[list[str]]:
    children = list(module._modules)
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        if len(children) > 1:
            yield [join(name, child) for child in children]
        return
    numbered = [(m[1], c) for c in children if (m := re.fullmatch(r"(.*?[a-zA-Z_])\d+", c))]
    for _, group in groupby(numbered, key=lambda pair: pair[0]):
        members = [join(name, child) for _, child in group]
        if len(members) > 1:
            yield members


def _layer_sizes(model: nn.Module) -> dict[str, int]:
    sizes = {}
    for name, module in walk(model):
        # A large head is not a list of blocks.
        if layers.tensors_of(module) and not _HEAD_NAMES.intersection(name.split(".")):
            own = module._parameters.values()
            sizes[name] = sum(p.numel() for p in own if p is not None)
    return sizes


def _share(sizes: dict[str, int], member: str) -> int:
    return sum(size for n, size in sizes.items() if n == member or n.startswith(f"{member}."))
