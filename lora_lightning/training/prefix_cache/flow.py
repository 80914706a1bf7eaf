"""Which results of a prefix's calls are used beyond it: dataflow, watched operator by operator.

A result that only goes into other calls of the prefix is not needed once those are replaced; one
that reaches anything else is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lora_lightning.errors import ConfigError
from lora_lightning.model.probing import floats
from lora_lightning.training.prefix_cache.calls import (
    Call,
    InOrder,
    Leaf,
    intercepted,
    storage,
    storages,
)
from lora_lightning.training.prefix_cache.chance import generators
from lora_lightning.training.prefix_cache.inputs import Inputs
from lora_lightning.training.prefix_cache.items import sort
from lora_lightning.training.prefix_cache.observers import left

_SEEDED = torch.Tag.nondeterministic_seeded
_RANDOM = 1  # the label of numbers that were drawn around the calls


class _Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows labels from operator to operator, in whatever storage they are."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs = inputs
        self.labels: dict[int, int] = {}
        self.alive: list[Tensor] = []  # a storage that is freed would lend its name to another
        self.used = 0
        self.order: InOrder | None = None

    def of(self, values: Any) -> int:
        """The labels that these values carry."""
        found = 0
        for name in storages(values):
            found |= self.labels.get(name, 0)
        return found

    def mark(self, values: Any, label: int) -> None:
        """These values depend on what `label` stands for."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                self.labels[storage(tensor)] = self.labels.get(storage(tensor), 0) | label
                self.alive.append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        order = self.order
        if order is None or order.inside:
            return func(*args, **(kwargs or {}))
        labels = self.of((args, kwargs))
        over = order.at == len(order.calls)
        if over or func is torch.ops.aten._local_scalar_dense.default:
            self.used |= labels
        # An operator that may draw need not: dropout in attention may be 0.
        before = generators(self.inputs) if _SEEDED in func.tags else None
        out = func(*args, **(kwargs or {}))
        if before is not None and generators(self.inputs) != before:
            labels |= _RANDOM
        if labels:
            self.mark(out, labels)
        return out


def mark_used(root: nn.Module, inputs: Inputs, calls: list[Call]) -> list[Call]:
    """The calls that are worth replacing, each value in what they return kept or not.

    Values that are not floating-point (lengths, masks, codes) are small and steer what comes
    after: they are kept in any case.
    """
    flow = _Flow(inputs)
    labels = 1  # _RANDOM has bit 0

    def handle(call: Call, forward: Any, args: Any, kwargs: Any) -> Any:
        nonlocal labels
        call.uses = flow.of((args, kwargs))
        if call.uses & _RANDOM:
            raise ConfigError(
                f"PrefixCache: what {call.path} is given is random: numbers are drawn for it in "
                "the forward of a module around it (dropout by function?). Draw them behind the "
                "first trained layer, or leave PrefixCache out"
            )
        leaves, spec = tree_flatten(forward(*args, **kwargs))
        # Copies, so that a value that is changed or passed on later is not taken for another.
        leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        for value in leaves:
            call.leaves.append(_leaf(value, 1 << labels))
            flow.mark([value], 1 << labels)
            labels += 1
        return tree_unflatten(leaves, spec)

    flow.order = InOrder(calls, handle)
    args, kwargs = inputs.call()
    with torch.no_grad(), intercepted({c.module for c in calls}, flow.order), flow:
        out = root.forward(*args, **kwargs)
    if flow.order.at < len(calls):
        raise flow.order.astray("the forward ended")
    kept = [x for module in root.modules() for x, _ in left(module)]  # for someone to read
    used = flow.used | flow.of(out) | flow.of(list(floats(out))) | flow.of(kept)
    return _trimmed(calls, used)


def _leaf(value: Any, label: int) -> Leaf:
    tensor = isinstance(value, Tensor)
    size = value.nbytes if tensor else 0
    return Leaf(tensor and not value.is_floating_point(), label, size, sort(value))


def _trimmed(calls: list[Call], used: int) -> list[Call]:
    """Without cheap calls at the end, where less has to be stored for it.

    Of a block whose first adapted layer comes after its norm, the block's input is stored and
    not the normed input as well.
    """
    options = []
    for end in range(len(calls), 0, -1):
        needed = used
        for call in reversed(calls[end:]):  # is computed: what it was given is needed
            if any(leaf.label & needed for leaf in call.leaves):
                needed |= call.uses
        leaves = [leaf for call in calls[:end] for leaf in call.leaves]
        stored = sum(leaf.nbytes for leaf in leaves if leaf.kept or leaf.label & needed)
        options.append((stored, -end, needed))
        if not calls[end - 1].cheap:
            break
    if not options:
        return []
    _, cut, needed = min(options)
    chosen = calls[:-cut]
    for leaf in (leaf for call in chosen for leaf in call.leaves):
        leaf.kept |= bool(leaf.label & needed)
    return chosen
