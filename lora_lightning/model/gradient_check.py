"""Checks that a gradient reaches every factor, also by the eval output.

Classes, detections and texts have no gradient, or as many entries as the model finds. Whether an
adapter acts can be told by whether they change, if need be with far larger factors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_lightning.lora.factors import Factors
from lora_lightning.lora.sharding import whole
from lora_lightning.model.probing import difference, randomise, without_noise
from lora_lightning.model.switching import disabled

Look = Callable[..., list[Tensor]]  # from a seed: the outputs of one run

_TRIES = 3
_NOTHING = "the output depends on no adapter at all"
_NO_NUMBER = "the output holds no floating-point tensor; give forward=, from (model, batch) to one"
_PARTS = (10.0, 1.0, 0.1)  # of each weight's norm


def dead_factors(
    model: nn.Module, factors: dict[str, Factors], look: Look, training: bool
) -> tuple[dict[str, str], list[Tensor]]:
    """Path → why no gradient reaches it (one of three draws is enough); and the last outputs."""
    dead: dict[str, str] = dict.fromkeys(factors, "")
    outputs: list[Tensor] = []
    for attempt in range(_TRIES):
        with without_noise(model, training), torch.enable_grad():
            outputs = look(seed=attempt)
            loss = _probe_loss(outputs, attempt)
            if loss is None:
                return dict.fromkeys(factors, _NOTHING if outputs else _NO_NUMBER), outputs
            model.zero_grad(set_to_none=True)
            # Smaller each time: without a trainer's scaler float16 can overflow.
            (loss / 100**attempt).backward()
        dead = {p: r for p in dead if (r := _gradient_problem(factors[p]))}
        if not dead:
            break
        randomise(model, factors, seed=attempt + 1)
    model.zero_grad(set_to_none=True)
    return dead, outputs


def _gradient_problem(factors: Factors) -> str | None:
    for key, parameter in factors.named_parameters():
        if not parameter.requires_grad:
            continue
        grad = parameter.grad
        if grad is None:
            return "the model never uses this weight (no gradient)"
        grad = whole(grad)
        if not torch.isfinite(grad).all():
            return f"the gradient of {key} is not finite"
        if not grad.any():
            return (
                f"the gradient of {key} is exactly zero: the model multiplies this path by zero "
                "(a zero-initialised gate or norm weight?), or this batch is too small to use it"
            )
    return None


def _probe_loss(outputs: list[Tensor], seed: int) -> Tensor | None:
    """A random projection of all differentiable outputs."""
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for out in outputs:
        if out.requires_grad:
            weights = torch.randn(out.shape, generator=generator, device="cpu").to(out.device)
            terms.append((out.float() * weights).sum())
    return sum(terms[1:], terms[0]) if terms else None


def untold_by_eval(
    model: nn.Module,
    factors: dict[str, Factors],
    look: Look,
    trained: list[Tensor],
    found: list[Tensor],
) -> tuple[str, bool]:
    """Why the eval output tells no gradient ("": it does), and whether it can be compared."""
    gradient = any(x.requires_grad and x.numel() for x in found)
    if gradient and _kinds(found) == _kinds(trained):
        return "", True
    with torch.no_grad():
        with disabled(model):
            source = look(whole=True)
        drawn = [_drawn(model, factors, look, part) for part in _PARTS]
    stable = all([x.shape for x in source] == [x.shape for x in now] for now in drawn)
    numbers = stable and any(x.numel() for x in found)
    if gradient and numbers:
        return "", True
    why = (
        "the eval output has no gradient or no fixed size, as of a model that decides: that "
        "every factor learns was checked in training mode"
    )
    changes = [difference(now, source) != 0 for now in drawn]
    if numbers and changes[-1] == any(changes):
        return f"{why} only", True
    seen = "the adapter changes decisions" if any(changes) else "no decision changed on this batch"
    return f"{why}; in eval {seen}, and merging was not checked", False


def _drawn(model: nn.Module, factors: dict[str, Factors], look: Look, part: float) -> list[Tensor]:
    randomise(model, factors, 0, part)
    try:
        return look(whole=True)
    except Exception:  # so far from what was trained a model may refuse
        return []


def _kinds(outputs: list[Tensor]) -> list[tuple[torch.dtype, int]]:
    return [(x.dtype, x.ndim) for x in outputs]
