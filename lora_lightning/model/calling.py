"""From a batch to a call of a model: one rule for all code that runs a user's batch.

- A *tensor* is the one argument.
- A *mapping* holds keyword arguments: of its keys those that the model's ``forward`` names, all of
  them where it takes ``**kwargs``. A ``forward`` of one argument that no key names, as in
  ``forward(self, batch)``, gets the mapping itself.
- A *tuple or list* holds arguments in order: as many of its first entries as ``forward``
  requires, one at least, and all where it takes ``*args``. Of Lightning's (inputs, targets) a
  classifier so gets the inputs. One that begins with a mapping counts as that mapping, and one
  that begins with a list of the tensors that are required, two or more, as that list.

A LightningModule whose forward takes only ``*args`` or ``**kwargs`` is given what the network that
is adapted in it takes; where it has no forward, that network is called. Tensors are moved to the
model's device. For calls that this rule gets wrong (an argument with a default, given by position;
a batch of another class) there is ``forward=``, accepted wherever a model is run: a function from
(model, batch) that runs the model.

A classifier's *logits* are its output, or what that holds as ``logits``; see `logits_of`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.lora.module_tree import unwrapped

Forward = Callable[[nn.Module, Any], Any]  # from (model, batch); runs the model
Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

_OF_TENSORS = {
    3: "model(x).mean(1) for frames (items, frames, classes)",
    4: "model(x).mean((2, 3)) for maps (items, classes, rows, columns)",
}
_LOG_ODDS = (
    "torch.nn.functional.pad(model(x).view(-1, 1), (1, 0)) for the log-odds of the second of two "
    "classes; a regression has none"
)


def call(model: nn.Module, batch: Any, network: nn.Module | None = None) -> Any:
    """Run a model on a batch; its output.

    Args:
        model: What is called.
        batch: A batch.
        network: The part of it to which a forward of only ``*args`` or ``**kwargs`` hands them on;
            then those that this part takes are given.

    Raises:
        DataError: the batch is of a type that the rule above does not cover.
    """
    if network is None or not _hands_on(_parameters(unwrapped(model).forward)):
        network = model
    args, kwargs = call_of(network, batch)
    try:
        return model(*args, **kwargs)
    except Exception as error:
        if not (args and isinstance(args[0], Mapping)):
            raise
        raise DataError(
            f"{type(model).__name__}.forward names none of the batch's keys "
            f"({', '.join(map(repr, args[0]))}), was given the whole batch and failed "
            f"({type(error).__name__}: {error}). Pass forward=, a function from (model, batch)"
        ) from error


def call_of(model: nn.Module, batch: Any, forward: Forward | None = None) -> Call:
    """The arguments that the model is called with for this batch.

    With `forward` the model runs once, without gradients, to record its arguments.

    Raises:
        DataError: the batch is of a type that the rule above does not cover, or `forward` never
            calls the model.
    """
    if forward is not None:
        return _recorded(model, batch, forward)
    model = unwrapped(model)
    parameters = _parameters(model.forward)
    batch = _inputs_of((batch,) if isinstance(batch, Tensor) else batch, parameters)
    if isinstance(batch, Mapping):
        found = _named(batch, parameters)
    elif isinstance(batch, (tuple, list)) and batch:
        found = _in_order(batch, parameters)
    else:
        raise DataError(
            f"a batch must be a tensor, a tuple that begins with one or a mapping; got "
            f"{type(batch).__name__}. Pass forward=, a function from (model, batch)"
        )
    device = next((p.device for p in model.parameters()), None)
    return moved(found, device)  # type: ignore[no-any-return]


def moved(batch: Any, device: torch.device | None) -> Any:
    """A batch with its tensors on this device; None: where they are."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)


def items_in(batch: Any) -> int:
    """The number of items in a batch, by the first dimension of its first tensor; else 0."""
    return next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), 0)


