"""`View`: the modules and tensors of a model, collected once for an operation."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lora_lightning.errors import AdapterError
from lora_lightning.lora.adapted_module import AdaptedModule
from lora_lightning.lora.merging import is_merged
from lora_lightning.lora.module_tree import Children, Modules, unwrapped, walk
from lora_lightning.lora.precision import is_quantised
from lora_lightning.lora.sharding import ELSEWHERE, check_whole

Marks = tuple[dict[str, str], dict[str, str]]


class View:
    """The modules and tensors of a model, collected once, as traversal dominates a switch's cost.

    A view is made for one operation and passed on within it. Its modules, tensors and parameters
    stay the same objects while adapters are added, switched and removed; which layers are adapted
    or merged is read from the modules each time. After merging, unmerging or a new module or
    parameter the tensors are others: make another view.

    Factors are not part of it, so that its cost does not grow with the number of adapters.
    """

    def __init__(self, model: nn.Module):
        self.model = unwrapped(model)

    @classmethod
    def of(cls, model: nn.Module | View) -> View:
        """The view itself, or a new one of a model."""
        return model if isinstance(model, View) else cls(model)

    @cached_property
    def modules(self) -> Modules:
        """(dotted path, module) of every module of the base, as `walk` finds them."""
        return walk(self.model, _base_children)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Name → every parameter and persistent buffer of the base; tied ones under each name."""
        found: dict[str, Tensor] = {}
        for path, module in self.modules:
            parameters, buffers = module._parameters, module._buffers
            if not (parameters or buffers):
                continue
            prefix = f"{path}." if path else ""
            for name, parameter in parameters.items():
                if parameter is not None:
                    found[prefix + name] = parameter
            for name, buffer in buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    found[prefix + name] = buffer
        return found

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters among `tensors`."""
        return {n: p for n, p in self.tensors.items() if isinstance(p, nn.Parameter)}

    @cached_property
    def structure(self) -> int:
        """A hash of the parameters' names and identities."""
        return hash(tuple((n, id(p)) for n, p in self.parameters.items()))

    @cached_property
    def marks(self) -> dict[tuple[tuple[str, ...], tuple[str, ...]], Marks]:
        """Hashes of the source, see `source_marks`, for whoever compares it with many files."""
        return {}

    def check_whole(self, what: str, instead: str = ELSEWHERE) -> None:
        """Raise `AdapterError` where weights are sharded, see `lora_lightning.lora.sharding`."""
        check_whole(self.modules, what, instead)

    @property
    def quantised(self) -> list[str]:
        """Paths of the adapted layers whose own weights are quantised."""
        return [
            path
            for path, layer in self.adapted.items()
            if any(map(is_quantised, layer._parameters.values()))
        ]

    def check_unmerged(self, before: str) -> None:
        """Raise `AdapterError` where the model is merged; before: what is to be done."""
        if self.merged:
            raise AdapterError(f"the model is merged; call unmerge(model) before {before}")

    def check_floating(self) -> None:
        """Raise `AdapterError` where W + s·BA cannot take the place of W, which is quantised."""
        if quantised := self.quantised:
            raise AdapterError(
                f"the weights of {len(quantised)} adapted layers ({quantised[0]} …) are quantised, "
                "and W + s·BA would have to be rounded to them, which loses most of BA: keep the "
                "adapter beside the base, or merge it into the base from before quantising "
                "(load_adapter with check='structure') and quantise that"
            )

    @property
    def adapted(self) -> dict[str, Any]:
        """Path → module of every layer with factors (none while merged)."""
        return {n: m for n, m in self.modules if isinstance(m, AdaptedModule)}

    @property
    def merged(self) -> dict[str, nn.Module]:
        """Path → module of every layer that holds merged weights."""
        return {n: m for n, m in self.modules if is_merged(m)}


def _base_children(module: nn.Module) -> Children:
    if isinstance(module, AdaptedModule):
        return {name: child for name, child in module._modules.items() if name != "lora"}
    return module._modules
