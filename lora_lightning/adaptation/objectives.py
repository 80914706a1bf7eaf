"""Objectives, losses without labels: tensors in, a differentiable scalar out.

Legend of shapes: B items, K classes. All compute in float32, also under autocast. The caller checks
that the logits are finite: a check here would synchronise with the GPU in each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adaptation.neighbours import check_logits, nearest
from lora_lightning.adaptation.target import Predicted
from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_number
from lora_lightning.registry import Registry

OBJECTIVES: Registry[Callable[..., Any]] = Registry("objective")
NEIGHBOURS = 4  # of each item, in neighbour consistency


def entropy(logits: Tensor) -> Tensor:
    r"""Mean entropy of the predictions in nats, :math:`-\frac1B\sum_{ik} p_{ik}\log p_{ik}`.

    Alone it collapses easily: one class for all is its minimum. Grandvalet & Bengio 2004; TENT,
    Wang et al. 2021, arXiv:2006.10726.

    Args:
        logits: (B, K).

    Raises:
        ConfigError: they are of another shape.
    """
    log_p = check_logits(logits).log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


class RunningMarginal:
    r"""The running mean of the predictions, where a batch is small beside the number of classes.

    Its value is :math:`m \leftarrow \mu\,m + (1 - \mu)\,\bar p`; its gradient is that of the batch
    mean :math:`\bar p`, so that the loss pulls as hard as it does without.

    Args:
        classes: K.
        momentum: μ, in [0, 1).

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(self, classes: int, momentum: float = 0.9):
        if classes < 2 or not 0 <= momentum < 1:
            raise ConfigError(
                f"expected two classes or more and a momentum in [0, 1), got {classes}, {momentum}"
            )
        self.classes, self.momentum = classes, momentum
        self.mean: Tensor | None = None

    def reset(self) -> None:
        """Forget all batches."""
        self.mean = None

    def update(self, batch_mean: Tensor) -> Tensor:
        """Add a batch's mean (K,); returns the running mean (K,) with its gradient."""
        now = batch_mean.detach()
        before = now if self.mean is None else self.mean.to(now)
        self.mean = self.momentum * before + (1 - self.momentum) * now
        return self.mean + (batch_mean - now)


def information_maximisation(
    logits: Tensor,
    prior: Tensor | None = None,
    diversity: float = 1.0,
    marginal: RunningMarginal | None = None,
) -> Tensor:
    r"""Information maximisation: low entropy of each prediction, high entropy of their mean.

    The loss is :math:`\frac1B\sum_i H(p_i) + d\,KL(\bar p\|\pi)`.
    Krause et al. 2010, "Discriminative clustering by regularized information maximization"; SHOT,
    Liang et al. 2020, arXiv:2002.08546.

    Args:
        logits: (B, K).
        prior: π (K,), the share of each class; None: uniform.
        diversity: d; 0 switches the second term off, for targets that lack classes.
        marginal: Takes the place of the batch's mean prediction.

    Raises:
        ConfigError: shapes that do not fit, a prior that is none, a diversity below 0.
    """
    check_number("diversity", diversity, "[0, inf)")
    loss = entropy(logits)
    if not diversity:
        return loss
    own = check_logits(logits).softmax(dim=1).mean(dim=0)
    mean = own if marginal is None else marginal.update(own)
    wanted = torch.full_like(mean, 1 / len(mean)) if prior is None else _prior(prior, mean)
    # The floor keeps the gradient finite where a class is never predicted.
    return loss + diversity * (mean * (mean.clamp_min(1e-8) / wanted).log()).sum()


def minimum_class_confusion(logits: Tensor, temperature: float = 2.5) -> Tensor:
    r"""Minimum class confusion: how far classes are predicted together, by certainty.

    With :math:`Y = softmax(logits / T)` and weights W that grow as the entropy of a row falls,
    :math:`C = Y^T W Y`, each row divided by its sum; the loss is the sum off the diagonal over K.
    Jin et al. 2020, "Minimum class confusion for versatile domain adaptation", arXiv:1912.03699.

    Args:
        logits: (B, K).
        temperature: T, above 0.

    Raises:
        ConfigError: wrong shapes, or a temperature that is not above 0.
    """
    check_number("temperature", temperature, "(0, inf)")
    log_y = (check_logits(logits) / temperature).log_softmax(dim=1)
    y = log_y.exp()
    weights = 1 + (y * log_y).sum(dim=1).exp()
    weights = len(y) * weights / weights.sum()
    confusion = (y * weights[:, None]).T @ y
    confusion = confusion / confusion.sum(dim=1, keepdim=True).clamp_min(1e-12)
    return (confusion.sum() - confusion.trace()) / len(confusion)


