"""Every architecture module of timm: the smallest entry of each, random weights, small input.

The long tier: ``pytest -m slow tests/test_every_timm.py -s`` prints the table.
"""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from timm.models._registry import _module_to_models
from torch import nn

from lora_lightning import inject, remove, verify
from lora_lightning.probe import run, without_noise
from lora_lightning.state import named_factors
from lora_lightning.verification import _randomised, difference

SMALLEST: dict[str, str] = json.loads(Path(__file__).with_name("timm_smallest.json").read_text())
SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 384)
TABLE: list[str] = []


def test_the_list_holds_every_architecture_module():
    assert sorted(SMALLEST) == sorted(_module_to_models)


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model with ten classes and the smallest input that it accepts."""
    for size in SIZES:
        for options in ({"img_size": size}, {}):
            torch.manual_seed(0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model = timm.create_model(name, num_classes=10, **options).eval()
                wake(model)
                x = torch.randn(2, 3, size, size)
                with torch.no_grad():
                    model(x)
            except (TypeError, RuntimeError, AssertionError, ValueError, IndexError):
                continue
            return model, x
    raise AssertionError(f"{name} runs at none of {SIZES}")


@torch.no_grad()
def wake(model: nn.Module) -> None:
    """Open zero-initialised gates: behind them every adapter is rightly reported as dead."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() < 2 and parameter.abs().max() < 1e-2:
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.copy_(0.3 + 0.2 * noise)
        elif parameter.dim() >= 2 and not parameter.any():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["auto", "all"])
@pytest.mark.parametrize("module", sorted(SMALLEST))
def test_every_architecture(module: str, targets: str):
    model, x = build(SMALLEST[module])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        source = run(model, x)

    report = inject(
        model, rank=4, target_modules=targets, clamp_rank=True, trainable=[], seed=0
    )
    with torch.no_grad():
        assert all(map(torch.equal, run(model, x), source)), "not the base's output at the start"
    assert before.keys() <= model.state_dict().keys()
    found = verify(model, x, tolerance=1e-5)[0]
    train_gap = train_against_eval(model, x)
    assert train_gap is None or train_gap < 1e-5

    remove(model)
    assert [type(m) for m in model.modules()] == classes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    with torch.no_grad():
        assert all(map(torch.equal, run(model, x), source))
    kinds = sorted({row.path for row in report.rows})
    TABLE.append(
        f"{module:28s} {SMALLEST[module]:36s} {targets:5s} {x.shape[-1]:4d} "
        f"{len(report.rows):4d} {'+'.join(kinds):21s} effect {found.effect:.1e} "
        f"merge {found.merge_error:.1e}"
    )
    del model
    gc.collect()


def train_against_eval(model: nn.Module, x: torch.Tensor) -> float | None:
    """Largest difference between training (noise off) and eval outputs with random factors.

    ``None`` where the model itself returns something else in training (distilled heads).
    """
    with _randomised(model, named_factors(model, "default")), torch.no_grad():
        with without_noise(model, training=True):
            training = run(model, x)
        model.eval()
        evaluating = run(model, x)
    if [t.shape for t in training] != [e.shape for e in evaluating]:
        return None
    return difference(training, evaluating)


@pytest.fixture(scope="module", autouse=True)
def _print_table():
    yield
    if TABLE:
        print("\n" + "\n".join(TABLE))
        print(f"{len(TABLE)} runs over {len(SMALLEST)} architecture modules")
