"""`Loss`: what a `TransductiveTask` minimises, put together from objectives."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lora_lightning.adaptation import objectives
from lora_lightning.adaptation.neighbours import nearest
from lora_lightning.adaptation.pseudo_labels import PseudoLabels, centroid
from lora_lightning.adaptation.target import Predicted
from lora_lightning.errors import ConfigError

OBJECTIVES = (
    "information-maximisation",
    "neighbour-consistency",
    "minimum-class-confusion",
    "entropy",
)
NEIGHBOURS = 4  # of each item, that neighbour consistency looks at
Objective = Callable[[Tensor], Tensor]


class Loss:
    r"""The objective, and what it is held back by.

    :math:`L = O + w\,CE(p, \hat y) + v\,KL(p^s \| p) + \lambda \sum_l \|s_l B_l A_l\|^2`.

    Args:
        objective: One of `OBJECTIVES`, or a function from logits to a loss.
        prior: π of the diversity term; None: uniform.
        diversity: d, its weight.
        pseudo_label_weight: w.
        source_weight: v.
        pull: λ.

    Attributes:
        labels: of the round; None without pseudo-labels.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        objective: str | Objective,
        prior: Tensor | None,
        diversity: float,
        pseudo_label_weight: float,
        source_weight: float,
        pull: float,
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
        self.objective, self.prior, self.diversity = objective, prior, diversity
        self.pseudo_label_weight, self.source_weight = pseudo_label_weight, source_weight
        self.pull = pull
        self.labels: PseudoLabels | None = None
        self._source: Tensor | None = None
        self._marginal: objectives.RunningMarginal | None = None
        self._bank: tuple[Tensor, Tensor] | None = None  # probabilities, neighbours

    def begin(self, source: Predicted, batch_size: int) -> None:
        """The source model's predictions are known."""
        self._source = source.probabilities
        classes = source.probabilities.shape[1]
        if batch_size < 4 * classes:  # too few to see the classes' shares in
            self._marginal = objectives.RunningMarginal(classes)

    def begin_round(self, now: Predicted) -> None:
        """The model's predictions at the start of a round: labels and neighbours by them."""
        if self.pseudo_label_weight:
            self.labels = centroid(now.features, now.probabilities)
        if self.objective == "neighbour-consistency":
            self._bank = now.probabilities, nearest(now.features, NEIGHBOURS)[0]

    def __call__(self, logits: Tensor, indices: Tensor, model: nn.Module) -> Tensor:
        """The loss of a batch: logits (B, K) of the items with these indices (B,)."""
        loss = self._objective(logits, indices)
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

    def _objective(self, logits: Tensor, indices: Tensor) -> Tensor:
        if callable(self.objective):
            return self.objective(logits)
        if self.objective == "entropy":
            return objectives.entropy(logits)
        if self.objective == "minimum-class-confusion":
            return objectives.minimum_class_confusion(logits)
        if self.objective == "neighbour-consistency":
            assert self._bank is not None
            probabilities, near = self._bank
            said = probabilities[near[indices]].to(logits.device)
            alike = objectives.neighbour_consistency(logits, said) / said.shape[1]
            return alike + self._spread(logits)
        return objectives.information_maximisation(
            logits, self.prior, self.diversity, self._marginal
        )

    def _spread(self, logits: Tensor) -> Tensor:
        """Diversity alone."""
        whole = objectives.information_maximisation(
            logits, self.prior, self.diversity, self._marginal
        )
        return whole - objectives.entropy(logits)
