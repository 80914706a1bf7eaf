"""`Summary`: means and spreads for the tables and plots of a run.

Each mean, spread and average over domains comes from here, so that the terminal, the plots and the
page cannot disagree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from lora_lightning.report.evidence import Difference, Evidence, Interval, by_seed
from lora_lightning.report.metrics import DEGREES, LOWER_IS_BETTER, PERCENT, UNITS, Unit, si
from lora_lightning.report.results import HELD_OUT, Prediction, Run

_GRADED = re.compile(r"(?P<kind>.+)-(?P<severity>[1-9])")
NAN = float("nan")
# A row of a sweep over ranks, see `lora_lightning.runner.sweep`.
RANKED = re.compile(r"LoRA, rank (?P<rank>\d+|[a-z-]+), (?P<labels>.*target labels)")


@dataclass(frozen=True)
class Cell:
    """Mean and sample standard deviation over seeds, as rows have it; `lost` seeds had no value."""

    mean: float = NAN
    sd: float = NAN
    seeds: int = 0
    lost: int = 0
    unit: Unit = PERCENT

    def texts(self) -> tuple[str, str]:
        """Mean and spread in their unit, "" for a spread that does not exist."""
        mean = "–" if math.isnan(self.mean) else self.unit.number(self.mean)
        spread = "" if math.isnan(self.sd) else f"± {self.unit.number(self.sd)}"
        return mean + "*" * bool(self.lost), spread


@dataclass(frozen=True)
class Column:
    """A column of the table: the average over some domains."""

    group: str
    name: str
    domains: tuple[str, ...]


def severity(domain: str) -> tuple[str, int] | None:
    """("dim", 2) for "dim-2", nothing for a name of another form."""
    match = _GRADED.fullmatch(domain)
    return (match["kind"], int(match["severity"])) if match else None


class Summary:
    """The run's metric by method and group of domains.

    Attributes:
        methods: in the order of first appearance.
        source: the source domain, where it was measured.
        targets: the other domains, in the order of first appearance.
        graded: whether every target domain is named "<kind>-<severity>".
        lower: whether a lower value of the metric is the better one.
        unit: the metric's unit.
    """

    def __init__(self, run: Run) -> None:
        self._rows = [row for row in run.rows if row.metric == run.metric]
        self.lower = run.metric in LOWER_IS_BETTER
        self.unit = UNITS.get(run.metric, PERCENT)
        self._headline = run.config.get("headline")
        self._values = {(r.method, r.domain, r.seed): r.value for r in self._rows}
        self._evidence = Evidence(run.scores, run.metric)
        self.methods = list(dict.fromkeys(r.method for r in self._rows))
        domains = list(dict.fromkeys(r.domain for r in self._rows))
        data = run.config.get("data")
        own = data.get("source") if isinstance(data, dict) else None
        self.source = next((d for d in ("source", own) if d in domains), None)
        others = [d for d in domains if d != self.source]
        # A caller's own average is used only where there is nothing to average.
        self.targets = [d for d in others if d != "target"] or others
        measured = {r.domain for r in self._rows if not math.isnan(r.value)}
        # Without any value at all a run has failed; that says nothing of labels.
        self._without = set(domains) - measured if measured else set[str]()
        self.graded = bool(self.targets) and all(severity(d) for d in self.targets)

    @property
    def apart(self) -> bool:
        """Whether each target is reported separately, such as each speaker; not where graded."""
        return self.lower and not self.graded

    @property
    def unlabelled(self) -> bool:
        """Whether nothing could be measured on any target."""
        return bool(self.targets) and self._without.issuperset(self.targets)

    @property
    def seeds(self) -> int:
        """Number of different seeds."""
        return len({r.seed for r in self._rows})

    def bars(self) -> str:
        """The sentence that explains error bars, for a caption; "" of one seed."""
        return f" Bars: standard deviation over {self.seeds} seeds." * (self.seeds > 1)

    def cell(self, method: str, domains: Sequence[str]) -> Cell:
        """Average over `domains` for each seed, then mean and spread over seeds.

        A seed that lacks one of the domains is left out and counted: an average over fewer
        domains would not compare.
        """
        means = self._means(method, domains)
        if not any((method, d, s) in self._values for d in self._labelled(domains) for s in means):
            return Cell(unit=self.unit)  # never measured here, so not counted as lost
        kept = list(self._by_seed(method, domains).values())
        spread = stdev(kept) if len(kept) > 1 else NAN
        mean, lost = fmean(kept) if kept else NAN, len(means) - len(kept)
        return Cell(mean, spread, len(kept), lost, self.unit)

    def _labelled(self, domains: Sequence[str]) -> list[str]:
        return [d for d in domains if d not in self._without]

    def tested(self, domains: Sequence[str]) -> int | None:
        """The number of held-out items behind a mean over these domains, where it is known."""
        counts = (self._evidence.items(m, self._labelled(domains)) for m in self.methods)
        return next((n for n in counts if n), None)

    def interval(self, method: str, domains: Sequence[str]) -> Interval | None:
        """95 % of a mean over domains, by item."""
        return self._evidence.mean(method, self._labelled(domains))

    def seed_interval(self, method: str, domains: Sequence[str]) -> Interval | None:
        """95 % of a mean over domains, by seed, within what the metric can be."""
        found = by_seed(list(self._by_seed(method, domains).values()))
        most = 180.0 if self.unit == DEGREES else math.inf if self.lower else 1.0
        return found and Interval(max(found.low, 0.0), min(found.high, most))

    def _means(self, method: str, domains: Sequence[str]) -> dict[int, float]:
        """Seed → mean over domains; NaN where one of them is missing."""
        known = self._labelled(domains)
        seeds = dict.fromkeys(r.seed for r in self._rows if r.method == method and known)
        return {s: fmean(self._values.get((method, d, s), NAN) for d in known) for s in seeds}

    def _by_seed(self, method: str, domains: Sequence[str]) -> dict[int, float]:
        return {s: v for s, v in self._means(method, domains).items() if math.isfinite(v)}

    def difference(self, method: str, than: str) -> Difference:
        """Of two methods' means on the target, with its intervals."""
        targets = self._labelled(self.targets)
        ours, theirs = (self._by_seed(m, targets) for m in (method, than))
        gaps = [ours[s] - theirs[s] for s in ours if s in theirs]
        value = self.target(method).mean - self.target(than).mean
        found = self._evidence.difference(method, than, targets)
        interval, better, worse = found or (None, 0, 0)
        items = self.tested(targets) or 0
        return Difference(value, interval, by_seed(gaps), better, worse, items, len(gaps))

    def target(self, method: str) -> Cell:
        """The average over all target domains."""
        return self.cell(method, self.targets) if self.targets else Cell()

    def columns(self, limit: int = 3) -> list[Column]:
        """Source, up to `limit` severities or domains (else none), the average last."""
        groups: dict[str, tuple[str, ...]] = {}
        for domain in self.targets:
            graded = severity(domain) if self.graded else None
            name = f"sev. {graded[1]}" if graded else domain
            groups[name] = (*groups.get(name, ()), domain)
        columns = [Column("source", "test", (self.source,))] if self.source else []
        if len(self.targets) == 1 or 1 < len(groups) <= limit:
            names = sorted(groups) if self.graded else list(groups)
            columns += [Column("target", name, groups[name]) for name in names]
        if len(self.targets) > 1:
            columns.append(Column("target", "mean", tuple(self.targets)))
        return columns

    def best(self) -> set[str]:
        """The best methods on the target: of all, and of those without its labels."""
        means = {m: v for m in self.methods if not math.isnan(v := self.target(m).mean)}
        free = {m: value for m, value in means.items() if "target labels" not in m}
        pick = min if self.lower else max
        return {pick(group, key=group.__getitem__) for group in (means, free) if group}

    def items(self, method: str) -> int | None:
        """Labelled target items that the method was given, where that was counted."""
        return next((r.items for r in self._rows if r.method == method), None)

    def each(self, method: str) -> list[float]:
        """The value of every target and seed."""
        return [r.value for r in self._rows if r.method == method and r.domain in self.targets]

    def before(self) -> str | None:
        """The method of the source model."""
        known = (m for m in self.methods if m.lower().startswith("source"))
        return next((m for m in known if not math.isnan(self.target(m).mean)), None)

    def closed_forms(self) -> list[str]:
        """The methods besides the source model that neither train anything nor leave a file."""
        kept = {r.method for r in self._rows if r.trainable_parameters or r.file_bytes is not None}
        return [m for m in self.methods if m not in kept and m != self.before()]

    def headline_methods(self) -> list[str]:
        """The methods to show where not all can be: one size of the enrolment, the headline's."""
        sizes = [n for m in self.methods if (n := self.items(m)) is not None]
        size = self._headline if self._headline in sizes else max(sizes, default=None)
        return [m for m in self.methods if self.items(m) in (None, size)]

    def worse(self, method: str, than: str) -> list[tuple[str, int]]:
        """The (domain, seed) of the target for which one method does worse than another."""
        sign = -1 if self.lower else 1
        pairs = [(d, s) for m, d, s in self._values if m == method and d in self.targets]
        own, other = ({p: self._values.get((m, *p), NAN) for p in pairs} for m in (method, than))
        return [p for p in pairs if sign * own[p] < sign * other[p]]  # never so with a NaN

    def parameters(self, method: str) -> int:
        """Trainable parameters of a method."""
        return max(r.trainable_parameters for r in self._rows if r.method == method)

    def costs(self, method: str) -> tuple[str, str, str]:
        """Trainable parameters, seconds and size of the file, for people."""
        rows = [r for r in self._rows if r.method == method]
        seconds = fmean(r.seconds for r in rows)
        size = next((r.file_bytes for r in rows if r.file_bytes is not None), None)
        return (
            si(self.parameters(method)),
            "–" if math.isnan(seconds) else f"{seconds:.{0 if seconds >= 9.95 else 1}f}",
            "–" if size is None else si(size, "B"),
        )

    def footnote(self) -> str:
        """How to read the table."""
        spread = f"mean ± sd over {self.seeds} seeds" if self.seeds > 1 else "one seed"
        targets = f", {len(self.targets)} target domains" if len(self.targets) > 1 else ""
        lost = any(self.cell(m, c.domains).lost for m in self.methods for c in self.columns())
        note = f"In {self.unit.name}, {spread}{targets}. "
        note += "Bold: best on the target, with and without its labels."
        if self._without.intersection(self.targets):
            note += " –: a domain without labels, in no mean."
        return note + " *: seeds without a value for each domain are left out." * lost


def target_items(run: Run) -> list[Prediction]:
    """The held-out items of the target that have a label."""
    source = Summary(run).source
    found = (p for p in run.predictions if p.domain != source and p.split == HELD_OUT)
    return [p for p in found if p.label]
