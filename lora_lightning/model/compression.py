"""`compress`: truncated SVD of trained adapters to the smallest sufficient rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.linalg.decompose import SVD, energy_rank, product_svd
from lora_lightning.lora.adapted_module import located, raw_tensor
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.module_tree import join
from lora_lightning.lora.values import check_count, check_number
from lora_lightning.model import lending
from lora_lightning.model import state as states
from lora_lightning.model.state import ModelState
from lora_lightning.model.view import View


@dataclass(frozen=True)
class CompressedLayer:
    """The result of compressing one tensor.

    Attributes:
        path: The tensor.
        before: Its rank before; with a stored initial product, twice the adapter's.
        after: Its rank now.
        lost: ‖ΔW − ΔW'‖ / ‖ΔW‖, in the Frobenius norm.
    """

    path: str
    before: int
    after: int
    lost: float


@dataclass(frozen=True)
class Compression:
    """The result of `compress`.

    Attributes:
        layers: One `CompressedLayer` for each adapted tensor.
        parameters_before: Elements of the factors before, stored initial products included.
        parameters: Elements of the factors now.
    """

    layers: tuple[CompressedLayer, ...]
    parameters_before: int
    parameters: int


@lending.one_at_a_time
@torch.no_grad()
def compress(
    model: nn.Module,
    name: str | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> Compression:
    r"""Replace an adapter's deltas by their truncated SVD, at the smallest sufficient rank.

    .. math:: s\,BA = U\,diag(\sigma)\,V^T \approx s'\,B'A', \qquad
        A' = \sqrt{\sigma_{1..r}/s'}\;V_{1..r}^T, \quad B' = U_{1..r}\sqrt{\sigma_{1..r}/s'}

    with s' the scaling that the configuration gives rank r: of all products of that rank the
    nearest to the delta (Eckart & Young 1936). A stored initial product (of `pissa` and the like)
    is included. The adapter works as before, at its new ranks; an optimizer made before holds the
    old factors, so compress after training.

    Args:
        model: With the adapter on, not merged.
        name: Of the adapter; None: the active one.
        rank: The same rank for all layers (or less where a delta has less).
        energy: Instead: for each layer the fewest directions with this part of ‖ΔW‖².

    Raises:
        ConfigError: not exactly one of `rank` and `energy`, or out of range.
        AdapterNotFoundError: there is no such adapter.
        AdapterError: the model is merged.
    """
    if (rank is None) == (energy is None):
        raise ConfigError(f"give either rank or energy; got rank={rank!r}, energy={energy!r}")
    if rank is not None:
        check_count("rank", rank)
    if energy is not None:
        check_number("energy", energy, "(0, 1]")
    root, state, name = states.holder(model, name, "to compress")
    view = View(root)
    lending.check_home(view, "compress")
    view.check_unmerged("compressing")
    view.check_whole("compress")
    before = states.named_factors(root, name)
    scale = state.configs[name].scale
    found = [_compress_one(root, name, path, f, rank, energy, scale) for path, f in before.items()]
    after = states.named_factors(root, name)
    update_report(state, name, after)
    return Compression(tuple(found), _size(before), _size(after))


def _compress_one(
    model: nn.Module,
    name: str,
    path: str,
    factors: Factors,
    rank: int | None,
    energy: float | None,
    scale: Callable[[int, float], float],
) -> CompressedLayer:
    B, A = factors.low_rank()
    svd = product_svd(B, A)
    whole = svd.S.square().sum()
    wanted = rank if energy is None else energy_rank(svd.S, energy)
    used = int((svd.S[0] * torch.finfo(svd.S.dtype).eps < svd.S).sum())
    r = max(1, min(wanted or 1, used))
    module, tensor = located(model, path)
    module.lora[name][tensor] = _smaller(raw_tensor(module, tensor), factors, svd, r, scale)
    left = svd.S[r:].square().sum()
    lost = float((left / whole).sqrt()) if whole > 0 else 0.0
    return CompressedLayer(path, B.shape[1], r, lost)


def _smaller(
    weight: Tensor, factors: Factors, svd: SVD, rank: int, scale: Callable[[int, float], float]
) -> Factors:
    """Factors of this rank with the leading part of the product."""
    small = _unfilled(weight, factors, rank, scale)
    by = factors.spec.scaling / small.spec.scaling
    lora_B, lora_A = SVD(svd.U[:, :rank], svd.S[:rank] * by, svd.Vh[:rank]).halves()
    small.lora_A.copy_(lora_A)
    small.lora_B.copy_(lora_B)
    if small.magnitude is not None and factors.magnitude is not None:
        small.magnitude.copy_(factors.magnitude)
    return small


def _unfilled(
    weight: Tensor, factors: Factors, rank: int, scale: Callable[[int, float], float]
) -> Factors:
    """Factors of this rank, without a stored initial product."""
    # The scaling of the new rank: a state dict holds none, it follows from the ranks.
    scaling = scale(rank, factors.spec.alpha)
    spec = dataclasses.replace(
        factors.spec, rank=rank, scaling=scaling, offset=False, init="zero", xs=False
    )
    made = Factors(weight, factors.matrix, spec)
    made.require_grad(any(p.requires_grad for p in factors.parameters()))
    return made.train(factors.training)


@torch.no_grad()
def set_ranks(model: nn.Module, name: str, ranks: Mapping[str, int]) -> None:
    """Give an adapter the form that `compress` leaves at these ranks, for a state dict to fill."""
    root, state, name = states.holder(model, name, "to resize")
    for path, factors in states.named_factors(root, name).items():
        module, tensor = located(root, path)
        weight, scale = raw_tensor(module, tensor), state.configs[name].scale
        module.lora[name][tensor] = _unfilled(weight, factors, ranks[path], scale)
    update_report(state, name, states.named_factors(root, name))


def update_report(state: ModelState, name: str, factors: dict[str, Factors]) -> None:
    """Update the report of an adapter whose ranks have changed."""
    rows = []
    for row in state.reports[name].rows:
        f = factors[join(row.module, row.tensor)]
        size = sum(p.numel() for k, p in f.named_parameters() if f.spec.trains(k))
        rows.append(dataclasses.replace(row, rank=f.spec.rank, parameters=size))
    state.reports[name] = dataclasses.replace(state.reports[name], rows=tuple(rows))


def _size(factors: dict[str, Factors]) -> int:
    return sum(t.numel() for f in factors.values() for t in f.tensors().values())
