"""The results of a sweep over settings: which cell is the best, by what; table, file and plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import ConfigError
from lora_lightning.report.cells import cell as csv_cell
from lora_lightning.report.files import atomic_write, write_plot
from lora_lightning.report.metrics import LOWER_IS_BETTER, PERCENT, UNITS, Unit, si
from lora_lightning.report.results import Run
from lora_lightning.report.summary import Summary

if TYPE_CHECKING:
    from rich.table import Table

SOURCE, TARGET = "source", "target"


@dataclass
class Line:
    """A method in one cell."""

    method: str  # its name in the cell's own table
    # Means over seeds of the metric: on the held-out items of the source, on those of all targets,
    # and of each target by its name
    measured: dict[str, float]
    parameters: int  # that were trained; 0 where a guard kept the source model


def lines_of(run: Run) -> list[Line]:
    """The methods of a run, but for the source model."""
    summary, lines = Summary(run), []
    for method in (m for m in summary.methods if m != summary.before()):
        domains = {TARGET: summary.targets} | {d: [d] for d in summary.targets}
        if summary.source:
            domains[SOURCE] = [summary.source]
        found = {name: summary.cell(method, of).mean for name, of in domains.items() if of}
        measured = {name: value for name, value in found.items() if not math.isnan(value)}
        lines.append(Line(method, measured, summary.parameters(method)))
    return lines


@dataclass
class Cell:
    """One combination of settings."""

    values: dict[str, str]  # key → its value, as typed
    folder: Path  # of its run
    lines: list[Line] = field(default_factory=list)  # what was measured
    reason: str = ""  # why it failed; "" where it did not

    @property
    def settings(self) -> list[str]:
        """As they are typed."""
        return [f"{key}={value}" for key, value in self.values.items()]

    @property
    def name(self) -> str:
        """Its settings in one line."""
        return " ".join(self.settings)


@dataclass
class Sweep:
    """The results of `sweep_grid`.

    Attributes:
        axes: Key → its values.
        cells: In the order of the grid.
        metric: That was measured.
        by: What chooses the best cell, a key of `Line.measured`; None: the source's held-out items,
            where they were measured.
    """

    axes: dict[str, list[str]]
    cells: list[Cell]
    metric: str = ""
    by: str | None = None

    @property
    def unit(self) -> Unit:
        """The metric's unit."""
        return UNITS.get(self.metric, PERCENT)

    @property
    def failed(self) -> list[Cell]:
        """The cells without results."""
        return [cell for cell in self.cells if cell.reason]

    def check(self) -> None:
        """Raise ConfigError where `by` names nothing that was measured."""
        known = {name for c in self.cells for line in c.lines for name in line.measured}
        if self.by is not None and known and self.by not in known:
            raise ConfigError(
                f"--by {self.by}: that was not measured; choose one of {', '.join(sorted(known))}"
            )

    def best(self) -> tuple[Cell, Line] | None:
        """The best cell and its method, by `by`; None where that was not measured."""
        by = self.by or SOURCE
        found = [(c, line) for c in self.cells for line in c.lines if by in line.measured]
        pick = min if self.metric in LOWER_IS_BETTER else max
        return pick(found, key=lambda pair: pair[1].measured[by], default=None)

    def verdict(self) -> str:
        """The best cell in words: by what it was chosen, and what that is worth."""
        if (found := self.best()) is None:
            return (
                "No cell is named the best: the source's held-out items were not measured. Choose "
                "by --by target, or --by and a target's name: both look at labels of the target."
            )
        (cell, line), by = found, self.by or SOURCE
        value = self.unit.text(line.measured[by])
        where = {SOURCE: "the source's held-out items", TARGET: "the targets' held-out items"}
        said = f"Best by {self.metric} on {where.get(by, by)} ({value}): {cell.name}"
        lines = [x for c in self.cells for x in c.lines]
        said += f" ({line.method})" if len({x.method for x in lines}) > 1 else ""
        ties = sum(x.measured.get(by) == line.measured[by] for x in lines) - 1
        said += f", the first of {ties + 1} that are level" if ties else ""
        if by == SOURCE:
            return f"{said}. No label of a target chose it."
        return (
            f"{said}. Labels of the target chose it, so that this figure is too good by the choice "
            "among so many: report it on items that the choice has not seen."
        )

    # ---- as table, file and plot -------------------------------------------------------------

    def table(self) -> Table:
        """A line for each cell and method."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(f"{self.metric} of {len(self.cells)} cells"), box=box.SIMPLE_HEAD)
        table.show_edge, table.title_justify = False, "left"
        for name in (*_short(self.axes), "method"):
            table.add_column(Text(name), overflow="fold")
        for name in (*self.measures(), "tuned\nparams"):
            table.add_column(Text(name), justify="right")
        best = self.best()
        for cell in self.cells:
            given = list(map(Text, cell.values.values()))
            if cell.reason:
                table.add_row(*given, Text(f"failed: {cell.reason}", style="yellow"))
            for line in cell.lines:
                style = "bold" if best and line is best[1] else ""
                found = [line.measured.get(name, math.nan) for name in self.measures()]
                shown = ["–" if math.isnan(v) else self.unit.number(v) for v in found]
                end = (Text(t, style=style) for t in (*shown, si(line.parameters)))
                table.add_row(*given, Text(line.method, style=style), *end)
        return table

    def measures(self) -> list[str]:
        """The measures that are shown: that which chooses, the source, and all targets."""
        known = {name for c in self.cells for line in c.lines for name in line.measured}
        asked = [self.by] if self.by else []
        return [n for n in dict.fromkeys((*asked, SOURCE, TARGET)) if n in known]

    def write(self, out: Path) -> None:
        """Write sweep.csv."""
        text = io.StringIO()
        names = list(dict.fromkeys(n for c in self.cells for x in c.lines for n in x.measured))
        head = [*self.axes, "method", *names, "trainable_parameters", "folder", "failed"]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(map(csv_cell, head))
        for cell in self.cells:
            place = [cell.folder.relative_to(out).as_posix(), cell.reason]
            for line in cell.lines or [Line("", {}, 0)]:
                found = [line.measured.get(name, "") for name in names]
                row = [*cell.values.values(), line.method, *found, line.parameters or "", *place]
                writer.writerow(map(csv_cell, row))
        atomic_write(out / "sweep.csv", text.getvalue())

    def draw(self, out: Path) -> None:
        """Draw plots/sweep.svg, where there are one or two keys."""
        from lora_lightning.report.plots.sweep import sweep_svg

        svg = sweep_svg(self.axes, self._drawn(), self.metric, self.unit, self._place())
        write_plot(out, "sweep", svg)

    def _drawn(self) -> Mapping[str, Any]:
        """What is measured, of each method → an array shaped as the grid."""
        import numpy as np

        shape = [len(given) for given in self.axes.values()]
        methods = list(dict.fromkeys(line.method for c in self.cells for line in c.lines))
        drawn = {}
        for method in methods:
            for name in self.measures():
                of = [{x.method: x.measured.get(name) for x in c.lines} for c in self.cells]
                found = [math.nan if (v := x.get(method)) is None else v for x in of]
                drawn[f"{name}, {method}" if len(methods) > 1 else name] = np.reshape(found, shape)
        return drawn

    def _place(self) -> list[int] | None:
        best = self.best()
        if best is None:
            return None
        return [given.index(best[0].values[key]) for key, given in self.axes.items()]


def _short(keys: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """The last part of each key, where that tells them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return last if len(set(last)) == len(last) else list(keys)
