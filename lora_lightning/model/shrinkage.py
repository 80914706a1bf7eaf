"""Staying near the source: `shrink` an adapter (WiSE-FT), or L2-SP during training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lightning.lora.adapted_module import located, raw_tensor
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.sharding import reshard
from lora_lightning.lora.values import check_number
from lora_lightning.model import lending
from lora_lightning.model import state as states
from lora_lightning.model.owned_tensors import extras, like, snapshot
from lora_lightning.model.state import ModelState
from lora_lightning.model.view import View


@lending.one_at_a_time
@torch.no_grad()
def shrink(model: nn.Module, share: float) -> None:
    r"""Interpolate towards the source: keep this share of the active adapter's changes.

    .. math:: \Delta W \to a\,\Delta W, \qquad w \to w_s + a\,(w - w_s)

    where w are the tensors trained in full (a head, norms, DoRA's magnitudes) and the buffers
    that changed (BatchNorm's statistics), and :math:`w_s` the source's values of them. a = 1
    changes nothing; a = 0 leaves the source model, exactly. In between, the adapted model is often
    more robust than either end: Wortsman et al. 2021, "Robust fine-tuning of zero-shot models"
    (WiSE-FT), arXiv:2109.01903. Repeated calls multiply their shares.

    Args:
        model: With an active adapter, not merged.
        share: a, in [0, 1].

    Raises:
        ConfigError: the share is out of range.
        AdapterNotFoundError: no adapter is active.
        AdapterError: the model is merged.
    """
    check_number("share", share, "[0, 1]")
    view, state, name = _unmerged_holder(model, "to shrink")
    if share == 1:
        return
    if share == 0:  # NaN times 0 is NaN
        for factors in states.named_factors(view, name).values():
            factors.lora_A.nan_to_num_(posinf=0, neginf=0)
    for tensor, source in _with_source(view, state, name):
        if share == 0:  # exactly, whatever the adapter holds
            tensor.copy_(source)
        elif tensor.is_floating_point():  # not a count of batches
            tensor.copy_(source + share * (tensor - source))


def _with_source(view: View, state: ModelState, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Each of the adapter's own tensors, and the source's value of it."""
    for path, factors in states.named_factors(view, name).items():
        for part in factors.linear_in():
            yield part, torch.zeros_like(part)
        if factors.magnitude is not None:
            yield factors.magnitude, _source_magnitude(view, path, factors)
    for live, value in _owned(view, state, name).values():
        yield live, like(value, live)


def _owned(view: View, state: ModelState, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Name → (live, source's) of the tensors trained in full, and of the buffers."""
    live = view.tensors
    snapshot(view, state)
    buffers = [n for n in state.source if n in live and not isinstance(live[n], nn.Parameter)]
    return {n: (live[n], state.source[n][1]) for n in [*extras(view, state, name), *buffers]}


def _source_magnitude(view: View, path: str, factors: Factors) -> Tensor:
    return factors.row_norm(raw_tensor(*located(view.model, path)).detach())


def _unmerged_holder(model: nn.Module, purpose: str) -> tuple[View, ModelState, str]:
    root, state, name = states.holder(model, None, purpose)
    view = View(root)
    lending.check_home(view, f"using adapter {name!r} {purpose}")
    view.check_unmerged("this")
    if purpose != "to copy":
        view.check_whole(f"an adapter {purpose}")
    reshard(view.modules)
    return view, state, name


def adapter_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the active adapter's own tensors: factors, tensors trained in full, buffers."""
    return {key: tensor.detach().clone() for key, tensor in own_tensors(model).items()}


@lending.one_at_a_time
@torch.no_grad()
def restore(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy `adapter_values` back into the model."""
    own = own_tensors(model)
    for key, value in values.items():
        own[key].copy_(value)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The active adapter's own live tensors, by name; see `adapter_values`."""
    view, state, name = _unmerged_holder(model, "to copy")
    factors = states.named_factors(view, name).items()
    own = {f"{path}.{key}": t for path, f in factors for key, t in f.tensors().items()}
    return own | {n: live for n, (live, _) in _owned(view, state, name).items()}


@contextmanager
def undone(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the active adapter may be shrunk or compressed; then it is restored."""
    view, state, name = _unmerged_holder(model, "to try")
    report, values = state.reports[name], adapter_values(model)
    factors = states.named_factors(view, name)
    try:
        yield model
    finally:
        for path, kept in factors.items():
            module, tensor = located(view.model, path)
            module.lora[name][tensor] = kept
        state.reports[name] = report
        restore(model, values)


def squared_change(factors: Iterable[Factors]) -> Tensor:
    r"""How far factors move the weights, :math:`\sum_l \lVert \Delta W_l \rVert_F^2`: L2-SP.

    As :math:`s^2\,tr(B^T B\,A A^T)`, r × r: ΔW is never made. 0 while ΔW is, where its gradient is
    0 too. Li, Grandvalet & Davoine 2018, "Explicit inductive bias for transfer learning with
    convolutional networks", arXiv:1802.01483.
    """
    each = [(f.spec.scaling, *f.low_rank()) for f in factors]
    return torch.stack([s**2 * ((B.T @ B) * (A @ A.T)).sum() for s, B, A in each]).sum()


@lending.one_at_a_time
@torch.no_grad()
def pull_to_source(model: nn.Module, strength: float) -> None:
    r"""Add the gradient of L2-SP to the gradients of the active adapter.

    .. math:: \Omega = \frac{\alpha}{2} \Big( \sum \lVert \Delta W \rVert_F^2
        + \sum \lVert w - w_s \rVert^2 \Big)

    with w and :math:`w_s` as in `shrink`, without buffers: weights decay not to zero, as by weight
    decay, but to the source model's (see `squared_change`). Parameters without a gradient are left
    without.

    Args:
        model: With an active adapter, after the backward pass.
        strength: α; 0 adds nothing.
    """
    view, state, name = _unmerged_holder(model, "to pull")
    for path, factors in states.named_factors(view, name).items():
        if moving := [p for p in factors.matrices() if p.grad is not None]:
            with torch.enable_grad():
                half = squared_change([factors]) / 2
            for parameter, gradient in zip(moving, torch.autograd.grad(half, moving), strict=True):
                _add(parameter, strength * gradient)
        if factors.magnitude is not None:
            away = factors.magnitude - _source_magnitude(view, path, factors)
            _add(factors.magnitude, strength * away)
    for live, value in _owned(view, state, name).values():
        if isinstance(live, nn.Parameter):
            _add(live, strength * (live - like(value, live)))


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.add_(gradient.to(parameter.grad.dtype))
