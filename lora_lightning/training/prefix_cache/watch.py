"""Is what comes before the cut frozen and free of noise, and is it still what it was?"""

from __future__ import annotations

import random
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_lightning.lora.adapted_module import AdaptedModule
from lora_lightning.lora.module_tree import Modules, join

_PLAIN = (int, float, str, tuple, type(None), torch.dtype)  # bool is an int
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")


def obstacle(module: nn.Module) -> str:
    """Why features behind this module cannot be stored; "" where they can."""
    attention = isinstance(module, nn.MultiheadAttention)  # which calls none of its children
    own = module.parameters() if attention else module._parameters.values()
    factors = module.lora.parameters() if isinstance(module, AdaptedModule) else ()
    if any(p is not None and p.requires_grad for p in (*own, *factors)):
        return "is trained"
    return "has a hook, and whoever looks there wants to see features" if _hooks(module) else ""


def _hooks(module: nn.Module) -> int:
    """How many look at what a module is given or gives; torch's own, for weights, left out."""
    return len(module._forward_pre_hooks) - len(_torchs(module)) + len(module._forward_hooks)


def _torchs(module: nn.Module) -> dict[int, Any]:
    hooks = module._forward_pre_hooks.items()
    return {i: h for i, h in hooks if type(h).__module__.startswith("torch.nn.utils")}


@contextmanager
def silenced(modules: list[nn.Module]) -> Iterator[None]:
    """Within the block nobody looks at these modules: a trial forward is none of their business."""
    kept = [(m, m._forward_hooks, m._forward_pre_hooks) for m in modules if _hooks(m)]
    for module, _, _ in kept:
        module._forward_pre_hooks = OrderedDict(_torchs(module))
        module._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for module, after, before in kept:
            module._forward_hooks, module._forward_pre_hooks = after, before


def noise(before: Modules, around: Modules) -> str:
    """What is random or moves in modules before a cut, and around it; "" where nothing is."""
    for path, module in around:
        if any(vars(module).get(name) is True for name in _CHECKPOINTING):
            return f"activations of {path or 'the model'} are checkpointed: switch that off"
        if module.training and vars(module).get("layer_drop"):
            return f"{join(path, 'layer_drop')} drops whole layers at random: set it to 0"
    for path, module in before:
        dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        rate = vars(module).get("p" if dropout else "drop_prob")
        why = f"drops with probability {rate:g}" if rate else ""
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            why = "is in training mode: its statistics move"
        if why and module.training:
            return (
                f"{path} ({type(module).__name__}) {why}, so that features differ each time. "
                "PrefixCache(eval_prefix=True) keeps that part in eval mode while training"
            )
    return ""


@contextmanager
def aside() -> Iterator[None]:
    """Random numbers drawn within the block leave the generators as they are, errors or not."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = [torch.cuda.current_device()] if used else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class Watch:
    """Notes weights, classes, hooks and adapters of modules, and attributes of those `before`."""

    def __init__(self, before: list[nn.Module], around: list[nn.Module]):
        self._before, self._all, self._root = before, [*before, *around], around[0]
        self._structure, self._versions = self._now()
        self._sums, self._differs = self._checksums(), False

    def changed(self, look: bool = False) -> bool:
        """Whether anything is another; `look` at values, for writes through ``.data``, too."""
        structure, versions = self._now()
        if structure != self._structure:
            return True
        if look or versions != self._versions:  # the same values once more are no change
            self._versions, self._differs = versions, self._checksums() != self._sums
        return self._differs

    def _frozen(self) -> list[Tensor]:
        tables = (t for m in self._all for t in (m._parameters, m._buffers))
        return [x for t in tables for x in t.values() if x is not None and not x.requires_grad]

    def _now(self) -> tuple[Any, Any]:
        tensors, named = self._frozen(), [i for m in self._before for i in vars(m).items()]
        plain = [(n, x) for n, x in named if isinstance(x, _PLAIN) and n != "training"]
        modules = [
            (
                type(m),
                m is not self._root and _hooks(m),
                m.__dict__.get("lora_active"),
                tuple(m._modules.values()),
            )
            for m in self._all
        ]
        structure = plain, modules, [(x.dtype, x.device, x.shape) for x in tensors]
        versions = [0 if x.is_inference() else x._version for x in tensors]
        return structure, (versions, [(id(x), x.data_ptr()) for x in tensors])

    def _checksums(self) -> list[int]:
        rows = (x.detach().cpu().contiguous().reshape(-1) for x in self._frozen())
        return [zlib.crc32(bytes(x.view(torch.uint8).numpy())) for x in rows]
