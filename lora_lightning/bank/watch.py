"""Running a model to see what goes where, and noting it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lora_lightning.bank.layout import Seen
from lora_lightning.bank.mix import Mix
from lora_lightning.bank.tensor import name_of
from lora_lightning.errors import AdapterError

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Use:
    """One use of a tensor in one run."""

    seen: Seen | None
    problem: str
    inside: frozenset[str]  # the modules that were running


@dataclass
class Crossing:
    """One call of a module in one run: what went in, and what came out."""

    inputs: list[Seen | None]
    outputs: list[Seen | None] = field(default_factory=list)


@dataclass
class Watch:
    """What is noted in one run of a model with n items."""

    n: int
    uses: dict[str, list[Use]] = field(default_factory=lambda: defaultdict(list))
    calls: dict[str, list[Crossing]] = field(default_factory=lambda: defaultdict(list))
    running: list[str] = field(default_factory=list)

    def use(self, mix: Mix, func: Any, x: Tensor | None) -> None:
        """A tensor of the bank is used."""
        problem = "" if x is not None else f"it is used by {name_of(func)}"
        seen = None if x is None else Seen.of(x, self.n)
        self.uses[mix.path].append(Use(seen, problem, frozenset(self.running)))

    @contextmanager
    def crossings(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within the block calls of these modules are noted."""
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

    def _seen(self, tree: Any) -> list[Seen | None]:
        leaves = tree_leaves(tree)
        return [Seen.of(leaf, self.n) if isinstance(leaf, Tensor) else None for leaf in leaves]


# ---- the four runs ---------------------------------------------------------------------------


def item_dim(x: Any, n: int, dim: int) -> int | None:
    """Along which dimension an input of the model holds items: `dim`, else the first that can."""
    if not isinstance(x, Tensor):
        return None
    dims = [dim, *range(x.dim())]
    return next((d for d in dims if d < x.dim() and x.shape[d] == n), None)


def four_calls(call: Call, n: int, dim: int) -> list[tuple[Call, int]]:
    """The call as it is, with its last item once more, with the first and the last changed."""

    def more(x: Any) -> Any:
        d = item_dim(x, n, dim)
        return x if d is None else torch.cat([x, x.narrow(d, n - 1, 1)], d)

    return [
        (call, n),
        (tree_map(more, call), n + 1),
        (_moved(call, 0, n, dim), n),
        (_moved(call, n - 1, n, dim), n),
    ]


def _moved(call: Call, item: int, n: int, dim: int) -> Call:
    """The call with other values in one item, where that can be done without breaking a rule."""
    generator = torch.Generator().manual_seed(item)

    def move(x: Any) -> Any:
        d = item_dim(x, n, dim)
        if d is None or x.dim() < 2 or x.dtype == torch.bool:
            return x  # lengths, masks
        x = x.clone()
        one = x.select(d, item)
        if x.is_floating_point() or x.is_complex():
            noise = torch.randn(one.shape, generator=generator, dtype=one.dtype).to(one.device)
            one += noise * (one.std(correction=0) + 1e-2)
        else:  # tokens: those that are there, in another order
            one.copy_(one.flatten().roll(1).view(one.shape))
        return x

    return tree_map(move, call)  # type: ignore[no-any-return]


def run(model: nn.Module, call: Call) -> None:
    """Run the model for what it does on the way."""
    args, kwargs = call
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        torch.manual_seed(0)
        model(*args, **kwargs)


def items_of(call: Call, dim: int) -> int:
    """How many items a call of the model has, by its first input."""
    for leaf in tree_leaves(call):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[dim if leaf.dim() > dim else 0]
    raise AdapterError("the model is called with no tensor that could hold a batch of items")
