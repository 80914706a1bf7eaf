"""The page that `gpu.py` makes of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Key = tuple[str, ...]  # part, model, precision, mode, variant, measure
Rows = dict[Key, dict[str, Any]]
KEY = ("part", "model", "precision", "mode", "variant", "measure")


def write(path: Path, rows: list[dict[str, Any]], files: list[Path]) -> Path:
    """Write the page; of two rows with one key the last counts."""
    found = {tuple(row[k] for k in KEY): row for row in rows if row["measure"] != "failed"}
    failed = [row for row in rows if row["measure"] == "failed"]
    parts = [_head(rows, files), *(part(found) for part in PARTS), _failures(failed)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _head(rows: list[dict[str, Any]], files: list[Path]) -> str:
    last = rows[-1] if rows else {}
    names = ("date", "gpu", "hardware", "torch", "triton", "lightning", "timm", "peft", "rank")
    said = ", ".join(f"{n} {last[n]}" for n in names if last.get(n))
    ends = [f"{r['measure']} {r['value']} {r['note']}".strip() for r in rows if r["part"] == "run"]
    names_of_files = ", ".join(f"`{path.name}`" for path in files)
    return (
        f"# Cost of adapters on a device\n\n{said}, TF32 off. Rows: {names_of_files} "
        f"({'; '.join(ends)}).\n\nMedians, and the quartiles in brackets."
    )


def _table(title: str, head: list[str], lines: Iterable[list[str]]) -> str:
    body = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
    return f"## {title}\n\n" + "\n".join(body) if len(body) > 2 else ""


def number(row: dict[str, Any] | None) -> float | None:
    """A row's figure."""
    return None if row is None or row["value"] == "" else float(row["value"])


def _text(row: dict[str, Any] | None, spread: bool = True) -> str:
    if row is None:
        return ""
    value, *ends = (_short(row[k]) for k in ("value", "lower", "upper"))
    return f"{value} ({ends[0]} to {ends[1]})" if spread and ends[0] else value


def _short(text: str) -> str:
    value = float(text or 0)
    return text and (f"{value:.0f}" if value >= 1000 else f"{value:.3g}")


def _seen(found: Rows, part: str, places: tuple[int, ...]) -> list[Key]:
    """Different values at these places of a part's keys, in the order of the rows."""
    return list(dict.fromkeys(tuple(k[i] for i in places) for k in found if k[0] == part))


def _crossed(title: str, part: str, *measures: str, spread: bool = True) -> Callable[[Rows], str]:
    """A line for each model, precision, mode and measure, a column for each variant."""

    def made(found: Rows) -> str:
        names = [k[0] for k in _seen(found, part, (4,))]
        lines = []
        for model, precision, mode in _seen(found, part, (1, 2, 3)):
            for measure in measures:
                own = [found.get((part, model, precision, mode, v, measure)) for v in names]
                if any(own):
                    texts = [_text(row, spread) for row in own]
                    lines.append([model, precision, mode, measure, *texts])
        return _table(title, ["model", "precision", "mode", "", *names], lines)

    return made


def _peaks(found: Rows) -> str:
    """Peaks over the floor's."""
    names = [k[0] for k in _seen(found, "steps", (4,)) if k[0]]
    lines = []
    for where in _seen(found, "steps", (1, 2, 3)):
        own = {v: number(found.get(("steps", *where, v, "peak, MiB"))) for v in names}
        if floor := own.get("floor"):
            over = [f"{own[v] / floor:.3f}" if own[v] else "" for v in names if v != "floor"]
            lines.append([*where, f"{floor:.0f} MiB", *over])
    others = [v for v in names if v != "floor"]
    return _table(
        "Peak memory over the floor's", ["model", "precision", "mode", "floor", *others], lines
    )


def _best(found: Rows, model: str, precision: str, name: str) -> float | None:
    """Milliseconds of a step, in the better of eager and compiled."""
    keys = [("steps", model, precision, m, name, "step, ms") for m in ("eager", "compiled")]
    every = [number(found.get(key)) for key in keys]
    return min((value for value in every if value is not None), default=None)


Judged = tuple[str, str, float, bool]  # goal, where, measured, met


def _step_goals(found: Rows) -> Iterator[Judged]:
    for model, precision in _seen(found, "steps", (1, 2)):
        where = f"{model}, {precision}"
        floor, ours, peft = (_best(found, model, precision, v) for v in ("floor", "ours", "peft"))
        if floor and ours:
            yield "step ≤ 1.10 × floor", where, ours / floor, ours <= 1.10 * floor
        if floor and ours and peft and peft > floor:
            share = (ours - floor) / (peft - floor)
            yield "overhead ≤ half of PEFT's", where, share, share <= 0.5


def _ratio_goals(
    found: Rows, kind: tuple[str, str, str], over: str, goal: str, met: Callable[[float], bool]
) -> Iterator[Judged]:
    """Ours over another variant's; `kind` is a part, a mode and a measure."""
    part, mode, measure = kind
    for model, precision in _seen(found, part, (1, 2)):
        keys = [(part, model, precision, mode, variant, measure) for variant in ("ours", over)]
        own, other = (number(found.get(key)) for key in keys)
        if own and other:
            yield goal, f"{model}, {precision}", own / other, met(own / other)


def _bank_goals(found: Rows) -> Iterator[Judged]:
    for key, row in found.items():
        if key[0] == "bank" and key[4].startswith("bank") and key[5] == "over one adapter":
            value = float(row["value"])
            where = ", ".join((*key[1:3], key[4]))
            yield "mixed batch ≤ 1.15 × one adapter", where, value, value <= 1.15


def _goals(found: Rows) -> str:
    """Each goal with what was measured."""
    peak, batch = ("steps", "eager", "peak, MiB"), ("largest", "", "largest batch")
    judged = [
        *_step_goals(found),
        *_ratio_goals(found, peak, "floor", "peak ≤ 1.05 × floor", lambda v: v <= 1.05),
        *_ratio_goals(found, batch, "peft", "largest batch ≥ 1.3 × PEFT's", lambda v: v >= 1.3),
        *_bank_goals(found),
    ]
    lines = [[goal, where, f"{v:.3f}", "yes" if met else "no"] for goal, where, v, met in judged]
    title = "Goals (steps: each variant in the better of eager and compiled)"
    return _table(title, ["goal", "where", "measured", "met"], lines)


def _failures(failed: list[dict[str, Any]]) -> str:
    lines = [[*(row[k] for k in KEY[:5]), row["note"].replace("|", "/")] for row in failed]
    return _table("Failed", [*KEY[:5], "error"], lines)


def _loading(found: Rows) -> str:
    lines = [[key[4], _text(row)] for key, row in found.items() if key[0] == "loading"]
    return _table("Injection and loading", ["work", "wall, ms"], lines)


PARTS: tuple[Callable[[Rows], str], ...] = (
    _goals,
    _crossed("Steps", "steps", "step, ms", "step over floor", "host, ms"),
    _peaks,
    _crossed("Another adapter for every item", "bank", "batch, ms", "over one adapter"),
    _crossed("Without labels", "label-free", "pictures a second", "seconds"),
    _loading,
    _crossed("Largest batch in 16 GiB", "largest", "largest batch"),
    _crossed("A step by the profiler", "profile", "kernels", "device, ms", "CPU, ms"),
    _crossed(
        "A linear layer by every formula", "thresholds",
        "forward and backward, µs", "inference, µs", spread=False,
    ),
)  # fmt: skip
