"""`shift`: how far a target lies from the source, as a model sees them.

Legend of shapes: N source items, M target items, D features, K classes.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_lightning import state as states
from lora_lightning.distances import Interval, bootstrap, coral_distance, frechet_distance, mmd
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.source_statistics import HEAD, Forward, SourceStatistics, features_of
from lora_lightning.switching import adapters, disabled
from lora_lightning.transduction import validators as score
from lora_lightning.verdicts import Shift, verdict

PAIRS = 200  # items of a set of which all pairs are looked at in each repeat
FOLDS = 5
_LAYER_REPEATS = 10


def shift(
    model: nn.Module,
    source: SourceStatistics | str | os.PathLike[str] | Any,
    target: Any,
    *,
    labels: Tensor | None = None,
    forward: Forward | None = None,
    batch_size: int = 64,
    repeats: int = 100,
    seed: int = 0,
) -> Shift:
    r"""Measure how far a target lies from the source, as a model sees them; no target label needed.

        print(shift(model, "source_statistics.safetensors", target))

    What the head is given, and each block's output, is projected on the source's leading
    directions, and scaled by its deviation:

    - proxy A-distance :math:`2(1 - 2\epsilon)`, with ε the balanced error of a logistic regression
      that tells the domains apart, five-fold cross-validated (Ben-David et al. 2010, "A theory of
      learning from different domains"). It saturates long before harm is done, so it informs and
      decides nothing;
    - MMD, CORAL and Fréchet distance, see `lora_lightning.distances`;
    - expected accuracy, by average thresholded confidence, see
      `lora_lightning.transduction.validators`. The verdict is its fall from source to target:
      "near" below 5 points, "too far" from 40, or from a Fréchet distance of 1. Without labels of
      the source it is the fall of the mean confidence.

    A model with an adapter is looked at without it; and once more with it, for `agreement` and
    `expected_adapted`.

    Args:
        model: The source model, a classifier.
        source: Its `SourceStatistics`, a file of them, or data of the source (see
            `SourceStatistics.of`).
        target: Data of the target: a dataset, a loader or a tensor.
        labels: Of `source`, where it is data.
        forward: From a batch of inputs to logits (B, K); None: ``model(inputs)``.
        batch_size: Items that the model is run on at once.
        repeats: Of the bootstrap, at least 2.
        seed: Of what is drawn.

    Returns:
        The measures; ``print`` shows them.

    Raises:
        ConfigError: the statistics are of another model, or the model gives no logits (B, K).
        DataError: too few items, or NaN.
        DataNotFoundError: there is no such file.
        AdapterFileError: the file holds no statistics.
    """
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
        found, said = features_of(model, target, batch_size, forward)
    adapted = None
    if has_adapter:
        adapted = features_of(model, target, batch_size, forward)[1].probabilities
    return compare(source, found, said.probabilities, adapted, repeats=repeats, seed=seed)


def compare(
    source: SourceStatistics,
    features: dict[str, Tensor],
    probabilities: Tensor,
    adapted: Tensor | None = None,
    *,
    repeats: int = 100,
    seed: int = 0,
) -> Shift:
    """`shift` from what the model said already.

    Args:
        source: Of the source.
        features: Layer → (M, D) of the target.
        probabilities: (M, K) of the target, by the source model.
        adapted: (M, K) of the target, by the adapted model.
        repeats: Of the bootstrap.
        seed: Of what is drawn.

    Raises:
        DataError: fewer than two items.
        ConfigError: features of other layers, or other widths, than the source's.
    """
    if len(probabilities) < 2:
        raise DataError(f"a shift needs two items of the target or more, got {len(probabilities)}")
    pairs = {name: (s.sample, s.project(_of(features, name, len(s.mean))))
             for name, s in source.layers.items()}  # fmt: skip
    s, t = pairs.pop(HEAD)
    again: Any = partial(bootstrap, repeats=repeats, seed=seed)
    blocks = {
        name: bootstrap(frechet_distance, *pair, repeats=_LAYER_REPEATS, seed=seed).value
        for name, pair in pairs.items()
    }
    confidence = probabilities.amax(dim=1)
    expected = _expected(source, confidence)
    drop = float(source.confidence.mean() - confidence.mean())
    if expected is not None and source.accuracy is not None:
        drop = source.accuracy - expected
    frechet = again(frechet_distance, s, t)
    return Shift(
        verdict(drop, frechet.value),
        drop,
        expected,
        source.accuracy,
        score.nuclear_norm(probabilities),
        proxy_a_distance(s, t, repeats=repeats, seed=seed),
        again(mmd, _few(s), _few(t), unbiased=True),
        again(coral_distance, s, t),
        frechet,
        blocks,
        (len(s), len(t)),
        None if adapted is None else score.agreement(probabilities, adapted),
        None if adapted is None else _expected(source, adapted.amax(dim=1)),
    )


def proxy_a_distance(
    source: Tensor, target: Tensor, *, repeats: int = 100, seed: int = 0
) -> Interval:
    r"""Proxy A-distance :math:`2(1 - 2\epsilon)` of features (N, D) and (M, D), 0 to 2.

    ε is the balanced error of a logistic regression, five-fold cross-validated; the interval comes
    from drawing the held-out answers anew.

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


def _expected(source: SourceStatistics, confidence: Tensor) -> float | None:
    if source.accuracy is None:
        return None
    return score.thresholded_confidence(confidence, source.confidence, source.accuracy)


def _few(x: Tensor) -> Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:PAIRS]]


def _of(features: dict[str, Tensor], name: str, width: int) -> Tensor:
    if name not in features or features[name].shape[1] != width:
        raise ConfigError(
            f"the source statistics are of another model: at {name!r} they have {width} features, "
            f"this model {features[name].shape[1] if name in features else 'none'}"
        )
    return features[name]
