"""The page's table of intervals: of each method's mean, and of its gain over the source model."""

from __future__ import annotations

import math
from html import escape

from lora_lightning.report.evidence import Interval
from lora_lightning.report.summary import Summary

_SURE = (
    "95 % intervals of the mean over the target: by item, resampled from the held-out items "
    "(bootstrap); by seed, Student's t. The difference is from the source model, paired: on the "
    "same items, or the same seeds. It is called higher or lower only where each interval of it "
    "excludes 0; that by seed counts from three seeds on. Intervals of two methods can overlap "
    "where their paired difference is clear."
)


def section(summary: Summary) -> str:
    """Intervals of each method on the target, and of its difference from the source model."""
    before, rows = summary.before(), []
    for method in summary.methods:
        places = summary.targets
        ends = [summary.interval(method, places), summary.seed_interval(method, places)]
        said = ["–"] * 3
        if before is not None and method != before:
            found = summary.difference(method, before)
            said = [_ends(i, summary, "+") for i in (found.by_item, found.by_seed)]
            word = "higher" if found.value > 0 else "lower"
            word = word if found.value else "equal"
            certain = found.known and (found.clear or not found.value)
            said.append(word if certain else "not clear" if found.known else "–")
        cells = [*(_ends(i, summary) for i in ends), *said]
        if summary.seeds < 2:  # nothing is known by seed
            cells = [cells[0], cells[2], cells[4]]
        if any(c != "–" for c in cells):
            values = "".join(f"<td>{escape(c)}</td>" for c in cells)
            rows.append(f'<tr><th scope="row">{escape(method)}</th>{values}</tr>')
    if not rows:
        return ""
    names = ["by item", "by seed", "difference by item", "difference by seed"]
    names = ["method", *(names if summary.seeds > 1 else names[::2]), "is"]
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        f'<h2>How sure is that?</h2><div class="wide"><table><thead><tr>{heads}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="note">{_SURE}{escape(_own(summary))}</p>'
    )


def _own(summary: Summary) -> str:
    """The source model on its own held-out items."""
    before = summary.before()
    if before is None or summary.source is None:
        return ""
    mean = summary.cell(before, [summary.source]).mean
    if math.isnan(mean):
        return ""
    ends = _ends(summary.interval(before, [summary.source]), summary)
    n = summary.tested([summary.source])
    more = f" (n = {n}, 95 % interval by item {ends})" if n else ""
    own = f" The source model on held-out items of its own domain, {summary.source}"
    return f"{own}: {summary.unit.text(mean)}{more}."


def _ends(interval: Interval | None, summary: Summary, sign: str = "") -> str:
    if interval is None:
        return "–"
    return interval.text(summary.unit.scale, sign).replace("-", "−")
