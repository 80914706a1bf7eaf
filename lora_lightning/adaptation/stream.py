"""`StreamAdapter`: online test-time adaptation of a classifier to a stream of items."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from lora_lightning.adaptation.guard import NAN, Guard, Limits
from lora_lightning.adaptation.objectives import RunningMarginal, information_maximisation
from lora_lightning.adaptation.teacher import Snapshot, trained
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.lora.values import check_count, check_number, finite
from lora_lightning.model.calling import classifier, items_in
from lora_lightning.model.probing import evaluating, without_cudnns_rnn
from lora_lightning.model.switching import disabled

PATIENCE = 3  # alarms after which a stream is no longer adapted to


class StreamAdapter:
    r"""Test-time adaptation of a classifier, item by item or batch by batch, in bounded memory.

        inject(model, rank=2, trainable=[], exclude_modules=["fc"])
        stream = StreamAdapter(model)
        for pictures in camera:
            probabilities = stream(pictures)  # (B, K)
        stream.reset()  # another camera

    The last `memory` inputs are kept. Each call takes one step of the loss on them, if their
    classes are diverse, then predicts. After every `memory` new items the guard compares the
    model's predictions of those kept with the source model's; at an alarm the model is reset to
    the source, exactly, and at the third it stays there. All stays in eval mode, BatchNorm's
    statistics too. Online adaptation as in TENT, Wang et al. 2021, arXiv:2006.10726, with another
    loss and a guard.

    A loss that spreads the predictions over all classes turns right ones into wrong ones where
    one class comes many times in a row (Gong et al. 2022, "NOTE: Robust continual test-time
    adaptation against temporal correlation", arXiv:2208.05117). The source model's predictions
    tell such a stretch, and adapting does not move them. With :math:`n_k` of the n kept in class
    k, no step is taken unless

    .. math:: -\log \sum_k \frac{n_k (n_k - 1)}{n (n - 1)} \ge d \log K,

    the entropy of order two (Rényi 1961, "On measures of entropy and information") of the shares
    :math:`\pi_k`, with an estimate of :math:`\sum_k \pi_k^2` that is unbiased however few are kept
    (Simpson 1949, "Measurement of diversity"); nor before K items, or `memory`, are there.

    Args:
        model: A classifier with an adapter on, not merged.
        objective: From logits to a loss; None: information maximisation, with a running mean of
            the predictions.
        memory: Inputs that are kept, two or more.
        learning_rate: Of AdamW.
        limits: Of the guard; None: no guard.
        diversity: d, in [0, 1]; 0: every call takes a step, for an objective that does not ask
            for all classes alike.
        forward: From (model, inputs), or from a batch of inputs alone, to logits (B, K); None: as
            `lora_lightning.model.calling` says.

    Attributes:
        seen_: items since the last reset.
        resets_: (items seen until then, alarm) of each reset by the guard.
        stopped_: whether the guard has ended adapting, until `reset`.

    Raises:
        ConfigError: a value is out of range, or nothing of the model is trained.
    """

    _kept: Any  # inputs
    _before: Tensor  # of those kept: the source model's predictions
    _marginal: RunningMarginal | None
    seen_: int

    def __init__(
        self,
        model: nn.Module,
        objective: Callable[[Tensor], Tensor] | None = None,
        *,
        memory: int = 64,
        learning_rate: float = 1e-3,
        limits: Limits | None = Limits(),  # noqa: B008 - frozen
        diversity: float = 0.95,
        forward: Callable[..., Any] | None = None,
    ):
        check_count("memory", memory, 2, unit="items")
        check_number("learning_rate", learning_rate, "(0, inf)")
        check_number("diversity", diversity, "[0, 1]")
        if not trained(model):
            raise ConfigError("nothing of the model is trained: inject an adapter first")
        self.model, self.objective, self.memory = model, objective, memory
        self.learning_rate, self.limits, self.diversity = learning_rate, limits, diversity
        self._logits = classifier(model, forward)
        self.resets_: list[tuple[int, str]] = []
        self._source = Snapshot(model)
        self._total = 0
        self.reset()

    def reset(self) -> None:
        """Restore the source model, bit for bit, and forget all items and alarms."""
        self._alarms = 0
        self._restart()

    @property
    def stopped_(self) -> bool:
        """Whether the guard has ended adapting, until `reset`."""
        return self._alarms >= PATIENCE

    def __call__(self, inputs: Any) -> Tensor:
        """Inputs (B, …) → probabilities (B, K), after a step on them and on those before.

        Several inputs come as a mapping, such as recordings and their lengths. Floating-point
        inputs of another dtype than the trained parameters' are converted. Inputs that cannot be
        stacked on those kept (of another shape) begin a new memory.

        Raises:
            ConfigError: something else than tensors with a row for each item, or an output without
                logits, see `lora_lightning.model.calling.logits_of`.
            DataError: the inputs, or the source model's predictions of them, hold NaN or infinity;
                nothing was learnt from them.
        """
        inputs = self._converted(inputs)
        with evaluating(self.model):
            # All that a bad input can raise is raised before anything is kept.
            self._keep(inputs, self._by_the_source(inputs))
            if not self.stopped_ and self._diverse():
                with without_cudnns_rnn(self.model.modules()):
                    self._step()
            if self._unchecked >= self.memory:
                self._check()
            found = self._predicted(inputs)
            if not finite(found):
                self._go_back(NAN.format("predictions"))
                found = self._predicted(inputs)
        return found

    def _converted(self, inputs: Any) -> Any:
        # The base's: factors are wider than a base in half precision.
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        count = items_in(inputs)

        def convert(x: Any) -> Any:
            if not isinstance(x, Tensor) or not count or x.shape[:1] != (count,):
                got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise ConfigError(
                    "a stream's inputs are a tensor with a row for each item, or a mapping of "
                    f"several; got {got}. Leave other entries out"
                )
            x = x.detach().to(dtype if x.is_floating_point() else x.dtype)
            if not finite(x):
                raise DataError("the inputs hold NaN or infinity: they are left out")
            return x

        return tree_map(convert, inputs)

    @torch.no_grad()
    def _predicted(self, inputs: Any) -> Tensor:
        found: Tensor = self._logits(inputs).float().softmax(dim=1)
        return found

    def _by_the_source(self, inputs: Any) -> Tensor:
        with disabled(self.model):
            found = self._predicted(inputs)
        if not finite(found):
            raise DataError(
                "the source model's predictions hold NaN, as its values overflow: scale the "
                "inputs as for training; these are left out"
            )
        return found

    def _keep(self, inputs: Any, before: Tensor) -> None:
        count = len(before)
        self._total, self.seen_ = self._total + count, self.seen_ + count
        self._unchecked += count
        kept = self._kept
        if kept is not None and _alike(kept) == _alike(inputs):
            inputs = tree_map(lambda *both: torch.cat(both), kept, inputs)
            before = torch.cat([self._before, before])
        self._kept = tree_map(lambda x: x[-self.memory :].clone(), inputs)
        self._before = before[-self.memory :].clone()

    def _diverse(self) -> bool:
        """Whether the source model finds the classes of those kept mixed."""
        n, classes = self._before.shape
        if n < 2 or not self.diversity:
            return n >= 2  # one item is too few for the loss
        counts = self._before.argmax(dim=1).bincount(minlength=classes).double()
        alike = float((counts * (counts - 1)).sum()) / (n * (n - 1))
        return n >= min(classes, self.memory) and alike <= math.pow(classes, -self.diversity)

    def _step(self) -> None:
        assert self._kept is not None
        with torch.enable_grad():
            loss = self._loss(self._logits(self._kept))
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        slopes = [p.grad for p in trained(self.model).values() if p.grad is not None]
        # A gradient whose square overflows would stay in the optimizer's moments.
        if bool(torch.isfinite(torch.nn.utils.get_total_norm(slopes))):
            self._optimizer.step()
        else:
            self._forget()

    def _loss(self, logits: Tensor) -> Tensor:
        if self.objective is not None:
            return self.objective(logits)
        if self._marginal is None:
            self._marginal = RunningMarginal(logits.shape[1])
        return information_maximisation(logits, marginal=self._marginal)

    def _check(self) -> None:
        assert self._kept is not None
        self._unchecked = 0
        if self.limits is None or self.stopped_:
            return
        limits = self.limits
        if not self._diverse():  # to be surer of one class alone is no collapse
            limits = dataclasses.replace(limits, marginal_entropy=0.0)
        guard = Guard(self._before, limits=limits)
        alarms = guard.check(self._predicted(self._kept)).alarms
        if alarms:
            self._go_back(alarms[0])

    def _go_back(self, alarm: str) -> None:
        self.resets_.append((self._total, alarm))
        self._alarms += 1
        self._restart()

    def _restart(self) -> None:
        self._source.restore(self.model)
        # The optimizer's moments belong to forgotten items.
        self._optimizer = torch.optim.AdamW(trained(self.model).values(), lr=self.learning_rate)
        self.seen_ = 0
        self._forget()

    def _forget(self) -> None:
        self._kept, self._marginal, self._unchecked = None, None, 0


def _alike(inputs: Any) -> tuple[object, ...]:
    """What inputs must share to be stacked."""
    each = [(x.shape[1:], x.dtype, x.device) for x in tree_leaves(inputs)]
    return tree_structure(inputs), each
