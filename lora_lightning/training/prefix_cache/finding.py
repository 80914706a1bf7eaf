"""Finding a model's frozen beginning on one batch, and checking that it can be replaced."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.model.probing import floats, preserved
from lora_lightning.model.view import View
from lora_lightning.training.prefix_cache.calls import Beginning, first_calls
from lora_lightning.training.prefix_cache.chance import aside
from lora_lightning.training.prefix_cache.flow import mark_used
from lora_lightning.training.prefix_cache.inputs import Inputs, autocast
from lora_lightning.training.prefix_cache.items import same
from lora_lightning.training.prefix_cache.learning import learn
from lora_lightning.training.prefix_cache.observers import attributes, silenced
from lora_lightning.training.prefix_cache.replay import Prefix, Record
from lora_lightning.training.prefix_cache.watch import Watch, modes, noise, recomputes, set_modes


@dataclass
class Found:
    """A prefix that was checked.

    Attributes:
        prefix: Its calls.
        watch: Tells when it is another.
        end: The module that it ends before.
        modes: Of training or eval, when it was checked.
        rows: Which tensors, by place among the arguments, hold a row for each item.
    """

    prefix: Prefix
    watch: Watch
    end: str
    modes: tuple[bool, ...]
    rows: dict[Hashable, bool]


def find(root: nn.Module, inputs: Inputs, eval_prefix: bool) -> Found:
    """The prefix of `root`, from a batch of its inputs; see `PrefixCache` for what is checked.

    Raises:
        ConfigError: there is none, it is random, or its results cannot be told apart by item.
    """
    batch = inputs.few()
    before = {module: attributes(module) for module in root.modules()}
    with _trials(root, inputs):
        beginning = first_calls(root, batch)
        if beginning.wrote:  # for the first time only, as a table of positions is?
            beginning = first_calls(root, batch)
        _refuse_nothing(root, beginning)
        with silenced(root.modules()):
            prefix = Prefix(root, mark_used(root, batch, beginning.calls), eval_prefix)
            _refuse_noise(prefix, beginning.end)
            learn(prefix, inputs.few(), known=False)  # one that no trial wrote to
            _compare(prefix, batch)
    # Now that statistics which the trials moved are back.
    watch = Watch(prefix, beginning.touched, before)
    return Found(prefix, watch, beginning.end, modes(prefix), inputs.places())


def refusal(found: Found, inputs: Inputs) -> str:
    """Why forwards with such arguments, in these modes, are left alone; "" where they are not."""
    prefix, batch = found.prefix, inputs.few()
    if why := noise(prefix):
        return why
    places = inputs.places()
    if any(found.rows.setdefault(place, rows) != rows for place, rows in places.items()):
        return "a tensor among the arguments has the batch's size by chance, or only at times"
    try:
        with _trials(prefix.root, inputs), silenced(prefix.root.modules()):
            learn(prefix, batch, known=True)
            _compare(prefix, batch)
            if modes(prefix) != found.modes:
                now = prefix.values(prefix.outputs(batch))
                set_modes(prefix, found.modes)
                then = prefix.values(prefix.outputs(batch))
                if not all(same(a, b, nan=True) for a, b in zip(now, then, strict=True)):
                    return "features differ between training and eval mode"
    except ConfigError as error:
        return reason(error)
    return ""


def check_stored(prefix: Prefix, inputs: Inputs, records: list[Record]) -> None:
    """Are stored features those that are computed anew?

    Raises:
        ConfigError: they are not.
    """
    batch = inputs.few()
    now = prefix.values(prefix.outputs(batch))
    stored = prefix.joined(records[: batch.size])
    if not all(same(a.to(b.device), b, nan=True) for a, b in zip(stored, now, strict=True)):
        raise ConfigError(
            "PrefixCache: stored features differ from those computed anew for the same items: "
            "they depend on more than the item and the shape of its batch. Leave PrefixCache out"
        )


def kind_of(found: Found, inputs: Inputs) -> Hashable:
    """What is checked once: arguments of one structure, in one set of modes and one precision."""
    return inputs.kind(), modes(found.prefix), autocast()


def trains(root: nn.Module) -> bool:
    """Whether a model is in a state to be trained."""
    return any(p.requires_grad for p in root.parameters()) and not View(root).merged


def reason(error: ConfigError) -> str:
    """What an error says, to go on with a sentence."""
    return str(error).removeprefix("PrefixCache: ")


def _compare(prefix: Prefix, batch: Inputs) -> None:
    """Is the model's output with stored features what it is without?"""
    shared = batch.shared()
    records = prefix.compute(batch, shared)
    with prefix.computed():
        real = _output(prefix.root, batch)
    with prefix.computed():  # what a module leaves behind, say in an attribute, is not this batch's
        _output(prefix.root, batch.reversed())
    with prefix.replayed(records, shared) as order:
        replayed = _output(prefix.root, batch)
    if (
        not real
        or order.at < len(order.calls)
        or len(real) != len(replayed)
        or not all(map(same, real, replayed))
    ):
        raise ConfigError(
            "PrefixCache: with stored features the model's output is not what it is without (a "
            "forward that reaches into its modules, or gives what is no tensor)"
        )


def _output(root: nn.Module, inputs: Inputs) -> list[Tensor]:
    args, kwargs = inputs.call()
    with aside(inputs, seed=0):
        return [x.clone() for x in floats(root.forward(*args, **kwargs))]


@contextmanager
def _trials(root: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Modes, buffers and random numbers are afterwards what they were.

    Raises:
        ConfigError: a trial forward ended in an error.
    """
    with preserved(root), aside(inputs, None), torch.no_grad():
        try:
            yield
        except (ConfigError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            raise ConfigError(
                f"PrefixCache: a trial forward of {type(root).__name__}, with two items or one "
                "more, or with stored results in the place of its first modules, ended in "
                f"{type(error).__name__}: {error}. Leave PrefixCache out where that is how the "
                "model is"
            ) from error
        finally:
            torch.clear_autocast_cache()  # casts made here know no gradient


def _refuse_nothing(root: nn.Module, beginning: Beginning) -> None:
    if not beginning.end:
        raise ConfigError(
            f"PrefixCache: this forward of {type(root).__name__} uses nothing that is trained"
        )
    if all(call.cheap for call in beginning.calls):
        what = "leaves a tensor in an attribute" if beginning.wrote else "is trained, or has a hook"
        raise ConfigError(
            f"PrefixCache: {beginning.end} {what}, and no layer comes before "
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
