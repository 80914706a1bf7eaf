"""`start_from_data`: initial factors from target batches, before training."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.linalg.streaming_svd import StreamingSVD
from lora_lightning.lora.adapted_module import located, raw_tensor
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.initialisation import METHODS
from lora_lightning.model.calling import Forward, call
from lora_lightning.model.data_driven.activations import observed
from lora_lightning.model.probing import evaluating, loss_in_eval, training_only, without_cudnns_rnn
from lora_lightning.model.state import holder, named_factors
from lora_lightning.model.switching import disabled
from lora_lightning.model.view import View

SETTLED = 0.99  # overlap of a layer's subspace with the one before, from which it counts as settled
_BEFORE = "inject with data= before fully_shard, or start in one process and load its adapter file"
SAMPLE = 2048  # rows of each layer's input for a factorisation


class Gatherer(ABC):
    """Collects statistics of a weight's inputs, for its initial factors or its rank."""

    @abstractmethod
    def update(self, rows: Tensor) -> None:
        """Take note of inputs (N, in)."""

    def settled(self) -> bool:
        """Whether more inputs would change nothing."""
        return False

    @abstractmethod
    def result(self) -> Tensor:
        """The collected statistics."""


class Directions(Gatherer):
    """The leading directions of the inputs, as many as the factors have rank."""

    def __init__(self, factors: Factors):
        self.svd = StreamingSVD(factors.spec.rank)

    def update(self, rows: Tensor) -> None:
        """Take note of inputs (N, in)."""
        self.svd.update(rows)

    def settled(self) -> bool:
        """Whether the subspace has converged."""
        return self.svd.converged(SETTLED)

    def result(self) -> Tensor:
        """(r, in), orthonormal."""
        return self.svd.components


class Sample(Gatherer):
    """Reservoir sample of the inputs: every row so far is in it with the same probability."""

    def __init__(self, factors: Factors, size: int = SAMPLE):
        self._size = size
        self._generator = torch.Generator().manual_seed(factors.spec.seed)
        self._rows: Tensor | None = None
        self._keys = torch.empty(0, device="cpu")

    def update(self, rows: Tensor) -> None:
        """Take note of inputs (N, in)."""
        keys = torch.rand(len(rows), generator=self._generator, device="cpu")
        kept = rows if self._rows is None else torch.cat([self._rows, rows])
        keys = torch.cat([self._keys, keys])
        chosen = keys.topk(min(self._size, len(keys))).indices
        self._rows, self._keys = kept[chosen.to(kept.device)].clone(), keys[chosen]

    def result(self) -> Tensor:
        """(size or less, in)."""
        assert self._rows is not None
        return self._rows


class _Covariance(Gatherer):
    def __init__(self, factors: Factors):
        self._sum: Any = 0
        self._count = 0

    def update(self, rows: Tensor) -> None:
        rows = rows.double()
        # In place: of 18,432 inputs each copy of this sum would take 2.7 GB.
        self._sum = self._sum.addmm_(rows.T, rows) if self._count else rows.T @ rows
        self._count += len(rows)

    def result(self) -> Tensor:
        mean: Tensor = self._sum / self._count
        return mean


GATHERERS: dict[str, Callable[[Factors], Gatherer]] = {
    "inputs": Directions,
    "rows": Sample,
    "covariance": _Covariance,
}


