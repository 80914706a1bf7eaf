"""How a batch becomes a call of a model: one rule for all code that runs a user's batch.

- A *tensor* is the one argument.
- A *mapping* holds keyword arguments: of its keys those that the model's ``forward`` names, all of
  them where it takes ``**kwargs``.
- A *tuple or list* holds positional arguments: as many of its first entries as ``forward``
  requires, one at least, and all where it takes ``*args`` (a LightningModule's: as many as the
  network that is adapted in it). Of Lightning's (inputs, targets) a
  classifier so gets the inputs. One that begins with a mapping counts as that mapping.

Tensors are moved to the model's device. For calls that this rule gets wrong (an argument with a
default, given by position; a batch of another class) there is ``forward=``, accepted wherever a
model is run: a function from (model, batch) that runs the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lora_lightning.errors import DataError
from lora_lightning.lora.module_tree import unwrapped

Forward = Callable[[nn.Module, Any], Any]  # from (model, batch); runs the model
Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def call(model: nn.Module, batch: Any, network: nn.Module | None = None) -> Any:
    """Run a model on a batch; its output.

    Args:
        model: What is called.
        batch: A batch.
        network: The part of it to which a ``forward(*args)`` of the model hands its arguments on;
            then those that this part takes are given.

    Raises:
        DataError: the batch is of a type that the rule above does not cover.
    """
    if network is None or not _takes_all(_parameters(unwrapped(model).forward)):
        network = model
    args, kwargs = call_of(network, batch)
    return model(*args, **kwargs)


def call_of(model: nn.Module, batch: Any, forward: Forward | None = None) -> Call:
    """The arguments that the model is called with for this batch.

    With `forward` the model runs once, without gradients, to record its arguments.

    Raises:
        DataError: the batch is of a type that the rule above does not cover, or `forward` never
            calls the model.
    """
    if forward is not None:
        return _recorded(model, batch, forward)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Mapping):
        batch = batch[0]
    parameters = _parameters(unwrapped(model).forward)
    if isinstance(batch, Tensor):
        found: Call = ((batch,), {})
    elif isinstance(batch, Mapping):
        found = ((), _named(batch, parameters))
    elif isinstance(batch, (tuple, list)) and batch:
        taken = len(batch) if _takes_all(parameters) else max(1, _required(parameters))
        found = (tuple(batch[:taken]), {})
    else:
        raise DataError(
            f"a batch must be a tensor, a tuple that begins with one or a mapping; got "
            f"{type(batch).__name__}. Pass forward=, a function from (model, batch)"
        )
    device = next((p.device for p in model.parameters()), None)
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, found)  # type: ignore[no-any-return]


def on_inputs(model: nn.Module, forward: Callable[..., Any] | None) -> Callable[[Tensor], Any]:
    """`forward` as a function of the inputs alone, whether it is one or takes (model, inputs)."""
    if forward is None:
        return model
    given = forward.forward if isinstance(forward, nn.Module) else forward
    if _required(_parameters(given)) < 2:
        return forward
    return lambda inputs: forward(model, inputs)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # TorchScript's have none
        kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_KEYWORD
        return [inspect.Parameter("input", kind) for kind in kinds]


def _takes_all(parameters: list[inspect.Parameter]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)


def _required(parameters: list[inspect.Parameter]) -> int:
    return sum(p.kind in _POSITIONAL and p.default is p.empty for p in parameters)


def _named(batch: Mapping[Any, Any], parameters: list[inspect.Parameter]) -> dict[str, Any]:
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(batch)
    names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    found = {key: value for key, value in batch.items() if key in names}
    if not found:
        raise DataError(
            f"a batch that is a mapping holds the model's keyword arguments, {', '.join(names)}; "
            f"this one has {', '.join(map(repr, batch)) or 'no key'}. Pass forward=, a function "
            "from (model, batch)"
        )
    return found


@torch.no_grad()
def _recorded(model: nn.Module, batch: Any, forward: Forward) -> Call:
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        forward(model, batch)
    finally:
        handle.remove()
    if not calls:
        raise DataError("forward= does not call the model: a function from (model, batch) must")
    return calls[0]
