"""Accuracy on a target predicted without labels, before and after adapting.

    python benchmarks/shift_prediction.py --out runs/shift_prediction

EfficientNet-Lite0 with ImageNet weights is trained on the source of each kind of shift (600
pictures of 64 × 64), measured on 160 source pictures that it was not trained on, and on 160
unlabelled pictures of each target: the mildest and the most severe of every kind, 8 environments
and 8 lights (``--kinds viewpoint`` has 6 views more). It is then adapted to each of them without
labels (`TransductiveTask`, as in the recipes, for two epochs) and measured again. The truth is the
accuracy on all 280 pictures of the target, 120 of them held out. The results are kept in
``--out``, so that an interrupted run can be continued.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torchvision.transforms import v2

try:  # from the repository's root, and as a script beside the other
    from benchmarks.do_no_harm import Data, Pictures, evaluated, fit, source_model
    from benchmarks.shift_prediction_report import report
except ImportError:
    from do_no_harm import Data, Pictures, evaluated, fit, source_model
    from shift_prediction_report import report

from lora_lightning import TransductiveTask
from lora_lightning.adaptation.shift.batch_norm_agreement import second_opinion
from lora_lightning.adaptation.shift.features import features_of
from lora_lightning.vision.backbones import PACKAGED, create_backbone
from lora_lightning.vision.data.synthetic.worlds import WORLDS

JITTER = 0.4  # of the recipe's training without labels
SEVERITIES = ("1", "3")
BATCH = 50  # pictures


def look(model: nn.Module, data: Data, pictures: Tensor, labels: Tensor) -> dict[str, Any]:
    """Predictions, second opinion and features of pictures."""
    items = data.domains.test_transform(pictures)
    found, predictions = features_of(model, items, BATCH)
    return {
        "features": {name: x.half() for name, x in found.items()},
        "probabilities": predictions.probabilities,
        "second": second_opinion(model, items, model),
        "labels": labels,
    }


def augmented(data: Data) -> Any:
    """As the recipe trains without labels."""
    jitter = v2.ColorJitter(JITTER, JITTER, JITTER, JITTER / 8)
    return v2.Compose([jitter, data.domains.train_transform])


def accuracy(model: nn.Module, data: Data, domain: str) -> float:
    """On the held-out pictures, from 0 to 1."""
    pictures, labels = data.get(domain, "test")
    right = evaluated(model)(data.domains.test_transform(pictures)).argmax(1) == labels
    return float(right.double().mean())


def adapted(source: nn.Module, data: Data, pictures: Tensor, given: Any) -> tuple[nn.Module, Any]:
    """The source model, adapted to pictures without their labels."""
    model = copy.deepcopy(source)
    task = TransductiveTask(
        model,
        Pictures(pictures, data.domains.test_transform),
        training=Pictures(pictures, augmented(data)),
        learning_rate=2e-3,
    )
    fit(task, given.out, given.epochs, verify=False)
    return model.eval(), task.rounds_


def one(source: nn.Module, data: Data, domain: str, given: Any) -> dict[str, Any]:
    """All measurements of a target."""
    pictures, labels = data.target(domain)
    seen: dict[str, Any] = {"before": look(source, data, pictures, labels)}
    seen["accuracy_before"] = accuracy(source, data, domain)
    model, rounds = adapted(source, data, pictures, given)
    probabilities = evaluated(model)(data.domains.test_transform(pictures)).softmax(1)
    seen["after"] = {"probabilities": probabilities, "labels": labels}
    seen["accuracy_after"] = accuracy(model, data, domain)
    seen["accepted"], seen["end"] = rounds.accepted_, rounds.termination_condition_
    seen["rounds"] = [vars(r) for r in rounds.history_]
    return seen


def measure(seed: int, kind: str, given: Any) -> None:
    """A kind of shift with one seed; existing results are kept."""
    folder = given.out / f"{kind}-{seed}"
    domains = [d for d in WORLDS[kind] if d.endswith(SEVERITIES)]
    todo = [d for d in ["source", *domains] if not (folder / f"{d}.pt").exists()]
    if not todo:
        return
    data = Data(seed, given.cache, kind, domains, learn=60, adapt=16, test=12)
    seed_everything(seed, verbose=False)
    # The sources of light and view are the same pictures, and so is the model.
    name = f"source-{'environment' if kind == 'environment' else 'plain'}-{seed}.pt"
    backbone = create_backbone(PACKAGED, 10, imagenet="package")
    source = source_model(data, given.out / name, 5, backbone, 1e-3)
    folder.mkdir(parents=True, exist_ok=True)
    for domain in todo:
        seed_everything(seed, verbose=False)
        if domain == "source":
            seen = {"before": look(source, data, *data.target(domain))}
            seen["accuracy_before"] = accuracy(source, data, domain)
        else:
            seen = one(source, data, domain, given)
        torch.save(seen, folder / f"{domain}.pt")
        print(seed, kind, domain, *(f"{seen[k]:.3f}" for k in seen if k.startswith("accuracy")),
              seen.get("end", ""), flush=True)  # fmt: skip


def main() -> None:
    """Measure every target, then report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/shift_prediction"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--kinds", nargs="+", default=["environment", "lighting"], choices=list(WORLDS)
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--csv", type=Path, help="default: in --out")
    parser.add_argument("--pictures", type=Path, help="folder of the figures; default: --out")
    parser.add_argument("--cache", help="folder for the rendered pictures")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for kind in given.kinds:
            measure(seed, kind, given)
    to = given.csv or given.out / "shift-prediction.csv"
    report(given.out, given.seeds, given.kinds, to, given.pictures or given.out)


if __name__ == "__main__":
    main()
