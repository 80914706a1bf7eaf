"""What a run leaves behind: a table in the terminal, plain files, plots and one HTML page.

A recipe fills a `Run` (in results.py); `print_table` shows it, `write_report` writes it to a
folder.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.results import Prediction, Row, Run, Summary, shorten

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Prediction", "Row", "Run", "print_table", "write_report"]


def print_table(run: Run, console: Console | None = None) -> None:
    """Print the run's table, one line (two with spreads) a method, readable at 80 columns."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    summary = Summary(run)
    if not summary.methods:
        console.print(Text(f"{run.title}: no {run.metric} was measured."))
        return
    console.print(_table(run, summary))
    console.print(Text(summary.footnote(), style="dim"))


def _table(run: Run, summary: Summary) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = summary.columns()
    table = Table(title=Text(f"{run.title}: {run.metric}"), box=box.SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding, table.title_justify = False, True, "left"
    table.add_column("method", overflow="fold", max_width=max(17, 41 - 7 * len(columns)))
    for c in columns:
        table.add_column(Text(f"{c.group}\n{shorten(c.name, 8)}"), justify="right", no_wrap=True)
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


def write_report(run: Run, out: Path) -> None:
    """Write results.json, results.csv, predictions.csv, plots/*.png and report.html to `out`.

    Each file is replaced in one step, so a reader or a killed run never leaves half of one.
    """
    # Matplotlib is loaded only where something is drawn.
    from lora_lightning import html, plots

    results = [asdict(row) for row in run.rows]
    _write(out / "results.json", _json(results).encode())
    _write(out / "results.csv", _csv(Row, results))
    _write(out / "predictions.csv", _csv(Prediction, map(asdict, run.predictions)))
    drawn = plots.draw(run)
    for name in plots.NAMES:  # an earlier run's picture must not pass for this one's
        (out / "plots" / f"{name}.png").unlink(missing_ok=True)
    for plot in drawn:
        _write(out / "plots" / f"{plot.name}.png", plot.png)
    _write(out / "report.html", html.page(run, drawn).encode())


def _json(rows: list[dict[str, Any]]) -> str:
    """JSON has no NaN: a value that is not finite becomes null."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    rows = [{key: plain(value) for key, value in row.items()} for row in rows]
    return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(kind: type, rows: Iterable[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
