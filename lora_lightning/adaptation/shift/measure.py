"""`shift`: distance of a target from the source in a model's features.

Legend of shapes: N source items, M target items, D features, K classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_lightning.adaptation import validators as score
from lora_lightning.adaptation.shift.batch_norm_agreement import Opinion, second_opinion
from lora_lightning.adaptation.shift.distances import (
    Interval,
    bootstrap,
    coral_distance,
    frechet_distance,
    mmd,
)
from lora_lightning.adaptation.shift.expected import (
    expected_accuracy,
    expected_drop,
    expected_interval,
    expected_of_adapted,
)
from lora_lightning.adaptation.shift.features import HEAD, features_of
from lora_lightning.adaptation.shift.source_statistics import SourceStatistics
from lora_lightning.adaptation.shift.verdicts import CONFIDENCE, SPREAD, STEADINESS, Shift, verdict
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.linalg.torch_settings import shuffled
from lora_lightning.model import state as states
from lora_lightning.model.calling import classifier
from lora_lightning.model.switching import adapters, disabled

PAIRS = 200  # items of a set that enter the pairwise distances of each repeat
FOLDS = 5
_LAYER_REPEATS = 10


def shift(
    model: nn.Module,
    source: SourceStatistics | str | os.PathLike[str] | Any,
    target: Any,
    *,
    labels: Tensor | None = None,
    forward: Callable[..., Any] | None = None,
    batch_size: int = 64,
    repeats: int = 100,
    seed: int = 0,
) -> Shift:
    r"""Measure the shift from source to target in a model's features; needs no target labels.

        print(shift(model, "source_statistics.safetensors", target))

    The head's input and each block's output are projected on the source's leading directions, and
    scaled by its deviation:

    - proxy A-distance :math:`2(1 - 2\epsilon)`, with ε the balanced error of a logistic regression
      between the domains, five-fold cross-validated (Ben-David et al. 2010, "A theory of
      learning from different domains"). It saturates long before accuracy suffers, so the
      verdict does not use it;
    - MMD, CORAL and Fréchet distance, see `lora_lightning.adaptation.shift.distances`;
    - expected accuracy with its interval, see `expected_accuracy`: from the model's confidence and,
      with BatchNorm, its agreement with itself under the target's statistics. The verdict is its
      drop from source to target: "near" below 5 points, "too far" from 40, or from
      a Fréchet distance of 1, where no accuracy is told.

    A model with an adapter is measured without it, and once more with it for `agreement` and
    `expected_adapted`, see `expected_of_adapted`.

    Args:
        model: The source model, a classifier.
        source: Its `SourceStatistics`, a file of them, or data of the source (see
            `SourceStatistics.of`).
        target: Data of the target: a dataset, a loader or a tensor.
        labels: Of `source`, where it is data.
        forward: From (model, inputs), or from a batch of inputs alone, to logits (B, K); None: as
            `lora_lightning.model.calling` says.
        batch_size: Of the forward passes.
        repeats: Of the bootstrap, at least 2.
        seed: Of the bootstrap.

    Returns:
        The measures; ``print`` shows them.

    Raises:
        ConfigError: the statistics are of another model, or the model's output is not (B, K).
        DataError: too few items, or NaN.
        DataNotFoundError: there is no such file.
        AdapterFileError: not a file of statistics.
    """
    run = classifier(model, forward)
    has_adapter = bool(adapters(model)) and any(s.active for _, s in states.roots(model))
    as_source: AbstractContextManager[Any] = disabled(model) if has_adapter else nullcontext()
    with as_source:
        if isinstance(source, (str, os.PathLike)):
            source = SourceStatistics.load(source)
        elif not isinstance(source, SourceStatistics):
            source = SourceStatistics.of(
                model, source, labels, forward=forward, batch_size=batch_size
            )
        source.check(model)
        found, predictions = features_of(model, target, batch_size, run)
        second = None if source.agreement is None else second_opinion(model, target, run)
    adapted = None
    if has_adapter:
        adapted = features_of(model, target, batch_size, run)[1].probabilities
    return compare(
        source, found, predictions.probabilities, second, adapted, repeats=repeats, seed=seed
    )


def compare(
    source: SourceStatistics,
    features: dict[str, Tensor],
    probabilities: Tensor,
    second: Opinion | None = None,
    adapted: Tensor | None = None,
    *,
    repeats: int = 100,
    seed: int = 0,
) -> Shift:
    """`shift` from features and predictions.

    Args:
        source: Of the source.
        features: Layer → (M, D) of the target.
        probabilities: (M, K) of the target, by the source model.
        second: Its predictions with re-estimated BatchNorm statistics; None without BatchNorm.
        adapted: (M, K) of the target, by the adapted model.
        repeats: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        DataError: fewer than two items.
        ConfigError: features of other layers, or other widths, than the source's.
    """
    if len(probabilities) < 2:
        raise DataError(f"a shift needs two items of the target or more, got {len(probabilities)}")
    pairs = {name: (s.sample, s.project(_of(features, name, len(s.mean))))
             for name, s in source.layers.items()}  # fmt: skip
    s, t = pairs.pop(HEAD)
    interval: Any = partial(bootstrap, repeats=repeats, seed=seed)
    blocks = {
        name: bootstrap(frechet_distance, *pair, repeats=_LAYER_REPEATS, seed=seed).value
        for name, pair in pairs.items()
    }
    drop = expected_drop(source, probabilities, second)
    frechet = interval(frechet_distance, s, t)
    told = frechet.value < SPREAD  # beyond, nothing can be expected
    return Shift(
        verdict(drop, frechet.value),
        drop,
        expected_accuracy(source, probabilities, second) if told else None,
        source.accuracy,
        score.nuclear_norm(probabilities),
        proxy_a_distance(s, t, repeats=repeats, seed=seed),
        interval(mmd, _few(s), _few(t), unbiased=True),
        interval(coral_distance, s, t),
        frechet,
        blocks,
        (len(s), len(t)),
        None if adapted is None else score.agreement(probabilities, adapted),
        expected_of_adapted(source, probabilities, adapted, second)
        if told and adapted is not None
        else None,
        CONFIDENCE if second is None else STEADINESS,
        expected_interval(source, probabilities, second) if told else None,
    )


def proxy_a_distance(
    source: Tensor, target: Tensor, *, repeats: int = 100, seed: int = 0
) -> Interval:
    r"""Proxy A-distance :math:`2(1 - 2\epsilon)` of features (N, D) and (M, D), 0 to 2.

    ε is the balanced error of a logistic regression, five-fold cross-validated; the interval comes
    from resampling the held-out predictions.

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
    x = torch.cat([source, target]).double().cpu().numpy()
    y = np.repeat([0, 1], [len(source), len(target)])
    # Balanced: both domains have the same weight, whatever their sizes.
    classifier = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.1, max_iter=500, class_weight="balanced")
    )
    folds = StratifiedKFold(min(FOLDS, n), shuffle=True, random_state=seed)
    wrong = cross_val_predict(classifier, x, y, cv=folds) != y
    rng = np.random.default_rng(seed)

    def distance(s: Any, t: Any) -> float:
        return max(0.0, 2 * (1 - float(s.mean() + t.mean())))

    parts = wrong[y == 0], wrong[y == 1]
    drawn = [distance(*(rng.choice(p, len(p)) for p in parts)) for _ in range(repeats)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(distance(*parts), float(low), float(high))


def _few(x: Tensor) -> Tensor:
    return x[shuffled(len(x))[:PAIRS]]


def _of(features: dict[str, Tensor], name: str, width: int) -> Tensor:
    if name not in features or features[name].shape[1] != width:
        raise ConfigError(
            f"the source statistics are of another model: at {name!r} they have {width} features, "
            f"this model {features[name].shape[1] if name in features else 'none'}"
        )
    return features[name]
