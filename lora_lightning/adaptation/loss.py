"""`Loss`: the loss of a `TransductiveTask`, an objective with regularisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lora_lightning.adaptation import objectives
from lora_lightning.adaptation.objectives import OBJECTIVES, Objective
from lora_lightning.adaptation.pseudo_labels import PseudoLabels, centroid
from lora_lightning.adaptation.target import Predicted
from lora_lightning.errors import ConfigError

Function = Callable[[Tensor], Tensor]  # logits → loss


class Loss:
    r"""The objective, pseudo-labels, and regularisers that keep the model near the source.

    :math:`L = O + w\,CE(p, \hat y) + v\,KL(p^s \| p) + \lambda \sum_l \|s_l B_l A_l\|^2`.

    Args:
        objective: A name in `OBJECTIVES`, an `Objective`, or a function from logits to a loss.
        prior: π of the diversity term; None: uniform.
        diversity: d, its weight.
        pseudo_label_weight: w.
        source_weight: v.
        pull: λ.
        batch_size: Items in a batch.

    Attributes:
        labels: of the round; None without pseudo-labels.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        objective: str | Objective | Function,
        prior: Tensor | None,
        diversity: float,
        pseudo_label_weight: float,
        source_weight: float,
        pull: float,
        batch_size: int,
    ):
        if not callable(objective) and objective not in OBJECTIVES:
            raise ConfigError(
                f"objective must be one of {', '.join(OBJECTIVES)}, or a function from logits to a "
                f"loss; got {objective!r}"
            )
        for name, value in (
            ("diversity", diversity),
            ("pseudo_label_weight", pseudo_label_weight),
            ("source_weight", source_weight),
            ("pull", pull),
        ):
            if not value >= 0:
                raise ConfigError(f"{name} must be 0 or more, got {value}")
        known = OBJECTIVES.get(objective) if isinstance(objective, str) else objective
        self.objective = known(prior, diversity, batch_size) if isinstance(known, type) else known
        self.pseudo_label_weight, self.source_weight = pseudo_label_weight, source_weight
        self.pull = pull
        self.labels: PseudoLabels | None = None
        self._source: Tensor | None = None

    def begin(self, source: Predicted) -> None:
        """Take the source model's predictions."""
        self._source = source.probabilities
        if isinstance(self.objective, Objective):
            self.objective.begin(source)

    def begin_round(self, now: Predicted) -> None:
        """Take the predictions at the start of a round, for labels and neighbours."""
        if self.pseudo_label_weight:
            self.labels = centroid(now.features, now.probabilities)
        if isinstance(self.objective, Objective):
            self.objective.begin_round(now)

    def __call__(self, logits: Tensor, indices: Tensor, model: nn.Module) -> Tensor:
        """The loss of a batch: logits (B, K) of the items with these indices (B,)."""
        known = isinstance(self.objective, Objective)
        loss: Tensor = self.objective(logits, *([indices] if known else []))
        if self.labels is not None:
            labels, weights = (
                t[indices].to(logits.device) for t in (self.labels.labels, self.labels.weights)
            )
            pseudo = objectives.pseudo_cross_entropy(logits, labels, weights)
            loss = loss + self.pseudo_label_weight * pseudo
        if self.source_weight:
            assert self._source is not None
            before = self._source[indices].to(logits.device)
            loss = loss + self.source_weight * objectives.source_divergence(logits, before)
        if self.pull:
            loss = loss + self.pull * objectives.pull_to_source(model)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        objective = self.objective
        return {
            "source": self._source,
            "labels": None if self.labels is None else vars(self.labels),
            "objective": objective.state_dict() if isinstance(objective, Objective) else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._source = state["source"]
        self.labels = None if state["labels"] is None else PseudoLabels(**state["labels"])
        if isinstance(self.objective, Objective):
            self.objective.load_state_dict(state["objective"])
