"""Draws the rooms of the package and who imports whom, as docs/images/rooms.png.

    python docs/_rooms.py

Floors come from the contract in pyproject.toml, arrows from the imports themselves.
"""

from __future__ import annotations

import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

import grimp
from matplotlib.figure import Figure

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PURPOSE = {
    "cli": "the command", "deploy": "for other programs", "vision": "images",
    "speech": "recordings", "text": "translation", "adaptation": "an unlabelled target",
    "runner": "runs a recipe", "training": "callbacks", "bank": "an adapter per item",
    "model": "a whole network", "lora": "one layer", "report": "results, plots, page",
    "linalg": "decompositions",
}  # fmt: skip

# To the side, so that arrows which skip a floor are seen.
SHIFT = {"model": 0.12, "lora": -0.05, "linalg": -0.1, "bank": 0.1, "report": 0.1, "runner": 0.08}


def floors() -> list[list[str]]:
    """Rooms by floor, lowest first."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    contract = tools["importlinter"]["contracts"][0]
    return [[room.strip() for room in layer.split("|")] for layer in contract["layers"]][::-1]


def arrows(rooms: list[str]) -> dict[tuple[str, str], int]:
    """(importing, imported) → how many imports of modules that is."""
    graph = grimp.build_graph("lora_lightning", exclude_type_checking_imports=True)
    names = {room: f"lora_lightning.{room}" for room in rooms}
    inside = {room: {name} | graph.find_descendants(name) for room, name in names.items()}
    return Counter(
        (above, below)
        for above, below in permutations(rooms, 2)
        for module in inside[above]
        for _ in graph.find_modules_directly_imported_by(module) & inside[below]
    )


def main() -> None:
    """Boxes by floor; a thick line stands for many imports."""
    (errors,), (registry,), *storeys = floors()
    place = {
        room: ((i + 0.5) / len(floor) + SHIFT.get(room, 0), height)
        for height, floor in enumerate(storeys)
        for i, room in enumerate(floor)
    }
    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.add_subplot(xlim=(-0.05, 1.05), ylim=(-1.4, len(storeys) - 0.6))
    axes.axis("off")
    for i, ((above, below), count) in enumerate(arrows(list(place)).items()):
        (x0, y0), (x1, y1) = place[above], place[below]
        line = {"arrowstyle": "-|>", "color": f"C{list(place).index(above)}", "alpha": 0.6}
        line |= {"lw": min(0.7 + count / 8, 4), "connectionstyle": f"arc3,rad={(y0 - y1 - 1) / 16}"}
        axes.annotate("", (x1, y1 + 0.25), (x0 + 0.012 * (i % 5 - 2), y0 - 0.25), arrowprops=line)
    words = {room: f"{room}\n{PURPOSE[room]}" for room in place}
    words[errors], place[errors] = f"{registry}, {errors}: every room imports them", (0.5, -1)
    for room, (x, y) in place.items():
        look = {"boxstyle": "round", "facecolor": "white"}
        axes.text(x, y, words[room], ha="center", va="center", bbox=look, fontsize=11, zorder=5)
    figure.savefig(ROOT / "docs/images/rooms.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
