"""Adapted layers, and the fused path beside the plain formula."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning import fused, inject
from lora_lightning.model.probing import difference


def adapted(*layers: nn.Module, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = copy.deepcopy(nn.Sequential(*layers)).to(dtype)
    inject(model, **{"rank": 2, "target_modules": "all", "trainable": [], **options})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def results(model: nn.Module, x: Tensor, **how: bool) -> list[Tensor]:
    """Output without gradients, output, and the gradients of input, bias and factors."""
    x = x.detach().requires_grad_()
    with fused(**{"smallest": 0, **how}):
        torch.manual_seed(1)
        out = model(x)
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.manual_seed(2)
        grads = torch.autograd.grad(out, [x, *trained], torch.randn(out.shape).to(out))
        with torch.no_grad():
            torch.manual_seed(1)
            return [model(x), out.detach(), *grads]


def agree(model: nn.Module, x: Tensor, tolerance: float = 1e-12) -> None:
    plain = results(model, x, enabled=False)
    for recompute in (True, False):
        found = results(model, x, recompute=recompute)
        assert [t.dtype for t in found] == [t.dtype for t in plain]
        for a, b in zip(found, plain, strict=True):
            assert difference([a], [b]) < tolerance
