"""`shift`: how far a target lies from the source, at which depth, and what to make of it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_lightning.distances import (
    Interval,
    bootstrap,
    coral_distance,
    frechet_distance,
    mmd,
)
from lora_lightning.errors import DataError
from lora_lightning.source_statistics import HEAD, SourceStatistics, features_of
from lora_lightning.transduction.validators import nuclear_norm

if TYPE_CHECKING:
    from rich.table import Table

NEAR = 0.05  # points of accuracy that the source model loses at most, as expected
FAR = 0.5  # and from which on a target is called too far
PAIRS = 500  # items of a set that the slower distances look at in each repeat
FOLDS = 5


@dataclass(frozen=True)
class Shift:
    """What `shift` measured; intervals are of 95 %.

    Attributes:
        verdict: ``"near"``, ``"adaptable"`` or ``"too far"``, from `confidence_drop`; see `shift`.
        confidence_drop: By how much the source model is less sure of the target than of the
            source, in mean confidence.
        expected_accuracy: Of the source model on the target, by average thresholded confidence;
            None where the source's labels were not known.
        source_accuracy: On the source's items, likewise.
        nuclear_norm: Of the answers on the target, see `lora_lightning.transduction.validators`.
        proxy_a: Proxy A-distance, 0 (no classifier tells the domains apart) to 2.
        mmd: Squared maximum mean discrepancy.
        coral: CORAL distance.
        frechet: Fréchet distance; 1 is the source's whole variance.
        layers: Fréchet distance of each layer's features: which depth moved.
        items: Of the source's sample and of the target.
    """

    verdict: str
    confidence_drop: float
    expected_accuracy: float | None
    source_accuracy: float | None
    nuclear_norm: float
    proxy_a: Interval
    mmd: Interval
    coral: Interval
    frechet: Interval
    layers: dict[str, float]
    items: tuple[int, int]

    def table(self) -> Table:
        """A rich table."""
        from rich.table import Table

        table = Table(
            title=f"shift: {self.verdict}", caption=self.sentence(), caption_justify="left"
        )
        table.add_column("measure")
        table.add_column("value", justify="right")
        table.add_column("95 % interval", justify="right")
        for name in ("proxy_a", "mmd", "coral", "frechet"):
            value, low, high = getattr(self, name)
            table.add_row(name, f"{value:.3g}", f"{low:.3g} … {high:.3g}")
        for name, value in self.layers.items():
            table.add_row(f"  Fréchet at {name}", f"{value:.3g}", "")
        return table

    def sentence(self) -> str:
        """The verdict in words, with what it rests on and how fallible it is."""
        what = {
            "near": "The target is near: the source model should serve as it is.",
            "adaptable": "The target has moved, and can be adapted to.",
            "too far": "The target may be too far: adapt with labels, or not at all.",
        }[self.verdict]
        drop = f"Mean confidence is {100 * self.confidence_drop:.0f} points below the source's"
        if self.expected_accuracy is None or self.source_accuracy is None:
            return f"{what} {drop}."
        return (
            f"{what} {drop}; expected accuracy {100 * self.expected_accuracy:.0f} %, on the source "
            f"{100 * self.source_accuracy:.0f} %. Both are guesses without labels: a model can be "
            "sure and wrong."
        )

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=80, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()


def shift(
    model: nn.Module,
    source: SourceStatistics | str | os.PathLike[str] | Any,
    target: Any,
    *,
    labels: Tensor | None = None,
    batch_size: int = 64,
    repeats: int = 100,
    seed: int = 0,
) -> Shift:
    r"""Measure how far a target lies from the source, as a model sees them; no target label needed.

    Features are projected on the source's leading directions, and scaled by its deviation:

    - proxy A-distance :math:`2(1 - 2\epsilon)`, with ε the balanced error of a logistic regression
      that tells the domains apart, five-fold cross-validated (Ben-David et al. 2010, "A theory of
      learning from different domains"); its interval by bootstrap over the held-out answers. It
      saturates long before harm is done, so it informs and decides nothing;
    - MMD, CORAL and Fréchet distance, see `lora_lightning.distances`;
    - expected accuracy: the part of the target's answers with a confidence above t, where t is
      such that it would be right on the source (Garg et al. 2022, "Leveraging unlabeled data to
      predict out-of-distribution performance", arXiv:2201.04234).

    Args:
        model: The source model, a classifier.
        source: Its `SourceStatistics`, a file of them, or data of the source (see
            `SourceStatistics.of`).
        target: Data of the target: a dataset, a loader or a tensor.
        labels: Of `source`, where it is data.
        batch_size: Items that the model is run on at once.
        repeats: Of the bootstrap.
        seed: Of what is drawn.

    Returns:
        The measures; ``print`` shows them.

    Raises:
        DataError: too few items, NaN, or statistics of another model.
        FileNotFoundError: there is no such file.
        AdapterFileError: the file holds no statistics.
    """
    if isinstance(source, (str, os.PathLike)):
        source = SourceStatistics.load(source)
    elif not isinstance(source, SourceStatistics):
        source = SourceStatistics.of(model, source, labels, batch_size)
    found, said = features_of(model, target, batch_size)
    if len(said.probabilities) < 2:
        raise DataError(f"a shift needs two items of the target or more, got {len(found[HEAD])}")
    _check_same(source, found)
    layers = {k: frechet_distance(s.sample, s.project(found[k])) for k, s in source.layers.items()}
    s, t = source.layers[HEAD].sample, source.layers[HEAD].project(found[HEAD])
    few = (_few(s), _few(t))
    confidence = said.probabilities.max(dim=1).values
    drop = float(source.confidence.mean() - confidence.mean())
    return Shift(
        verdict(drop),
        drop,
        expected_accuracy(source, confidence),
        source.accuracy,
        nuclear_norm(said.probabilities),
        proxy_a_distance(*few, repeats=repeats, seed=seed),
        bootstrap(mmd, *few, repeats=repeats, seed=seed),
        bootstrap(coral_distance, s, t, repeats=repeats, seed=seed),
        bootstrap(frechet_distance, s, t, repeats=repeats, seed=seed),
        layers,
        (len(s), len(t)),
    )


def verdict(drop: float) -> str:
    """In a word, from how much less sure the model is of the target than of the source."""
    return "near" if drop < NEAR else "adaptable" if drop < FAR else "too far"


def expected_accuracy(source: SourceStatistics, confidence: Tensor) -> float | None:
    """Average thresholded confidence, in [0, 1]."""
    if source.accuracy is None:
        return None
    threshold = source.confidence.double().quantile(1 - source.accuracy)
    return float((confidence.double() >= threshold).double().mean())


def proxy_a_distance(
    source: Tensor, target: Tensor, *, repeats: int = 100, seed: int = 0
) -> Interval:
    """2(1 − 2ε) of features (N, D) and (M, D), at least 0; see `shift`.

    Raises:
        DataError: fewer than two items of a domain.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n = min(len(source), len(target))
    if n < 2:
        raise DataError(f"the proxy A-distance needs two items of each domain, got {n}")
    x = torch.cat([source, target]).double().numpy()
    y = np.repeat([0, 1], [len(source), len(target)])
    # Balanced: as many of one domain as of the other count, whatever their numbers.
    judge = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.1, max_iter=500, class_weight="balanced")
    )
    folds = StratifiedKFold(min(FOLDS, n), shuffle=True, random_state=seed)
    wrong = cross_val_predict(judge, x, y, cv=folds) != y
    rng = np.random.default_rng(seed)

    def distance(s: Any, t: Any) -> float:
        return max(0.0, 2 * (1 - float(s.mean() + t.mean())))

    parts = wrong[y == 0], wrong[y == 1]
    drawn = [distance(*(rng.choice(p, len(p)) for p in parts)) for _ in range(repeats)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(distance(*parts), float(low), float(high))


def _few(x: Tensor) -> Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:PAIRS]]


def _check_same(source: SourceStatistics, found: dict[str, Tensor]) -> None:
    for name, layer in source.layers.items():
        width = found[name].shape[1] if name in found else math.nan
        if width != len(layer.mean):
            raise DataError(
                f"the statistics are of another model: at {name!r} they have {len(layer.mean)} "
                f"features, this model {'none' if math.isnan(width) else width}"
            )
