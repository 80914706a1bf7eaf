"""The report of a run: a table in the terminal, plain files, plots and one HTML page.

A recipe fills a `Run` (in results.py); `print_table` shows it, `write_report` writes it to a
folder.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.report.cells import cell
from lora_lightning.report.evidence import Difference
from lora_lightning.report.files import atomic_write, write_plot
from lora_lightning.report.metrics import PERCENT, shorten
from lora_lightning.report.results import Prediction, Row, Run, Transcript
from lora_lightning.report.summary import Summary
from lora_lightning.report.word_errors import errors

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Prediction", "Row", "Run", "print_table", "verdict", "write_report"]

COUNTS = ("words", "source_errors", "adapted_errors", "changed")  # of each transcript


def print_table(run: Run, console: Console | None = None) -> None:
    """Print the run's table, one line (two with spreads) a method, readable at 80 columns."""
    from rich.text import Text

    from lora_lightning.report.console import PlainConsole

    console = console or PlainConsole()
    summary = Summary(run)
    if not summary.methods:
        console.print(Text(f"{run.title}: no {run.metric} was measured."))
        return
    console.print(_table(run, summary))
    console.print(Text(summary.footnote(), style="dim"))
    console.print(Text(f"\n{verdict(run)}"))


def _table(run: Run, summary: Summary) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = summary.columns()
    table = Table(title=Text(f"{run.title}: {run.metric}"), box=box.SIMPLE_HEAD, show_edge=False)
    table.pad_edge, table.collapse_padding, table.title_justify = False, True, "left"
    table.add_column("method", overflow="fold", max_width=max(18, 42 - 7 * len(columns)))
    room = 8 if len(columns) > 3 else 14  # a name's characters, to fit 80 columns
    for c in columns:
        head = f"{c.group}\n{shorten(c.name, room)}"
        head += f"\nn={n}" if (n := summary.tested(c.domains)) else ""
        table.add_column(Text(head), justify="right", no_wrap=True)
    for name in ("tuned\nparams", "time\n(s)", "file\nsize"):
        table.add_column(name, justify="right", no_wrap=True)
    best = summary.best()
    for method in summary.methods:
        cells: list[Text] = [Text(method.replace(", ", ",\n"))]
        for c in columns:
            bold = "bold" if method in best and c is columns[-1] else ""
            mean, spread = summary.cell(method, c.domains).texts()
            cells.append(Text.assemble((mean, bold), (f"\n{spread}" if spread else "", "dim")))
        table.add_row(*cells, *map(Text, summary.costs(method)))
    return table


def verdict(run: Run) -> str:
    """LoRA's gain on the target, compared with full fine-tuning, and the domains that got worse."""
    summary = Summary(run)
    if summary.unlabelled:
        return (
            "The target has no labels, so nothing is measured there; predictions.csv has the "
            "answers to its items before and after."
        )
    known = [m for m in summary.headline_methods() if not math.isnan(summary.target(m).mean)]
    before = summary.before()
    tuned = [m for m in known if "lora" in m.lower()] or [m for m in known if m != before]
    if before is None or not tuned or before in tuned:
        return "There are no two methods on the target to compare."
    pick = min if summary.lower else max
    after = pick(tuned, key=lambda m: summary.target(m).mean)
    seeds = f" (mean of {summary.seeds} seeds)" if summary.seeds > 1 else ""
    full = next((m for m in known if m.lower().startswith("full") and m != after), None)
    rest = "" if full is None else _against(summary, after, full)
    change = _change(summary, before, after, run.metric, seeds)
    harm = _harm(summary, before, after) if summary.lower else ""
    harm += _without_labels(summary, known, before, after, run.metric)
    return f"On the target, {_spoken(after)} {change}{rest}.{harm}"


def _change(summary: Summary, before: str, after: str, metric: str, seeds: str = "") -> str:
    start, end = (summary.target(m).mean for m in (before, after))
    first, last = map(summary.unit.text, (start, end))
    if first == last:
        return f"leaves {metric} at {last}{seeds}"
    found = summary.difference(after, before)
    if not found.clear:
        return f"changes {metric} from {first} to {last}{seeds}, {_by_chance(found, summary)}"
    word = "raises" if end > start else "lowers"
    change = f"{word} {metric} from {first} to {last}"
    if summary.lower and end < start:
        what = "fewer errors" if summary.unit == PERCENT else "less"
        change += f", {100 * (1 - end / start):.0f} % {what}"
    return change + seeds