def neighbour_consistency(logits: Tensor, near: Tensor, affinities: Tensor | None = None) -> Tensor:
    r"""Agreement with the neighbours, :math:`-\frac1B\sum_i\sum_j a_{ij}\,p_i^T q_{ij}`.

    Yang et al. 2021, "Exploiting the intrinsic neighborhood structure for source-free domain
    adaptation" (NRC), arXiv:2110.04202, with a = 1 for reciprocal neighbours and 0.1 for others.
    Alone it collapses; the paper adds the diversity term.

    Args:
        logits: (B, K).
        near: (B, k, K) probabilities q of each item's neighbours, not trained through.
        affinities: (B, k), 0 or more; None: all 1.

    Raises:
        ConfigError: shapes that do not fit.
    """
    p = check_logits(logits).softmax(dim=1)
    if near.ndim != 3 or near.shape[::2] != p.shape or not near.shape[1]:
        raise ConfigError(
            f"expected the neighbours' probabilities ({len(p)}, k, {p.shape[1]}), got "
            f"{tuple(near.shape)}"
        )
    if affinities is not None and affinities.shape != near.shape[:2]:
        raise ConfigError(f"expected affinities {tuple(near.shape[:2])}, got {affinities.shape}")
    alike = (p[:, None] * near.detach().to(p)).sum(dim=2)
    return -(alike if affinities is None else alike * affinities.to(p)).sum(dim=1).mean()


class Objective:
    """An objective with state from the target's predictions; others are plain functions.

        @OBJECTIVES.register("my-objective")  # as well on a function from logits to a loss
        class MyObjective(Objective):
            def __call__(self, logits, indices):
                return entropy(logits)

    Args:
        prior: π, the share of each class in the target; None: uniform.
        diversity: d, the weight of the diversity term.
        batch_size: Items in a batch.
    """

    def __init__(self, prior: Tensor | None = None, diversity: float = 1.0, batch_size: int = 32):
        self.prior, self.diversity, self.batch_size = prior, diversity, batch_size

    def begin(self, source: Predicted) -> None:
        """Take the source model's predictions; not called where a fit is resumed."""

    def begin_round(self, now: Predicted) -> None:
        """Take the model's predictions at the start of a round."""

    def __call__(self, logits: Tensor, indices: Tensor) -> Tensor:
        """The loss of a batch: logits (B, K) of the items with these indices (B,)."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: all that it holds, as plain types and tensors."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        vars(self).update(state)


@OBJECTIVES.register("information-maximisation")
class InformationMaximisation(Objective):
    """`information_maximisation`; with a running mean where batches are small beside K."""

    marginal: RunningMarginal | None = None

    def begin(self, source: Predicted) -> None:
        """Add a running mean, where batches are small."""
        classes = source.probabilities.shape[1]
        if self.batch_size < 4 * classes:  # too few to estimate the classes' shares
            self.marginal = RunningMarginal(classes)

    def __call__(self, logits: Tensor, indices: Tensor) -> Tensor:
        """The loss of a batch."""
        return information_maximisation(logits, self.prior, self.diversity, self.marginal)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**vars(self), "marginal": self.marginal and dict(vars(self.marginal))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        super().load_state_dict(state)
        if state["marginal"] is not None:
            self.marginal = RunningMarginal(state["marginal"]["classes"])
            vars(self.marginal).update(state["marginal"])


@OBJECTIVES.register("neighbour-consistency")
class NeighbourConsistency(InformationMaximisation):
    """`neighbour_consistency` with the diversity term."""

    def begin_round(self, now: Predicted) -> None:
        """Find neighbours, and keep their predictions."""
        self.bank = now.probabilities, nearest(now.features, NEIGHBOURS)[0]

    def __call__(self, logits: Tensor, indices: Tensor) -> Tensor:
        """The loss of a batch."""
        probabilities, near = self.bank
        said = probabilities[near[indices]].to(logits.device)
        alike = neighbour_consistency(logits, said) / said.shape[1]
        return alike + (super().__call__(logits, indices) - entropy(logits))


OBJECTIVES.register("minimum-class-confusion")(minimum_class_confusion)
OBJECTIVES.register("entropy")(entropy)


def _prior(prior: Tensor, mean: Tensor) -> Tensor:
    # Checked on its own device: as a rule the CPU, where nothing is synchronised.
    found = prior if isinstance(prior, Tensor) else torch.tensor(prior, device="cpu")
    if found.shape != mean.shape:
        raise ConfigError(f"prior must hold a share for each of {len(mean)} classes")
    if float(found.min()) <= 0 or not math.isclose(float(found.sum()), 1, abs_tol=1e-3):
        raise ConfigError("prior must hold shares above 0 that sum to 1")
    return found.to(mean)
