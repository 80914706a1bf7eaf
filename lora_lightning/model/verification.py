"""`verify`: whether each adapter acts and learns, in training and in eval, and merges exactly.

`verify` gives every pair of factors random values for the length of the call (B = 0 would
hide everything), runs the model and checks, for each adapted tensor:

1. does a gradient reach both factors, in training mode and in eval mode?
2. is the effect without gradients the one with gradients? (fused inference paths read raw weights)
3. does merging leave the output as it was?

A model that decides in eval mode (classes, detections, texts) gives little to tell these by there:
no gradient, or as many numbers as it finds. Then a warning says what was left out.

No product uses TF32. Factors, buffers, modes, gradients, random state and torch's settings are
restored afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import VerificationError
from lora_lightning.linalg.torch_settings import ieee
from lora_lightning.lora.merging import merge_layer, unmerge_layer
from lora_lightning.lora.sharding import is_in_pieces, reshard
from lora_lightning.model import lending
from lora_lightning.model import state as states
from lora_lightning.model import switching as adapters
from lora_lightning.model.calling import Forward
from lora_lightning.model.gradient_check import Look, dead_factors, untold_by_eval
from lora_lightning.model.probing import accepted, difference, preserved, randomised, roundings, run
from lora_lightning.model.view import View

_verifying: ContextVar[bool] = ContextVar("verifying", default=False)


def verifying() -> bool:
    """Whether the forward that runs is one of `verify`'s."""
    return _verifying.get()


@dataclass
class Verification:
    """The result of `verify` for one adapter.

    Attributes:
        name: the adapter.
        tensors: paths of the adapted tensors that were examined.
        failures: path → why it fails; empty when all is well.
        effect: largest change of the eval output by the random factors, relative.
        merge_error: largest difference between merged and unmerged output, relative.
        untold: what the eval output cannot tell, and why; "" where it tells all.
    """

    name: str
    tensors: list[str]
    failures: dict[str, str] = field(default_factory=dict)
    effect: float = 0.0
    merge_error: float = 0.0
    untold: str = ""


@lending.one_at_a_time
def verify(
    model: nn.Module,
    example_batch: Any,
    *,
    forward: Forward | None = None,
    tolerance: float | None = None,
    raise_on_failure: bool = True,
) -> list[Verification]:
    """Check every adapter of `model` on one batch; returns one `Verification` each.

    A sharded model (`fully_shard`), whose every process must call this, and a quantised one cannot
    be merged: their layers read W + s·BA instead.

    Args:
        model: The injected model.
        example_batch: A batch of two items or more; what the model is called with for it, see
            `lora_lightning.model.calling`.
        forward: From (model, batch): runs the model once, and gives its output.
        tolerance: Accepted relative difference; None: by the lowest precision of outputs,
            parameters and autocast, 1e-9 in float64, 1e-4 in float32 and 5e-2 below.
        raise_on_failure: Raise when anything fails; else look at ``failures``.

    Raises:
        AdapterNotFoundError: there is no adapter.
        VerificationError: names each tensor that fails, and why; or within `inference_mode`.
    """
    if torch.is_inference_mode_enabled():
        raise VerificationError(
            "verify looks at gradients, and torch.inference_mode() records none: call it outside"
        )
    (_, first), *_ = states.roots(model)
    active, names = first.active, adapters.adapters(model)
    modules = View(model).modules
    reshard(modules)

    def look(seed: int = 0, whole: bool = False) -> list[Tensor]:
        out = run(model, example_batch, seed, forward, whole)
        reshard(modules)
        return out

    found = []
    # Another mode or number of items would recompile what is compiled.
    eager = torch.compiler.set_stance("force_eager")
    with eager, ieee(), preserved(model), adapters.unmerged(model):
        outer = _verifying.set(True)
        try:
            for name in names:
                adapters.set_active(model, name)
                found.append(_verify_one(model, name, look, tolerance))
        finally:
            adapters.set_active(model, active)
            _verifying.reset(outer)
    failing = [v for v in found if v.failures]
    if failing and raise_on_failure:
        raise VerificationError(_message(failing))
    for each in found:
        if each.untold:
            warnings.warn(f"adapter {each.name!r}: {each.untold}", stacklevel=2)
    return found