def start_from_data(
    model: nn.Module,
    batches: Iterable[Any],
    name: str | None = None,
    *,
    forward: Forward | None = None,
    loss: Forward | None = None,
    max_batches: int = 50,
    progress: bool = False,
) -> list[str]:
    """Set an adapter's starting factors from target batches, by the method of its ``init``.

    The source model sees each batch once, in eval mode (where that gives no loss, in training mode
    without noise); with ``"eva"`` the pass ends early when all layers' subspaces have converged.
    The function stays the source's.

    Args:
        model: With the adapter on, not trained yet.
        batches: Of the target; the model is called with each as `lora_lightning.model.calling`
            says, unless `forward` is given.
        name: Of the adapter; None: the active one.
        forward: From (model, batch) to anything; runs the model once.
        loss: From (model, batch) to a scalar loss; for ``"lora-ga"``, whose factors follow the
            loss's gradient.
        max_batches: The largest number of batches to use.
        progress: Show a progress bar on the terminal.

    Returns:
        The adapted tensors initialised as with "zero", because their inputs cannot be observed
        (embeddings, transposed convolutions, parameters that belong to no layer) or their weight
        gets no gradient of its own; a warning names them too.

    Raises:
        AdapterNotFoundError: there is no such adapter.
        AdapterError: the model is merged.
        ConfigError: the method needs no data, or a loss that is not given.
        DataError: there is no batch, a batch of another kind, or NaN in a layer's inputs.
    """
    model, state, name = holder(model, name, "to start")
    View(model).check_unmerged("its adapters start")
    View(model).check_whole("start_from_data", _BEFORE)
    method = METHODS[state.configs[name].init]
    if method.needs == "nothing":
        raise ConfigError(f"init={state.configs[name].init!r} needs no data: it has started")
    if method.needs == "gradient" and loss is None:
        raise ConfigError(
            'init="lora-ga" follows the gradient of a loss: pass loss=, a function from (model, '
            "batch) to a scalar, on labels or pseudo-labels"
        )
    factors = named_factors(model, name)
    batches = shown(batches, max_batches, progress)
    with evaluating(model), disabled(model):
        if method.needs == "gradient":
            assert loss is not None
            found = _gradients(model, factors, batches, loss)
        else:
            made = gather_inputs(model, factors, batches, forward or call, GATHERERS[method.needs])
            found = {path: g.result() for path, g in made.items()}
    for path, each in factors.items():
        each.reset(raw_tensor(*located(model, path)), found.get(path))
    state.unstarted.discard(name)
    return _tell(sorted(factors.keys() - found.keys()), state.configs[name].init)


def gather_inputs(
    model: nn.Module,
    factors: dict[str, Factors],
    batches: Iterable[Any],
    forward: Forward,
    gather: Callable[[Factors], Gatherer],
) -> dict[str, Gatherer]:
    """Statistics of the inputs of each observed weight, by its path."""
    gatherers: dict[str, Gatherer] = {}

    def sink(path: str, rows: Tensor) -> None:
        if path not in gatherers:
            gatherers[path] = gather(factors[path])
        gatherers[path].update(rows)

    modules = {path: located(model, path) for path in factors}
    with torch.no_grad(), observed(modules, sink):
        for batch in batches:
            forward(model, batch)
            if gatherers and all(g.settled() for g in gatherers.values()):
                break
    return gatherers


def _gradients(
    model: nn.Module, factors: dict[str, Factors], batches: Iterable[Any], loss: Forward
) -> dict[str, Tensor]:
    weights = {
        path: weight
        for path in factors
        if isinstance(weight := raw_tensor(*located(model, path)), nn.Parameter)
    }
    unfused = without_cudnns_rnn(model.modules())
    with training_only(model, weights.values()), torch.enable_grad(), unfused:
        for batch in batches:
            found = loss_in_eval(model, partial(loss, model, batch))
            if found.requires_grad:  # not where every weight is computed from others
                found.backward()
    return {
        path: w.grad.detach().reshape(factors[path].matrix).clone()
        for path, w in weights.items()
        if w.grad is not None and bool(w.grad.any())
    }


def shown(batches: Iterable[Any], limit: int, progress: bool) -> Iterable[Any]:
    """The first batches, with a progress bar if wanted; DataError where there is none."""
    limited = _limited(batches, limit)
    if not progress:
        return limited
    from rich.progress import track

    total = min(limit, length_hint(batches, limit))  # not every loader has a length
    return track(limited, "Looking at the target", total=total, transient=True)


def _limited(batches: Iterable[Any], limit: int) -> Iterator[Any]:
    batch = nothing = object()
    for batch in islice(batches, limit):
        yield batch
    if batch is nothing:
        raise DataError("there is no batch to start from: the target's loader is empty")


def _tell(fallen: list[str], init: str) -> list[str]:
    if fallen:
        warnings.warn(
            f"{len(fallen)} tensors start as 'zero' does: what init={init!r} looks at cannot be "
            f"seen for {', '.join(fallen[:5])}{' …' if len(fallen) > 5 else ''}",
            stacklevel=3,
        )
    return fallen
