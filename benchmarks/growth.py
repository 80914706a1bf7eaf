"""Growth of an adapter's cost with rank, batch, tokens and depth, on a small ViT.

    python benchmarks/growth.py            # about ten minutes; CSV and docs/images/growth.png
    python benchmarks/growth.py --rounds 3 --no-save

A training step of the floor (see training_step.py), this library and PEFT (extra `bench`), in
turns in one process; plotted is what a step costs above the floor, in percent of it: the median
over rounds of each round's ratio, with the quartiles. One quantity changes at a time, from rank
8, batch 8, 197 tokens, 12 blocks, width 192.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from cases import VIT, Case, available, stepper, variant
from machine import in_turns, ratios, save, setting
from torch import nn

PLOT = Path(__file__).parents[1] / "docs" / "images" / "growth.png"
USUAL = {"rank": 8, "batch": 8, "tokens": 197, "depth": 12}
SWEEPS = {
    "rank": (1, 4, 8, 16, 32, 64),
    "batch": (1, 2, 4, 8, 16),
    "tokens": (17, 50, 101, 197, 401),
    "depth": (2, 6, 12, 24),
}


def case_of(batch: int, tokens: int, depth: int) -> Case:
    """A ViT of width 192 that sees pictures of one row of patches, and a class token."""
    size = (16, 16 * (tokens - 1))

    def build() -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=size, depth=depth)

    return Case(build, lambda: torch.rand(batch, 3, *size), VIT)


def measure(rounds: int) -> list[dict[str, Any]]:
    """Rows of all sweeps."""
    rows = []
    for axis, values in SWEEPS.items():
        for value in values:
            now = {**USUAL, axis: value}
            case = case_of(now["batch"], now["tokens"], now["depth"])
            batch = case.batch()
            names = [v for v in ("floor", "ours", "peft") if v in available()]
            models = {n: variant(n, case, now["rank"], 0.0) for n in names}
            times = in_turns({n: stepper(m, case, batch) for n, m in models.items()}, rounds)
            for name, (low, middle, high) in ratios(times, "floor").items():
                row = {"axis": axis, "at": value, "variant": name}
                rows.append({**row, "ratio": middle, "lower": low, "upper": high})
                print(f"{axis:8} {value:5} {name:8} {middle:.3f}   {low:.3f} to {high:.3f}")
    return rows


def draw(rows: list[dict[str, Any]]) -> None:
    """A panel for each quantity."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(SWEEPS), figsize=(11, 3), sharey=True, dpi=120)
    for panel, (axis, values) in zip(panels, SWEEPS.items(), strict=True):
        for name, color in (("peft", "tab:gray"), ("ours", "tab:blue")):
            own = [r for r in rows if r["axis"] == axis and r["variant"] == name]
            if not own:
                continue
            label = "lora-lightning" if name == "ours" else "PEFT"
            middle, low, high = (
                [100 * (r[k] - 1) for r in own] for k in ("ratio", "lower", "upper")
            )
            panel.plot(values, middle, marker="o", color=color, label=label)
            panel.fill_between(values, low, high, color=color, alpha=0.2, linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, [str(v) for v in values])
        panel.minorticks_off()
        panel.set_xlabel({"tokens": "tokens per picture", "depth": "blocks"}.get(axis, axis))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("training step above\nthe frozen model's, %")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PLOT)
    print(PLOT)


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-save", dest="save", action="store_false")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = measure(given.rounds)
    if given.save:
        where = {"threads": given.threads, "rounds": given.rounds}
        print(save("growth", rows, where | setting("peft")))
        draw(rows)


if __name__ == "__main__":
    main()
