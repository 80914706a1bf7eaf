"""Every architecture module of timm: the smallest entry of each, random weights, small input.

The long tier: ``pytest -m slow tests/model/test_every_timm.py -s`` prints the table.
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
from lora_lightning.model.probing import difference, randomised, run, without_noise
from lora_lightning.model.state import named_factors

SMALLEST: dict[str, str] = json.loads(Path(__file__).with_name("timm_smallest.json").read_text())
SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 384)
# Below this its last stage is a single position, where attention has no gradient to its keys.
LEAST_SIZE = {"efficientvit_m0": 192}
# The smallest entry is still 24 blocks of 412 million parameters; two blocks say the same.
FEWER_BLOCKS = {"deepseek_vit_412m": {"depth": 2}}
TABLE: list[str] = []
pytestmark = pytest.mark.usefixtures("fused_at_any_size")


def test_the_list_holds_every_architecture_module():
    assert sorted(SMALLEST) == sorted(_module_to_models)


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model with ten classes and the smallest input that it accepts."""
    fewer = FEWER_BLOCKS.get(name, {})
    for size in [s for s in SIZES if s >= LEAST_SIZE.get(name, 0)]:
        for options in ({"img_size": size, **fewer}, fewer):
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
    # Frozen first: torch picks some kernels by requires_grad, which is not our doing.
    model.requires_grad_(False)
    limit = max(1e-5, 4 * sensitivity(model, x))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        source = run(model, x)

    report = inject(model, rank=4, target_modules=targets, clamp_rank=True, trainable=[], seed=0)
    with torch.no_grad():
        assert all(map(torch.equal, run(model, x), source)), "not the base's output at the start"
    assert before.keys() <= model.state_dict().keys()
    found = verify(model, x, tolerance=limit)[0]
    train_gap = train_against_eval(model, x)
    assert train_gap is None or train_gap <= limit

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
        f"merge {found.merge_error:.1e} of {limit:.0e}"
    )
    del model
    gc.collect()


@torch.no_grad()
def sensitivity(model: nn.Module, x: torch.Tensor) -> float:
    """How much the base's own output moves when its input moves by one rounding unit.

    Random weights amplify rounding in a few architectures beyond 1e-5; no two ways of
    computing the same thing agree better than that.
    """
    return difference(run(model, x * (1 + 2**-23)), run(model, x))


def train_against_eval(model: nn.Module, x: torch.Tensor) -> float | None:
    """Largest difference between training (noise off) and eval outputs with random factors.

    ``None`` where the model itself returns something else in training (distilled heads).
    """
    with randomised(model, named_factors(model, "default")), torch.no_grad():
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
