"""Memory of the device: peaks, and that it is given back."""

from __future__ import annotations

import gc

import pytest
import timm
import torch
from torch import nn

from lora_lightning import fused, inject, merge, remove, set_active, unmerge, verify
from tests.helpers.cuda import stir

pytestmark = pytest.mark.cuda


def network(**options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=4, num_classes=10)
    inject(model, **{"rank": 8, "target_modules": "all", "trainable": [], **options})
    return stir(model, 0.02)


def used() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def peak(run) -> int:
    """Bytes above what was there before."""
    before = used()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def step(model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None):
    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            loss = model(x).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return run


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_step_takes_hardly_more_than_the_frozen_network_does(dtype, cuda):
    """Which keeps for the gradient of its input what a frozen network must keep."""
    model = network().to(cuda).train()
    x = torch.randn(64, 3, 96, 96, device=cuda)
    floor = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=4, num_classes=10)
    floor = floor.to(cuda).train().requires_grad_(False)
    floor.pos_embed.requires_grad_()
    frozen, ours = step(floor, x, dtype), step(model, x, dtype)
    for run in (frozen, ours):
        run()
    lowest, adapted = peak(frozen), peak(ours)
    with fused(False):
        ours()
        plain = peak(ours)
    assert adapted <= plain
    assert adapted <= 1.25 * lowest, f"{adapted / lowest:.2f} times the floor"


def test_verification_gives_its_memory_back(cuda):
    model = network().to(cuda)
    x = torch.randn(2, 3, 96, 96, device=cuda)
    verify(model, x)
    before = used()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # Raw weights beside merged ones, and the activations of two pictures.
    assert peak(lambda: verify(model, x)) < 3 * weights
    assert used() == before


def test_ten_switches_and_merges_keep_nothing(cuda):
    model = network(name="one")
    inject(model, rank=8, target_modules="all", trainable=[], name="two")
    model.to(cuda)
    merge(model)
    unmerge(model)
    before = used()

    def switch() -> None:
        for name in ["one", "two"] * 5:
            set_active(model, name)
            merge(model)
            unmerge(model)

    assert peak(switch) < 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    assert used() == before


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_that_leaves_takes_everything_along(merged, cuda):
    network().to(cuda)(torch.randn(2, 3, 96, 96, device=cuda)).sum().backward()  # cuBLAS's room
    before = used()
    model = network().to(cuda)
    assert used() > before
    if merged:
        merge(model)
    model.cpu()
    assert used() == before
    model.to(cuda)
    if merged:
        unmerge(model)
    remove(model)
    model.cpu()
    assert used() == before
