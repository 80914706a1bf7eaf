"""The HTML page of a run: one file, no script, nothing loaded from elsewhere.

The page is `template.html` with its `$names` filled in. Whatever comes from a user (names
of classes, files, domains, settings) is escaped here, on its way into the page.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from itertools import groupby
from string import Template

from lora_lightning.report import audio, interval_table
from lora_lightning.report.metrics import AZIMUTH_ERROR
from lora_lightning.report.plots import Plot
from lora_lightning.report.results import Run
from lora_lightning.report.summary import Cell, Column, Summary

MOST_SKIPPED, MOST_COLUMNS, MOST_TARGETS = 500, 6, 20
_SAID = {
    "WER": " WER: words substituted, missed or inserted, over the words said; lower is better.",
    "BLEU": " BLEU: sequences of one to four words that the right translation has as well; 100 is "
    "its very words.",
    AZIMUTH_ERROR: " The mean angle between the azimuth predicted and the true one, 0 to 180; "
    "lower is better, 90 is chance on the whole circle.",
}
_SHIFTS = (
    "Told from the target's training pictures, without labels and before anything was adapted: the "
    "source model's expected accuracy in %, with the interval that holds it 90 % of the time (none "
    "from a Fréchet distance of 1 on), beside it what was measured on the held-out pictures. The "
    "guess can be wrong. Proxy A-distance from 0 to 2; Fréchet distance in units of the source's "
    "variance; the block where the shift enters. First seed."
)


def page(run: Run, plots: Sequence[Plot], verdict: str) -> str:
    """The HTML page; `verdict` is the sentence at its top."""
    summary = Summary(run)
    template = resources.files("lora_lightning.report").joinpath("template.html")
    return Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(run.title),
        facts=escape(_facts(run, summary)),
        verdict=escape(verdict),
        table=_results(run, summary),
        shifts=_shifts(run, summary) if run.shifts else "",
        listen=audio.section(run) if run.transcripts else "",
        figures="\n".join(_figure(plot) for plot in plots),
        notes=_list("Notes", run.notes),
        details="\n".join(_details(run, summary)),
        command=escape(run.command or f"lora-lightning run {run.name}"),
    )


def _facts(run: Run, summary: Summary) -> str:
    counts = (
        *([(len(run.classes), "class", "classes")] if run.classes else []),
        (len(summary.targets), "target domain", "target domains"),
        (summary.seeds, "seed", "seeds"),
    )
    told = ((number, one if number == 1 else many) for number, one, many in counts if number)
    facts = [f"{number} {noun}" for number, noun in told]
    hardware = run.versions.get("hardware")
    return " · ".join([*facts, str(hardware)] if hardware else facts)


def _results(run: Run, summary: Summary) -> str:
    if not summary.methods:
        return f"<p>No {escape(run.metric)} was measured.</p>"
    # Each target in a table of its own, where there are few: then the first has their mean.
    apart = summary.apart and len(summary.targets) in range(2, MOST_TARGETS + 1)
    return (
        f"<h2>{escape(_title(run.metric))}</h2>"
        f"{_table(summary, summary.columns(1 if apart else MOST_COLUMNS))}"
        f'<p class="note">{escape(summary.footnote())}{_SAID.get(run.metric, "")}</p>'
        + (_by_domain(summary) if apart else "")
        + interval_table.section(summary)
    )


def _title(metric: str) -> str:
    return metric if metric.isupper() else metric.capitalize()


def _table(summary: Summary, columns: Sequence[Column]) -> str:
    costs = ("trained params", "time (s)", "file")
    groups = "".join(
        f'<th colspan="{len(list(members))}" scope="colgroup"><span>{escape(group)}</span></th>'
        for group, members in groupby(columns, key=lambda c: c.group)
    )
    counted = "".join(
        f'<th scope="col">{escape(c.name)}{_count(summary.tested(c.domains))}</th>' for c in columns
    )
    names = counted + _heads(costs)
    body = []
    best = summary.best()
    for method in summary.methods:
        cells = [_cell(summary.cell(method, c.domains)) for c in columns]
        if method in best:
            cells[-1] = cells[-1].replace("<td>", '<td class="best">', 1)
        cells += [f"<td>{escape(cost)}</td>" for cost in summary.costs(method)]
        body.append(f'<tr><th scope="row">{escape(method)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="wide"><table><thead><tr class="groups"><th></th>{groups}'
        f'<th colspan="{len(costs)}"></th></tr><tr><th scope="col">method</th>{names}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _count(items: int | None) -> str:
    return f'<span class="n">n = {items}</span>' if items else ""


def _heads(names: Iterable[str]) -> str:
    return "".join(f'<th scope="col">{escape(name)}</th>' for name in names)


def _cell(cell: Cell) -> str:
    mean, spread = cell.texts()
    return f"<td>{mean}" + (f' <span class="sd">{spread}</span>' if spread else "") + "</td>"


def _shifts(run: Run, summary: Summary) -> str:
    """The first seed's shift measures of each target, with the source model's accuracy there."""
    seed, found = next(iter(run.shifts.items()))
    before = summary.before()
    measured = {r.domain: r.value for r in run.rows if (r.method, r.seed) == (before, seed)}
    names = ("verdict", "expected", "measured", "proxy A", "Fréchet", "enters at")
    head = _heads(("target", *names))
    rows = []
    for domain, s in found.items():
        within = s.get("expected_interval")  # older runs have none
        cells = [
            s["verdict"],
            _percent(s["expected_accuracy"])
            + (" ({:.0f} to {:.0f})".format(*(100 * x for x in within)) if within else ""),
            _percent(measured.get(domain)),
            *(f"{s[name]['value']:.2f}" for name in ("proxy_a", "frechet")),
            str(s["entry"] or "–"),
        ]
        values = "".join(f"<td>{escape(c)}</td>" for c in cells)
        count = _count(summary.tested([domain]))
        rows.append(f'<tr><th scope="row">{escape(domain)}{count}</th>{values}</tr>')
    return (
        f"<h2>How far are the targets?</h2>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f'</table></div><p class="note">{_SHIFTS}</p>'
    )


def _percent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def _figure(plot: Plot) -> str:
    source = base64.b64encode(plot.svg).decode()
    return (
        f'<h2>{escape(plot.title)}</h2><figure><div class="wide"><img alt="{escape(plot.title)}" '
        f'src="data:image/svg+xml;base64,{source}"></div><figcaption>{escape(plot.caption)}'
        "</figcaption></figure>"
    )


def _list(title: str, lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>{title}</h2><ul>{items}</ul>" if items else ""


def _details(run: Run, summary: Summary) -> list[str]:
    parts = []
    if len(summary.targets) > 1 and not (summary.apart and len(summary.targets) <= MOST_TARGETS):
        parts.append(_fold("Every domain", _by_domain(summary)))
    if run.skipped:
        shown = [(escape(path), escape(reason)) for path, reason in run.skipped[:MOST_SKIPPED]]
        if len(run.skipped) > MOST_SKIPPED:
            shown.append((f"and {len(run.skipped) - MOST_SKIPPED} more", ""))
        noun = "file" if len(run.skipped) == 1 else "files"
        parts.append(_fold(f"{len(run.skipped):,} {noun} skipped", _pairs(shown)))
    config = json.dumps(run.config, indent=2, default=str, ensure_ascii=False)
    parts.append(_fold("Resolved configuration", f"<pre>{escape(config)}</pre>"))
    versions = [(escape(name), escape(str(text))) for name, text in run.versions.items()]
    parts.append(_fold("Versions and hardware", _pairs(versions)))
    return parts


def _by_domain(summary: Summary) -> str:
    names = _heads(summary.methods)
    sources = [summary.source] if summary.source else []
    rows = "".join(
        f'<tr><th scope="row">{escape(domain)}{_count(summary.tested([domain]))}</th>'
        + "".join(_cell(summary.cell(method, [domain])) for method in summary.methods)
        + "</tr>"
        for domain in [*sources, *summary.targets]
    )
    return (
        '<div class="wide"><table class="domains"><thead><tr><th scope="col">domain</th>'
        f"{names}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><td>{first}</td><td>{second}</td></tr>" for first, second in pairs)
    return f'<div><table class="plain"><tbody>{rows}</tbody></table></div>'


def _fold(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