def classifier(model: nn.Module, forward: Callable[..., Any] | None) -> Callable[[Any], Tensor]:
    """The model as a function from a batch of inputs to logits (B, K).

    Args:
        model: What is called.
        forward: From (model, batch), or from the batch alone, to logits; None: the rule above.
    """
    if forward is None:
        return lambda batch: logits_of(call(model, batch))
    given = forward.forward if isinstance(forward, nn.Module) else forward
    if sum(p.kind in _POSITIONAL for p in _required(_parameters(given))) < 2:
        return lambda batch: logits_of(forward(batch))
    return lambda batch: logits_of(forward(model, batch))


def logits_of(output: Any) -> Tensor:
    """The logits (B, K) in a classifier's output: itself, its key or attribute "logits".

    Raises:
        ConfigError: they are not there; says how to give them.
    """
    mapping = isinstance(output, Mapping)
    found = output.get("logits") if mapping else getattr(output, "logits", output)
    if isinstance(found, Tensor) and found.ndim == 2 and found.shape[1] > 1:
        return found
    what, way = f"a {type(output).__name__}", "model(x).one_of_its_attributes"
    if isinstance(found, Tensor):
        what = f"shape {tuple(found.shape)}"
        way = _OF_TENSORS.get(found.ndim, _LOG_ODDS)
    elif mapping:
        what += f" of {', '.join(map(repr, output))}"
        way = f"model(x)[{next(iter(output), '')!r}]"
    elif isinstance(output, (tuple, list)):
        way = "model(x)[0] for a model that returns more"
    raise ConfigError(
        f"the model must give logits (items, classes), as a tensor or as `logits`; got {what}. "
        "Give forward=, a function to them from (model, inputs) or inputs alone, such as "
        f"forward=lambda x: {way}"
    )


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # TorchScript's have none
        kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_KEYWORD
        return [inspect.Parameter("input", kind) for kind in kinds]


def _hands_on(parameters: list[inspect.Parameter]) -> bool:
    return _takes_all(parameters) or all(p.kind is p.VAR_KEYWORD for p in parameters)


def _takes_all(parameters: list[inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _required(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    kinds = (*_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)
    return [p for p in parameters if p.kind in kinds and p.default is p.empty]


def _inputs_of(batch: Any, parameters: list[inspect.Parameter]) -> Any:
    """The first entry of a tuple or list that holds all inputs; else the batch."""
    if not isinstance(batch, (tuple, list)) or not batch:
        return batch
    first, rest = batch[0], batch[1:]
    if isinstance(first, Mapping):
        return first
    # As many images as targets are two lists: a detector's.
    if not isinstance(first, (tuple, list)) or any(isinstance(x, (tuple, list)) for x in rest):
        return batch
    count = len(_required(parameters))
    several = len(first) >= count > 1 and all(isinstance(x, Tensor) for x in first[:count])
    return first if several else batch


def _in_order(batch: tuple[Any, ...] | list[Any], parameters: list[inspect.Parameter]) -> Call:
    if _takes_all(parameters):
        return tuple(batch), {}
    required = _required(parameters)
    taken = tuple(batch[: max(1, len(required))])
    if len(taken) < len(required):
        raise DataError(
            f"the model's forward requires {', '.join(p.name for p in required)}, of which this "
            f"batch gives {len(taken)}. Give a mapping of them by name, or pass forward=, a "
            "function from (model, batch)"
        )
    by_name = [p.name for p in required if p.kind is p.KEYWORD_ONLY]
    first = len(required) - len(by_name) if by_name else len(taken)
    return taken[:first], dict(zip(by_name, taken[first:], strict=False))


def _named(batch: Mapping[Any, Any], parameters: list[inspect.Parameter]) -> Call:
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return (), dict(batch)
    names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    found = {key: value for key, value in batch.items() if key in names}
    if not found and len(parameters) == 1 and parameters[0].kind in _POSITIONAL:
        return (batch,), {}
    if not found:
        raise DataError(
            f"a batch that is a mapping holds the model's keyword arguments, {', '.join(names)}; "
            f"this one has {', '.join(map(repr, batch)) or 'no key'}. Pass forward=, a function "
            "from (model, batch)"
        )
    return (), found


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