def _by_chance(found: Difference, summary: Summary) -> str:
    """Why a difference is not called a gain or a loss."""
    if not found.known:
        return "without an interval, as the scores of single items are not known"
    by_item = found.by_item is not None and not found.by_item.clear
    interval = found.by_item if by_item else found.by_seed
    assert interval is not None
    said = "which can be chance"
    if by_item:
        gains = found.worse if summary.lower else found.better
        harms = found.better if summary.lower else found.worse
        said += f": {gains} of {found.items} items better, {harms} worse"
    of = "items" if by_item else f"{summary.seeds} seeds"
    unit = " points" if summary.unit == PERCENT else summary.unit.symbol
    ends = interval.text(summary.unit.scale, "+")
    return f"{said} (95 % interval of the paired difference over {of}: {ends}{unit})"


def _without_labels(
    summary: Summary, known: list[str], before: str, after: str, metric: str
) -> str:
    """The best method without labels, where it is not named already."""
    free = [m for m in known if "no labels" in m]
    if not free or after in free:
        return ""
    pick = min if summary.lower else max
    best = pick(free, key=lambda m: summary.target(m).mean)
    return f" {best[0].upper()}{_spoken(best)[1:]} {_change(summary, before, best, metric)}."


def _harm(summary: Summary, before: str, after: str) -> str:
    worse, of = summary.worse(after, before), len(summary.each(after))
    if not worse:
        return " With it, no target is worse than before."
    named = ", ".join(dict.fromkeys(domain for domain, _ in worse))
    return f" With it, {len(worse)} of {of} cases are worse than before: {named}."


def _spoken(method: str) -> str:
    method = method.replace(", no labels", " without labels")
    return re.sub(r", (?=[\d ]*target labels)", " with ", method)


def _against(summary: Summary, method: str, full: str) -> str:
    cells = summary.target(method), summary.target(full)
    scale, degrees = summary.unit.scale, summary.unit != PERCENT
    gap = scale * (cells[0].mean - cells[1].mean)
    share = 100 * summary.parameters(method) / max(summary.parameters(full), 1)
    if abs(gap) < 0.05:
        text = "level with full fine-tuning"
    else:
        points = f"{abs(gap):.1f}"
        points += summary.unit.symbol if degrees else " point" + "s" * (points != "1.0")
        text = f"{points} {'above' if gap > 0 else 'below'} full fine-tuning"
        spread = scale * max((c.sd for c in cells if not math.isnan(c.sd)), default=0.0)
        found = summary.difference(method, full)
        if abs(gap) <= spread:
            text += " (within the spread over seeds)"
        elif found.known and not found.clear:
            text += " (which can be chance)"
    if not share:  # the guard kept the source model
        return f", {text}"
    return f", {text}, with {share:.{1 if share < 10 else 0}f} % of its trainable parameters"


def write_report(run: Run, out: Path) -> None:
    """Write results.json, results.csv, predictions.csv, plots/*.svg and report.html to `out`.

    A run of speech recognition has a transcripts.csv in place of predictions.csv, one of
    translation a translations.csv; one that measured domain shifts has a shift.json.
    Each file is replaced in one step, so a reader or a killed run never leaves half of one.
    """
    # Matplotlib is loaded only where something is drawn.
    from lora_lightning.report import html, plots

    results = [asdict(row) for row in run.rows]
    atomic_write(out / "results.json", _json(results))
    atomic_write(out / "results.csv", _csv(Row, results))
    if run.shifts:
        atomic_write(out / "shift.json", json.dumps(run.shifts, indent=1) + "\n")
    if run.transcripts:
        atomic_write(out / f"{run.texts}.csv", _csv(Transcript, _counted(run.transcripts), COUNTS))
    if run.predictions or not run.transcripts:
        answers = (asdict(p) | {"changed": p.changed} for p in run.predictions)
        atomic_write(out / "predictions.csv", _csv(Prediction, answers, ["changed"]))
    drawn = plots.draw(run)
    files = dict.fromkeys(plots.PLOTS) | {plot.name: plot.svg for plot in drawn}
    for name, svg in files.items():
        write_plot(out, name, svg)
    atomic_write(out / "report.html", html.page(run, drawn, run.verdict or verdict(run)))


def _counted(transcripts: Iterable[Transcript]) -> Iterator[dict[str, Any]]:
    """Each transcript with its number of words, of errors before and after, and if it changed."""
    for t in transcripts:
        wrong = errors(t.reference, t.source), errors(t.reference, t.adapted)
        counts = zip(COUNTS, (len(t.reference.split()), *wrong, t.changed), strict=True)
        yield asdict(t) | dict(counts)


def _json(rows: list[dict[str, Any]]) -> str:
    """JSON has no NaN: a value that is not finite becomes null."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    rows = [{key: plain(value) for key, value in row.items()} for row in rows]
    return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(kind: type, rows: Iterable[dict[str, Any]], more: Sequence[str] = ()) -> str:
    text = io.StringIO()
    names = [*(f.name for f in fields(kind)), *more]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()
