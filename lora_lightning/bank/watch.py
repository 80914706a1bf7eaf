"""Hooks that record uses of tensors, and inputs and outputs of modules, in one run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_lightning.bank.layout import Seen
from lora_lightning.bank.mix import Mix
from lora_lightning.bank.tensor import ITEMS_FIRST, name_of
from lora_lightning.linalg.torch_settings import forked_rng
from lora_lightning.model.calling import Call


@dataclass
class Use:
    """One use of a tensor in one run."""

    seen: Seen | None
    problem: str
    inside: frozenset[str]  # the modules that were running
    items_first: bool  # whether the items must lie in the first dimension


@dataclass
class Crossing:
    """One call of a module in one run: fingerprints of its inputs and outputs."""

    inputs: list[Any]
    outputs: list[Any] = field(default_factory=list)


@dataclass
class Watch:
    """The records of one run of a model with n items."""

    n: int
    uses: dict[str, list[Use]] = field(default_factory=lambda: defaultdict(list))
    calls: dict[str, list[Crossing]] = field(default_factory=lambda: defaultdict(list))
    running: list[str] = field(default_factory=list)

    def use(self, mix: Mix, func: Any, x: Tensor | None) -> None:
        """Record the use of a tensor of the bank."""
        problem = "" if x is not None else f"it is used by {name_of(func)}"
        seen = None if x is None else Seen.of(x, self.n)
        use = Use(seen, problem, frozenset(self.running), func in ITEMS_FIRST)
        self.uses[mix.path].append(use)

    @contextmanager
    def crossings(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within the block calls of these modules are recorded."""
        handles = [h for path, m in modules.items() for h in self._hooks(path, m)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, path: str, module: nn.Module) -> list[Any]:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.running.append(path)
            self.calls[path].append(Crossing(self._seen((args, kwargs))))

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.running.remove(path)
            self.calls[path][-1].outputs = self._seen(output)

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    def _seen(self, tree: Any) -> list[Any]:
        leaves = tree_leaves(tree)
        return [Seen.of(leaf, self.n) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


@torch.no_grad()
def run(model: nn.Module, call: Call) -> None:
    """Run the model for its side effects on hooks."""
    args, kwargs = call
    with forked_rng(0):
        model(*args, **kwargs)
