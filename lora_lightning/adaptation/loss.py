"""`Loss`: the loss of a `TransductiveTask`, an objective with pseudo-labels and regularisers.

Legend of shapes: B items, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adaptation.class_centroids import soft_centroids
from lora_lightning.adaptation.neighbours import check_logits
from lora_lightning.adaptation.objectives import OBJECTIVES, Objective
from lora_lightning.adaptation.pseudo_labels import PseudoLabels
from lora_lightning.adaptation.target import Predicted
from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_number
from lora_lightning.model.shrinkage import squared_change
from lora_lightning.model.view import View

Function = Callable[[Tensor], Tensor]  # logits → loss


def pseudo_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Weighted mean of the cross-entropy to pseudo-labels; 0, with a gradient, where none counts.

    Lee 2013, "Pseudo-label: the simple and efficient semi-supervised learning method".

    Args:
        logits: (B, K).
        labels: (B,) int64; −1 is left out.
        weights: (B,), 0 or more; None: all 1.
        smoothing: Part of the label spread over all classes, in [0, 1).

    Raises:
        ConfigError: shapes that do not fit, or a smoothing out of range.
    """
    if labels.shape != (len(logits),) or (weights is not None and weights.shape != labels.shape):
        raise ConfigError(f"expected one label (and weight) for each of {len(logits)} items")
    check_number("smoothing", smoothing, "[0, 1)")
    each = torch.nn.functional.cross_entropy(
        check_logits(logits), labels, ignore_index=-1, reduction="none", label_smoothing=smoothing
    )
    counted = (labels >= 0).to(each) if weights is None else weights.to(each) * (labels >= 0)
    return (each * counted).sum() / counted.sum().clamp_min(1e-12)


def consistency(weak: Tensor, strong: Tensor, least: float = 0.0) -> Tensor:
    """Cross-entropy of a strongly augmented view to the prediction of the weakly augmented one.

    Only items whose weak view has a confidence of `least` or more count; 0 where none does. Sohn
    et al. 2020, "FixMatch", arXiv:2001.07685.

    Args:
        weak: (B, K) logits, not trained through.
        strong: (B, K) logits.
        least: In [0, 1].

    Raises:
        ConfigError: shapes that do not fit, or `least` out of range.
    """
    if weak.shape != strong.shape or not 0 <= least <= 1:
        raise ConfigError(
            f"expected two views of the same items and least in [0, 1], got {tuple(weak.shape)}, "
            f"{tuple(strong.shape)} and {least}"
        )
    said = check_logits(weak).detach().softmax(dim=1)
    counted = (said.amax(dim=1) >= least).to(said)
    each = -(said * check_logits(strong).log_softmax(dim=1)).sum(dim=1)
    return (each * counted).sum() / counted.sum().clamp_min(1)


def source_divergence(logits: Tensor, source: Tensor) -> Tensor:
    r"""How far the predictions leave the source's, :math:`\frac1B\sum_i KL(p^s_i \| p_i)`, in nats.

    Li & Hoiem 2016, "Learning without forgetting", arXiv:1606.09282.

    Args:
        logits: (B, K).
        source: (B, K) probabilities by the source model.

    Raises:
        ConfigError: shapes that do not fit.
    """
    if source.shape != logits.shape:
        raise ConfigError(f"expected the source's {tuple(logits.shape)}, got {tuple(source.shape)}")
    log_p = check_logits(logits).log_softmax(dim=1)
    before = source.detach().to(log_p)
    found: Tensor = (torch.special.xlogy(before, before) - before * log_p).sum(dim=1).mean()
    return found


def pull_to_source(model: nn.Module) -> Tensor:
    """How far the adapter moves the weights, see `lora_lightning.model.shrinkage.squared_change`.

    Args:
        model: With an adapter on, not merged.

    Raises:
        ConfigError: the model has no live factors.
    """
    layers = View(model).adapted.values()
    factors = [f for m in layers for f in m.factors_of(m.lora_active).values()]
    if not factors:
        raise ConfigError("the model has no live adapter to pull to the source: inject one first")
    return squared_change(factors)


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
            check_number(name, value, "[0, inf)")
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

    def begin_round(self, now: Predicted, label: bool = True) -> None:
        """Take the predictions at the start of a round, for neighbours, and for pseudo-labels."""
        if label and self.pseudo_label_weight:
            weights, labels = soft_centroids(now.features, now.probabilities).max(dim=1)
            self.labels = PseudoLabels(labels, weights, [""] * len(labels))
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
            pseudo = pseudo_cross_entropy(logits, labels, weights)
            loss = loss + self.pseudo_label_weight * pseudo
        if self.source_weight:
            assert self._source is not None
            before = self._source[indices].to(logits.device)
            loss = loss + self.source_weight * source_divergence(logits, before)
        if self.pull:
            loss = loss + self.pull * pull_to_source(model)
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
