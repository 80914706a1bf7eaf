"""`StreamAdapter`: online test-time adaptation of a classifier to a stream of items."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_lightning.adaptation.guard import Guard, Limits
from lora_lightning.adaptation.objectives import RunningMarginal, information_maximisation
from lora_lightning.adaptation.teacher import Snapshot, trained
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.model.probing import evaluating, without_cudnns_rnn
from lora_lightning.model.switching import disabled


class StreamAdapter:
    """Test-time adaptation of a classifier, item by item or batch by batch, in bounded memory.

        inject(model, rank=2, trainable=[], exclude_modules=["fc"])
        stream = StreamAdapter(model)
        for pictures in camera:
            probabilities = stream(pictures)  # (B, K)
        stream.reset()  # another camera

    The last `memory` inputs are kept. Each call takes one step of the loss on them, then
    predicts. After every `memory` new items the guard compares the model's predictions of those
    kept with the source model's; at an alarm the model is reset to the source, exactly. All stays
    in eval mode, BatchNorm's statistics too. Online adaptation as in TENT, Wang et al. 2021,
    arXiv:2006.10726, with another loss and a guard.

    Args:
        model: From inputs (B, …) to logits (B, K), with an adapter on, not merged.
        objective: From logits to a loss; None: information maximisation, with a running mean of
            the predictions.
        memory: Inputs that are kept, two or more.
        learning_rate: Of AdamW.
        limits: Of the guard; None: no guard.

    Attributes:
        seen_: items since the last reset.
        resets_: (items seen until then, alarm) of each reset by the guard.

    Raises:
        ConfigError: a value is out of range, or nothing of the model is trained.
        DataError: the source model gives NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Callable[[Tensor], Tensor] | None = None,
        *,
        memory: int = 64,
        learning_rate: float = 1e-3,
        limits: Limits | None = Limits(),  # noqa: B008 - frozen
    ):
        if memory < 2:
            raise ConfigError(f"memory must be at least 2 items, got {memory}")
        if not learning_rate > 0:
            raise ConfigError(f"learning_rate must be above 0, got {learning_rate}")
        if not trained(model):
            raise ConfigError("nothing of the model is trained: inject an adapter first")
        self.model, self.objective, self.memory = model, objective, memory
        self.learning_rate, self.limits = learning_rate, limits
        self.resets_: list[tuple[int, str]] = []
        self._source = Snapshot(model)
        self._total = 0
        self.reset()

    def reset(self) -> None:
        """Restore the source model, bit for bit, and forget all items."""
        self._source.restore(self.model)
        # The optimizer's moments belong to forgotten items.
        self._optimizer = torch.optim.AdamW(trained(self.model).values(), lr=self.learning_rate)
        self._marginal: RunningMarginal | None = None
        self._kept: Tensor | None = None
        self._unchecked = 0
        self.seen_ = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        """Inputs (B, …) → probabilities (B, K), after a step on them and on those before.

        Raises:
            DataError: the inputs, or the source model's predictions of them, hold NaN; nothing was
                learnt from them.
        """
        if not bool(torch.isfinite(inputs).all()):
            raise DataError("the inputs hold NaN or infinity: they are left out")
        self._keep(inputs.detach())
        with evaluating(self.model):
            with without_cudnns_rnn(self.model.modules()):
                self._step()
            if self._unchecked >= self.memory:
                self._check()
            with torch.no_grad():
                found: Tensor = self.model(inputs).float().softmax(dim=1)
            if not bool(torch.isfinite(found).all()):
                found = self._back("the predictions are NaN: the learning rate is too high", inputs)
        return found

    def _keep(self, inputs: Tensor) -> None:
        count = len(inputs)
        self._total, self.seen_ = self._total + count, self.seen_ + count
        self._unchecked += count
        both = inputs if self._kept is None else torch.cat([self._kept, inputs])
        self._kept = both[-self.memory :].clone()

    def _step(self) -> None:
        assert self._kept is not None
        if len(self._kept) < 2:
            return  # one item is too few for the loss
        with torch.enable_grad():
            loss = self._loss(self.model(self._kept))
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

    def _loss(self, logits: Tensor) -> Tensor:
        if self.objective is not None:
            return self.objective(logits)
        if self._marginal is None:
            self._marginal = RunningMarginal(logits.shape[1])
        return information_maximisation(logits, marginal=self._marginal)

    @torch.no_grad()
    def _check(self) -> None:
        assert self._kept is not None
        self._unchecked = 0
        if self.limits is None:
            return
        now = self.model(self._kept).float().softmax(dim=1)
        with disabled(self.model):
            before = self.model(self._kept).float().softmax(dim=1)
        alarms = Guard(before, limits=self.limits).check(now).alarms
        if alarms:
            self._go_back(alarms[0])

    @torch.no_grad()
    def _back(self, alarm: str, inputs: Tensor) -> Tensor:
        self._go_back(alarm)
        found: Tensor = self.model(inputs).float().softmax(dim=1)
        return found

    def _go_back(self, alarm: str) -> None:
        self.resets_.append((self._total, alarm))
        self.reset()
