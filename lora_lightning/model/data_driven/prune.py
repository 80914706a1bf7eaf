r"""Rank pruning during training, as in AdaLoRA, on factors that are kept orthogonal.

Zhang et al. 2023, "AdaLoRA", arXiv:2303.10512, train :math:`P \Lambda Q` and regularise P and Q
towards orthogonality, so that each direction can be scored, and pruned, on its own. Here the
factors *are* made orthogonal at each event: with the SVD of the product,

.. math:: s\,BA = U \Sigma V^T, \qquad B \leftarrow U \sqrt{\Sigma/s}, \quad
    A \leftarrow \sqrt{\Sigma/s}\,V^T ,

which leaves the function as it is, needs no loss of its own, and turns the optimizer's moments
along with it. Between events every step measures how much the loss depends on each direction i,

.. math:: I_i = \Big|\sum_j B_{ji}\,\partial L / \partial B_{ji}\Big| ,

which to first order is by how much the loss would change without it. As in the paper the score
is the smoothed I times its smoothed uncertainty, among the directions of all layers together.

A pruned direction is zero in A, in B and in the optimizer's state. Its gradients are then zero too,
so that it stays zero, without a mask and without a change of shape: checkpoints, DDP and compiled
models are not affected. Averages over steps (EMA, SWA) are, since they preserve neither the zeros
nor the rotated bases. `Pruner.finish` removes the zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lora_lightning.linalg.decompose import product_svd
from lora_lightning.lora.factors import Factors

SMOOTHING = 0.85  # of the importance and of its uncertainty, as in the paper's experiments
EVENTS = 10  # of pruning
_SQUARED = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}  # an optimizer's second moments


class Pruner:
    """Lowers the ranks of an adapter's factors.

    Args:
        factors: Path → factors.
        to: Mean rank at the end.
        first: Step at which the factors are made orthogonal and scoring begins.
        last: Step of the last event.

    Attributes:
        importance: Path → (r,), the score of each direction.
    """

    def __init__(self, factors: Mapping[str, Factors], to: float, first: int, last: int):
        self.factors, self.to = dict(factors), to
        self.first, self.last = first, max(last, first + 1)
        self.every = max(1, (self.last - self.first) // EVENTS)
        self.start = float(sum(f.spec.rank for f in self.factors.values()))
        self._mean: dict[str, Tensor] = {}
        self._spread: dict[str, Tensor] = {}

    def wanted(self, step: int) -> int:
        r"""Directions of all layers together at this step; the cubic schedule of the paper.

        :math:`b_T + (b_0 - b_T)(1 - t)^3`, t from 0 at `first` to 1 at `last`.
        """
        t = min(max((step - self.first) / (self.last - self.first), 0.0), 1.0)
        end = self.to * len(self.factors)
        return max(len(self.factors), round(end + (self.start - end) * (1 - t) ** 3))

    @torch.no_grad()
    def observe(self, step: int, scale: float = 1.0) -> None:
        """Update the scores from the gradients of a step, before the optimizer takes it.

        What is not finite is ignored: in float16 such steps are part of the search for a scale.
        Gradients are `scale` times their values.
        """
        if not self.first <= step < self.last:
            return
        for path, f in self.factors.items():
            if f.lora_B.grad is None:
                continue
            now = (f.lora_B * f.lora_B.grad).sum(dim=0).abs().float() / scale
            self._mean[path] = mean = _smoothed(self._mean.get(path), now)
            self._spread[path] = _smoothed(self._spread.get(path), (now - mean).abs())

    @property
    def importance(self) -> dict[str, Tensor]:
        """Smoothed importance times its smoothed uncertainty, (r,) for each path; 0 if unknown."""
        return {p: (m * self._spread[p]).nan_to_num(0.0) for p, m in self._mean.items()}

    @torch.no_grad()
    def act(self, step: int, optimizers: list[Optimizer], since: int | None = None) -> bool:
        """Prune directions where an event is due, after a step; returns whether one was.

        One is due after `since`, the step of the last call (None: the previous step), and up to
        `step`: steps may be skipped.
        """
        if self._events(step) == self._events(step - 1 if since is None else since):
            return False
        for path, kept in self._kept(self.wanted(step)).items():
            _drop(self.factors[path], ~kept, optimizers)
        for factors in self.factors.values():
            orthogonalise(factors, optimizers)
        self._mean, self._spread = {}, {}
        return True

    def _events(self, step: int) -> int:
        """Number of events up to this step."""
        if step < self.first:
            return 0
        whole, rest = divmod(self.last - self.first, self.every)
        if step >= self.last:
            return whole + 1 + (rest > 0)
        return (step - self.first) // self.every + 1

    def _kept(self, wanted: int) -> dict[str, Tensor]:
        """Path → (r,), which directions stay: the most important of all, one a layer at least."""
        worth = self.importance
        if not worth:
            return {}
        # Before the first step of a direction B is 0, and so is its score.
        scores = {p: s.where(alive(self.factors[p]).to(s.device), -1.0) for p, s in worth.items()}
        best = {p: torch.zeros_like(s, dtype=torch.bool) for p, s in scores.items()}
        for path, s in scores.items():
            best[path][s.argmax()] = True
        rest = torch.cat([s.masked_fill(best[p], -1.0) for p, s in scores.items()])
        more = min(max(0, wanted - len(scores)), int((rest >= 0).sum()))
        chosen = torch.zeros_like(rest, dtype=torch.bool)
        chosen[rest.topk(more).indices] = True
        parts = torch.split(chosen, [len(s) for s in scores.values()])
        return {p: best[p] | part for p, part in zip(scores, parts, strict=True)}

    @torch.no_grad()
    def finish(self, optimizers: Iterable[Optimizer] = ()) -> dict[str, int]:
        """Remove pruned directions, also from the optimizers' moments; path → rank."""
        for factors in self.factors.values():
            kept = alive(factors)
            if not kept.all():
                kept[0] |= not kept.any()
                _shorten(factors, kept, optimizers)
                factors.keep(kept.nonzero()[:, 0])
        return self.ranks()

    def ranks(self) -> dict[str, int]:
        """Path → directions that have not been dropped."""
        return {p: max(1, int(alive(f).sum())) for p, f in self.factors.items()}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; pruned directions are known by their zeros."""
        return {"mean": self._mean, "spread": self._spread}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for mine, given in ((self._mean, state["mean"]), (self._spread, state["spread"])):
            mine.clear()
            mine.update({p: v.to(self.factors[p].lora_B.device) for p, v in given.items()})


def _smoothed(before: Tensor | None, now: Tensor) -> Tensor:
    """The moving average, which begins with the first finite value; NaN until then."""
    if before is None:
        before = torch.full_like(now, torch.nan)
    finite = now.isfinite()  # not asked for on the host, which would wait for the device
    before = before.where(before.isfinite() | ~finite, now)
    return before.where(~finite, SMOOTHING * before + (1 - SMOOTHING) * now)


def alive(factors: Factors) -> Tensor:
    """(r,), which directions are in use: those whose row of A is not zero."""
    found: Tensor = factors.lora_A.detach().ne(0).any(dim=1)
    return found


def _drop(factors: Factors, dropped: Tensor, optimizers: list[Optimizer]) -> None:
    for tensor, rows in ((factors.lora_A, True), (factors.lora_B, False)):
        for each in [tensor.data, *_moments(tensor, optimizers).values()]:
            (each if rows else each.T)[dropped] = 0


@torch.no_grad()
def rescale(factors: Factors, scaling: float, optimizers: Iterable[Optimizer] = ()) -> None:
    """Write the same ΔW with another s: as B grows, its gradients, and so its moments, shrink."""
    by = factors.spec.scaling / scaling
    factors.lora_B.mul_(by)
    factors.spec = dataclasses.replace(factors.spec, scaling=scaling)
    for optimizer in optimizers:
        for key, moment in _moments(factors.lora_B, [optimizer]).items():
            moment.div_(by**2 if key in _SQUARED else by)


def _shorten(factors: Factors, kept: Tensor, optimizers: Iterable[Optimizer]) -> None:
    """Keep only these directions' moments, as a resumed fit has no others."""
    for optimizer in optimizers:
        for tensor, side in ((factors.lora_A, 0), (factors.lora_B, 1)):
            state = optimizer.state.get(tensor, {})
            for key, moment in state.items():
                matrix = isinstance(moment, Tensor) and moment.ndim == 2
                if matrix and moment.shape[side] == len(kept):  # Adafactor's has the other side 1
                    state[key] = moment.index_select(side, kept.nonzero()[:, 0])


