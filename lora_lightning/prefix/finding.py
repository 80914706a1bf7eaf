"""Finding a model's frozen beginning on one batch, and checking that it can be replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.prefix.calls import Beginning, first_calls, silenced
from lora_lightning.prefix.flow import mark_used
from lora_lightning.prefix.inputs import Inputs
from lora_lightning.prefix.items import aside, same
from lora_lightning.prefix.replay import Prefix
from lora_lightning.prefix.watch import Watch, modes, noise, recomputes
from lora_lightning.probe import floats, preserved

_FEW = 2  # items, where rows can be taken out of a batch


@dataclass
class Found:
    """A prefix that was checked.

    Attributes:
        prefix: Its calls.
        watch: Tells when it is another.
        end: The module that it ends before.
        modes: Of training or eval, when it was checked.
    """

    prefix: Prefix
    watch: Watch
    end: str
    modes: tuple[bool, ...]


def find(root: nn.Module, inputs: Inputs, eval_prefix: bool) -> Found:
    """The prefix of `root`, from a batch of its inputs; see `PrefixCache` for what is checked.

    Raises:
        ConfigError: there is none, it is random, or its results cannot be told apart by item.
    """
    batch = few(inputs)
    with _looking(root, inputs):
        beginning = first_calls(root, batch)
        _refuse_nothing(root, beginning)
        with silenced(root.modules()):
            prefix = Prefix(root, mark_used(root, batch, beginning.calls))
            settle(prefix, eval_prefix)
            _refuse_noise(prefix, beginning.end)
            prefix.learn(batch)
        found = Found(prefix, Watch(prefix, beginning.touched), beginning.end, modes(prefix))
    settle(prefix, eval_prefix)
    if why := refusal(found, inputs):
        raise ConfigError(f"PrefixCache: {why}")
    return found


def settle(prefix: Prefix, eval_prefix: bool) -> None:
    """Put the prefix in eval mode, where that is wished for."""
    if eval_prefix:
        for module in prefix.modules.values():
            module.training = False


def refusal(found: Found, inputs: Inputs) -> str:
    """Why forwards with such arguments, in these modes, are left alone; "" where they are not."""
    prefix, batch = found.prefix, few(inputs)
    if why := noise(prefix):
        return why
    with _looking(prefix.root, inputs), silenced(prefix.root.modules()):
        shared = batch.shared()
        records = prefix.compute(batch, shared)
        real = _output(prefix.root, batch)
        with prefix.replayed(records, shared) as order:
            replayed = _output(prefix.root, batch)
        if not real or order.at < len(order.calls) or not all(map(same, real, replayed)):
            return (
                "with stored features the model's output is not what it is without (a forward "
                "that reaches into its modules, or gives what is no tensor)"
            )
        if modes(prefix) != found.modes:
            now = prefix.joined(records)
            for module, mode in zip(
                [prefix.root, *prefix.modules.values()], found.modes, strict=True
            ):
                module.training = mode
            if not all(map(same, now, prefix.values(prefix.outputs(batch)))):
                return "features differ between training and eval mode"
    return ""


def few(inputs: Inputs) -> Inputs:
    """Two items, where rows can be taken out."""
    many = inputs.separable and inputs.size > _FEW
    return inputs.rows(list(range(_FEW))) if many else inputs


def _output(root: nn.Module, inputs: Inputs) -> list[Tensor]:
    args, kwargs = inputs.call()
    with aside(inputs, seed=0):
        return [x.clone() for x in floats(root.forward(*args, **kwargs))]


@contextmanager
def _looking(root: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Modes, buffers and random numbers are afterwards what they were."""
    with preserved(root), aside(inputs, None), torch.no_grad():
        try:
            yield
        finally:
            torch.clear_autocast_cache()  # casts made here know no gradient


def _refuse_nothing(root: nn.Module, beginning: Beginning) -> None:
    if not beginning.end:
        raise ConfigError(
            f"PrefixCache: this forward of {type(root).__name__} uses nothing that is trained"
        )
    if all(call.cheap for call in beginning.calls):
        raise ConfigError(
            f"PrefixCache: {beginning.end} is trained, or has a hook, and no layer comes before "
            "it: there is nothing to store. Adapt later blocks only, as "
            "LoRACallback(blocks=[-2, -1]) does, or leave PrefixCache out"
        )


def _refuse_noise(prefix: Prefix, end: str) -> None:
    if where := recomputes(prefix):
        raise ConfigError(
            f"PrefixCache: {where} is on, which runs the prefix again in the backward pass. "
            "Switch it off: with the cache there are no activations of the prefix to save"
        )
    if why := noise(prefix):
        raise ConfigError(
            f"PrefixCache: {why}, so that features before {end} differ each time. "
            "PrefixCache(eval_prefix=True) keeps that part in eval mode while training"
        )
