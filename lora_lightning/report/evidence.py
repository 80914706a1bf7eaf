"""95 % confidence intervals of a figure, by item and by seed, and of paired differences.

By item: percentile bootstrap over the held-out items of each domain (Koehn 2004, "Statistical
significance tests for machine translation evaluation"). A difference is paired: both methods are
drawn on the same items. Where approximate randomisation (Riezler & Maxwell 2005), which swaps the
two methods' scores of single items, finds a difference as large by chance in 5 % of the draws, the
interval is widened to hold 0: the bootstrap alone calls four changed items of 39 a gain.
By seed: Student's t over the seeds' means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev
from typing import Any

import numpy as np

# (method, domain, seed) → what each held-out item adds to the metric's sums, (items, sums).
Scores = Mapping[tuple[str, str, int], Any]
DRAWS, LEVEL, FEWEST_SEEDS = 1000, 0.05, 3
FEW = 2000  # items: of more, sums over drawn ones are taken as normally distributed


def _ratio(sums: np.ndarray) -> np.ndarray:
    """The first sum over the second: right answers, word errors or degrees, over their number."""
    return np.asarray(sums[..., 0] / np.maximum(sums[..., 1], 1e-12))


def _bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU of 4 sums of matches, 4 of n-grams, and the lengths of translation and reference."""
    found, of = sums[..., :4], np.maximum(sums[..., 4:8], 1e-12)
    precision = np.exp(np.log(np.maximum(found / of, 1e-30)).mean(-1))
    ours, theirs = np.maximum(sums[..., 8], 1e-12), sums[..., 9]
    short = np.exp(np.minimum(0.0, 1 - theirs / ours))
    return np.where((found > 0).all(-1), precision * short, 0.0)


METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"BLEU": _bleu}  # others: `_ratio`


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`, in 95 % of cases."""

    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether it excludes 0."""
        return self.low > 0 or self.high < 0

    def text(self, scale: float, sign: str = "") -> str:
        """Both ends times `scale`, with one decimal."""
        return " to ".join(f"{scale * end:{sign}.1f}" for end in (self.low, self.high))


@dataclass(frozen=True)
class Difference:
    """A paired difference of two methods' means, with its intervals where they are known."""

    value: float  # of the means
    by_item: Interval | None  # over held-out items
    by_seed: Interval | None  # over seeds
    better: int = 0  # items on which the first method scores higher
    worse: int = 0  # items on which it scores lower
    items: int = 0  # held-out items
    seeds: int = 0  # that both were measured with

    @property
    def known(self) -> list[Interval]:
        """The intervals there are."""
        return [i for i in (self.by_item, self.by_seed) if i is not None]

    @property
    def clear(self) -> bool:
        """Whether every interval that is known and says something excludes 0.

        Of two seeds alone Student's t says next to nothing (12.7 standard errors on either side):
        where items are known, they decide.
        """
        known = self.known[:1] if self.by_item and self.seeds < FEWEST_SEEDS else self.known
        return bool(known) and all(i.clear for i in known)


class Evidence:
    """Intervals from each item's scores."""

    def __init__(self, scores: Scores, metric: str) -> None:
        self._scores, self._metric = scores, METRICS.get(metric, _ratio)

    def items(self, method: str, domains: Sequence[str]) -> int | None:
        """The number of held-out items of these domains; None where it is not known."""
        found = [k for k in self._scores if k[0] == method and k[1] in domains]
        seed = next((s for _, _, s in found), None)
        return sum(len(self._scores[k]) for k in found if k[2] == seed) or None

    def mean(self, method: str, domains: Sequence[str]) -> Interval | None:
        """Of a method's mean over domains, by item."""
        seeds = self._seeds(domains, method)
        if not seeds:
            return None
        draws = [
            self._drawn(self._scores[method, d, s], i) for s in seeds for i, d in enumerate(domains)
        ]
        return _middle(np.mean(draws, 0))

    def difference(
        self, method: str, than: str, domains: Sequence[str]
    ) -> tuple[Interval, int, int] | None:
        """Of the paired difference of two methods, by item; and the items better and worse.

        None where the two were not measured on the same items.
        """
        pairs = [
            (i, self._scores[method, d, s], self._scores[than, d, s])
            for s in self._seeds(domains, method, than)
            for i, d in enumerate(domains)
        ]
        if not pairs or any(a.shape != b.shape for _, a, b in pairs):
            return None
        drawn = np.mean([self._drawn_apart(a, b, i) for i, a, b in pairs], 0)
        swapped = np.mean([self._swapped(a, b, i) for i, a, b in pairs], 0)
        real = np.mean([self._metric(a.sum(0)) - self._metric(b.sum(0)) for _, a, b in pairs])
        # A draw among them is the data as they are.
        chance = (1 + (np.abs(swapped) >= abs(real) - 1e-12).sum()) / (1 + len(swapped))
        found = _middle(drawn)
        if chance >= LEVEL:
            found = Interval(min(found.low, 0.0), max(found.high, 0.0))
        gains = self._gains([(a, b) for _, a, b in pairs], len(domains))
        return found, int((gains > 0).sum()), int((gains < 0).sum())

    def _gains(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], domains: int) -> np.ndarray:
        """Of each item, in the mean of the seeds; in the first, where they have other items."""
        each = [self._each(a) - self._each(b) for a, b in pairs]
        seeds = [np.concatenate(each[i : i + domains]) for i in range(0, len(each), domains)]
        same = len({len(gains) for gains in seeds}) == 1
        return np.asarray(np.mean(seeds, 0) if same else seeds[0])

    def _each(self, scores: np.ndarray) -> np.ndarray:
        if self._metric is not _ratio:  # matches, as BLEU of a single sentence is mostly 0
            return np.asarray(scores[:, :4].sum(1))
        return np.asarray(_ratio(scores))

    def _seeds(self, domains: Sequence[str], *methods: str) -> list[int]:
        """The seeds with scores of each method on each domain."""
        seeds = dict.fromkeys(s for _, _, s in self._scores)
        wanted = [(m, d) for m in methods for d in domains]
        return [s for s in seeds if wanted and all((m, d, s) in self._scores for m, d in wanted)]

    def _drawn(self, scores: np.ndarray, index: int) -> np.ndarray:
        return self._metric(_resampled(scores, index))

    def _drawn_apart(self, a: np.ndarray, b: np.ndarray, index: int) -> np.ndarray:
        both = _resampled(np.concatenate([a, b], 1), index)
        return np.asarray(self._metric(both[:, : a.shape[1]]) - self._metric(both[:, a.shape[1] :]))

    def _swapped(self, a: np.ndarray, b: np.ndarray, index: int) -> np.ndarray:
        moved = _swapped(b - a, index)
        return np.asarray(self._metric(a.sum(0) + moved) - self._metric(b.sum(0) - moved))


def of_mean(values: Any) -> np.ndarray:
    """(items,) → (items, 2): what each item adds to the sums of a mean."""
    return np.stack([values, np.ones(len(values))], 1)


def by_chance(after: np.ndarray, before: np.ndarray) -> str:
    """What is said of a difference of (items,) right answers that can be chance; else ""."""
    scores = {(m, "", 0): of_mean(x) for m, x in (("a", after), ("b", before))}
    found = Evidence(scores, "accuracy").difference("a", "b", [""])
    if found is None or found[0].clear or not any(found[1:]):
        return ""
    return f" ({found[1]} better, {found[2]} worse, which can be chance)"


def by_seed(values: Sequence[float]) -> Interval | None:
    """Of the mean of these seeds' values; None for a single one."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    middle, wide = fmean(values), stdev(values) / math.sqrt(len(values))
    reach = float(t.ppf(1 - LEVEL / 2, len(values) - 1)) * wide
    return Interval(middle - reach, middle + reach)


def _middle(draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, [100 * LEVEL / 2, 100 - 100 * LEVEL / 2])
    return Interval(float(low), float(high))


def _resampled(scores: np.ndarray, index: int) -> np.ndarray:
    """(draws, sums): the sums over as many items, drawn with replacement."""
    if len(scores) <= FEW:
        return np.asarray(_resamples(len(scores), index) @ scores)
    apart = scores - scores.mean(0)
    return _normal(scores.sum(0), apart.T @ apart, index)


def _swapped(scores: np.ndarray, index: int) -> np.ndarray:
    """(draws, sums): the sums over items of which each is taken or left out by a coin."""
    if len(scores) <= FEW:
        return np.asarray(_swaps(len(scores), index) @ scores)
    return _normal(scores.sum(0) / 2, scores.T @ scores / 4, index)


def _normal(mean: np.ndarray, covariance: np.ndarray, index: int) -> np.ndarray:
    """What such sums are distributed as where items are many."""
    rng = np.random.default_rng(index)
    return rng.multivariate_normal(mean, covariance, DRAWS, method="eigh", check_valid="ignore")


@lru_cache(maxsize=32)  # 8 MB each at most
def _resamples(n: int, index: int) -> np.ndarray:
    """(draws, n): how often each item is drawn; the same for every method and seed."""
    rng = np.random.default_rng([0, n, index])
    drawn: np.ndarray = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float32)
    return drawn


@lru_cache(maxsize=32)
def _swaps(n: int, index: int) -> np.ndarray:
    """(draws, n): 1 for each item whose scores the two methods swap."""
    swaps: np.ndarray = np.random.default_rng([1, n, index]).random((DRAWS, n)) < 0.5
    return swaps.astype(np.float32)