@torch.no_grad()
def orthogonalise(factors: Factors, optimizers: list[Optimizer] = ()) -> None:  # type: ignore[assignment]
    r"""Turn factors so that B has orthogonal columns and A orthogonal rows; BA stays.

    With :math:`B' = B M` and :math:`A' = M^{-1} A` gradients become :math:`g_B M^{-T}` and
    :math:`M^T g_A`: first moments of an optimizer follow exactly, second ones by the squares.
    """
    kept = alive(factors).nonzero()[:, 0]
    B, A = factors.lora_B[:, kept].float(), factors.lora_A[kept].float()
    new_B, new_A = product_svd(B, A).halves()
    M = torch.linalg.lstsq(B, new_B).solution
    back = torch.linalg.lstsq(A.T, new_A.T).solution.T  # M⁻¹
    if not bool(torch.isfinite(M).all() and torch.isfinite(back).all()) or not bool(new_B.any()):
        return
    if torch.linalg.matrix_rank(B) < len(kept) or torch.linalg.matrix_rank(A) < len(kept):
        return  # directions that are still zero cannot be separated
    for key, moment in _moments(factors.lora_B, optimizers).items():
        turn = back.T.square() if key in _SQUARED else back.T
        moment[:, kept] = (moment[:, kept].double() @ turn.double()).to(moment.dtype)
    for key, moment in _moments(factors.lora_A, optimizers).items():
        turn = M.T.square() if key in _SQUARED else M.T
        moment[kept] = (turn.double() @ moment[kept].double()).to(moment.dtype)
    factors.lora_B.data[:, kept] = new_B.to(factors.lora_B.dtype)
    factors.lora_A.data[kept] = new_A.to(factors.lora_A.dtype)


def _moments(parameter: Tensor, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """An optimizer's state for each element of a parameter, by name."""
    found: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found[key] = value
    return found
