"""Regret of choosing among adapted models without labels.

    python benchmarks/selection.py --out runs/selection

Twelve lights, and for each fifteen ways to adapt the same source model to it: five objectives by
three learning rates, with BatchNorm's statistics taken from the target, four epochs each, without
guard, so that some collapse. `select` chooses among them (or the source) by alarms and by how far
they agree. Regret is the accuracy of the best candidate less that of the chosen one, in points; a
candidate counts as collapsed below half of the source model's accuracy. The highest nuclear norm
of those that have not collapsed, and the least entropy of all, stand beside it.
"""

from __future__ import annotations

import argparse
import copy
import csv
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import seed_everything

try:  # from the repository's root, and as a script beside the other
    from benchmarks.do_no_harm import Data, Pictures, fit, source_model
except ImportError:
    from do_no_harm import Data, Pictures, fit, source_model

from lora_lightning import TransductiveTask
from lora_lightning.adaptation.neighbours import nearest
from lora_lightning.adaptation.prediction_self_training import NEIGHBOURS
from lora_lightning.adaptation.selection import SOURCE, Candidate, select
from lora_lightning.adaptation.target import Target, predicted
from lora_lightning.adaptation.validators import mean_entropy, nuclear_norm

OBJECTIVES: dict[str, dict[str, Any]] = {
    "IM + pseudo-labels": {},
    "IM": {"pseudo_label_weight": 0.0},
    "NRC": {"objective": "neighbour-consistency", "pseudo_label_weight": 0.0},
    "MCC": {"objective": "minimum-class-confusion", "pseudo_label_weight": 0.0},
    "entropy": {"objective": "entropy", "pseudo_label_weight": 0.0},
}
RATES = (5e-4, 2e-3, 2e-2)
FIELDS = (
    "target", "seed", "candidate", "accuracy", "agreement", "nuclear_norm", "entropy", "alarm",
    "chosen",
)  # fmt: skip


def adapted(source: Any, data: Data, pictures: Any, settings: dict[str, Any], out: Path) -> Any:
    """The probabilities (N, K) after adapting in this way."""
    d = data.domains
    task = TransductiveTask(
        copy.deepcopy(source),
        Pictures(pictures, d.test_transform),
        training=Pictures(pictures, d.train_transform),
        batch_norm="target",
        limits=None,
        **settings,
    )
    fit(task, out)
    return task.probabilities_


def one_shift(source: Any, data: Data, domain: str, seed: int, out: Path) -> list[dict[str, Any]]:
    """A row for each candidate of a light, and for the source."""
    pictures, classes = data.target(domain)
    loader = Target(data.domains.test_transform(pictures)).loader(64, shuffle=False)
    before = predicted(source, source, loader, torch.device("cpu"))
    candidates = []
    for name, settings in OBJECTIVES.items():
        for rate in RATES:
            seed_everything(seed, verbose=False)
            given = {**settings, "learning_rate": rate}
            candidates.append(
                Candidate(f"{name}, {rate:g}", adapted(source, data, pictures, given, out))
            )
    near = nearest(before.features, NEIGHBOURS)[0]
    choice = select(candidates, before.probabilities, near)
    rows = []
    for c in [*candidates, Candidate(SOURCE, before.probabilities)]:
        rows.append(
            {
                "target": domain,
                "seed": seed,
                "candidate": c.name,
                "accuracy": 100 * float((c.probabilities.argmax(1) == classes).double().mean()),
                "agreement": choice.scores.get(c.name, ""),
                "nuclear_norm": nuclear_norm(c.probabilities),
                "entropy": mean_entropy(c.probabilities),
                "alarm": choice.rejected.get(c.name, ""),
                "chosen": c.name == choice.name,
            }
        )
    return rows


def accuracies(rows: list[dict[str, Any]]) -> tuple[float, float, float, float, bool]:
    """(best, chosen, by nuclear norm, by entropy) accuracy, and whether the choice collapsed."""
    candidates = [r for r in rows if r["candidate"] != SOURCE]
    source = next(r["accuracy"] for r in rows if r["candidate"] == SOURCE)
    best = max(r["accuracy"] for r in candidates)
    chosen = next(r["accuracy"] for r in rows if r["chosen"])
    usable = [r for r in candidates if not r["alarm"]] or candidates
    sharp = max(usable, key=lambda r: r["nuclear_norm"])["accuracy"]
    sure = min(candidates, key=lambda r: r["entropy"])["accuracy"]
    return best, chosen, sharp, sure, chosen < source / 2


def main() -> None:
    """Run what the arguments choose; a line of the CSV for each candidate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/selection"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+")
    parser.add_argument("--cache", help="folder for the rendered pictures")
    given = parser.parse_args()
    seed_everything(given.seed, verbose=False)
    data = Data(given.seed, given.cache)
    source = source_model(data, given.out / f"source-{given.seed}.pt")
    found = []
    with (given.out / f"selection-{given.seed}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        for domain in given.targets or [t for t in data.targets if t != "source"]:
            rows = one_shift(source, data, domain, given.seed, given.out)
            table.writerows(rows)
            file.flush()
            best, chosen, sharp, sure, collapsed = accuracies(rows)
            mean = fmean(r["accuracy"] for r in rows)
            name = next(r["candidate"] for r in rows if r["chosen"])
            print(
                f"{domain}: best {best:.1f}, mean {mean:.1f}, chosen {chosen:.1f} ({name}), "
                f"nuclear norm {sharp:.1f}, least entropy {sure:.1f}" + ", COLLAPSED" * collapsed,
                flush=True,
            )
            found.append((best - chosen, best - sharp, best - sure, collapsed))
    regrets, norms, entropies, collapses = zip(*found, strict=True)
    print(
        f"mean regret {fmean(regrets):.2f} points (largest {max(regrets):.1f}), by nuclear "
        f"norm {fmean(norms):.2f}, by least entropy {fmean(entropies):.2f}; "
        f"{sum(collapses)} of {len(found)} choices collapsed"
    )


if __name__ == "__main__":
    main()