def _verify_one(model: nn.Module, name: str, look: Look, tolerance: float | None) -> Verification:
    factors = states.named_factors(model, name)
    result = Verification(name, list(factors))
    with randomised(model, factors):
        dead, trained = dead_factors(model, factors, look, training=True)
        result.failures |= {path: f"in training: {reason}" for path, reason in dead.items()}
        if not trained:
            return result
        model.eval()
        still, found = dead_factors(model, factors, look, training=False)
        comparable = True
        if not dead:
            result.untold, comparable = untold_by_eval(model, factors, look, trained, found)
        for path, reason in still.items() if not result.untold else ():
            result.failures.setdefault(path, f"in eval: {reason}")
        if comparable:
            _check_eval(model, result, look, tolerance)
    return result


def _check_eval(
    model: nn.Module, result: Verification, look: Look, tolerance: float | None
) -> None:
    with roundings(View(model).adapted.values()) as found:
        with_gradient = [o.detach() for o in look()]
    with torch.no_grad():
        plain = look()
        with adapters.disabled(model):
            source = look()
        limit = accepted(model, plain, found) if tolerance is None else tolerance
        result.effect = difference(plain, source)
        if result.effect == 0:
            # What training said stays: it knows the cause, such as a zero-initialised norm weight.
            none = dict.fromkeys(result.tensors, "in eval: no effect on the output")
            result.failures = {**none, **result.failures}
            return
        # `not <=`, so that a NaN fails as well.
        if not difference(plain, with_gradient) <= limit:
            result.failures |= _without_effect(model, result, look, source)
        with _merged(model):
            merged = look()
        result.merge_error = difference(merged, plain)
        if not result.merge_error <= limit:
            which = _unmergeable(model, result, look, plain, limit)
            result.failures = {**which, **result.failures}


def _without_effect(
    model: nn.Module, result: Verification, look: Look, source: list[Tensor]
) -> dict[str, str]:
    """Which tensors lose their effect without gradients: each switched on alone."""
    layers = View(model).adapted
    failing: dict[str, str] = {}
    with adapters.disabled(model):
        for path, layer in layers.items():
            layer.lora_active = result.name if result.name in layer.lora else None
            if layer.lora_active and difference(look(), source) == 0:
                reason = "in eval: no effect without gradients (a fused path reads the raw weight)"
                failing |= dict.fromkeys(_tensors_of(result, path), reason)
            layer.lora_active = None
    why = "in eval: the output without gradients differs from the one with gradients"
    return failing or dict.fromkeys(result.tensors, why)


def _unmergeable(
    model: nn.Module, result: Verification, look: Look, plain: list[Tensor], limit: float
) -> dict[str, str]:
    """Which layers change the output when merged alone."""
    failing: dict[str, str] = {}
    for path, layer in View(model).adapted.items():
        with _merged(model, layer):
            error = difference(look(), plain)
        if not error <= limit:
            reason = f"merging changes the output by {error:.1e} (relative)"
            failing |= dict.fromkeys(_tensors_of(result, path), reason)
    return failing or {
        "(all together)": f"merging changes the output by {result.merge_error:.1e} (relative)"
    }


@contextmanager
def _merged(model: nn.Module, layer: Any = None) -> Iterator[None]:
    """Within the block the model, or this layer alone, is merged."""
    view = View(model)
    with ExitStack() as stack:
        if view.quantised or any(is_in_pieces(module) for _, module in view.modules):
            for each in view.adapted.values() if layer is None else [layer]:
                if "forward" not in each.__dict__:
                    each.__dict__["forward"] = MethodType(each._adapted_base.forward, each)
                    stack.callback(each.__dict__.pop, "forward")
        elif layer is None:
            adapters.merge(model)
            stack.callback(adapters.unmerge, model, discard_changes=True)
        else:
            merge_layer(layer)
            stack.callback(unmerge_layer, layer)
        yield


def _tensors_of(result: Verification, layer: str) -> list[str]:
    return [t for t in result.tensors if t.rpartition(".")[0] == layer]


def _message(failing: list[Verification]) -> str:
    lines = []
    for v in failing:
        lines.append(f"adapter {v.name!r}: {len(v.failures)} of {len(v.tensors)} tensors fail")
        lines += [f"  {path}: {reason}" for path, reason in list(v.failures.items())[:20]]
        if len(v.failures) > 20:
            lines.append(f"  … and {len(v.failures) - 20} more")
    lines.append("leave them out with exclude_modules, or fix the problems listed above")
    return "\n".join(lines)
