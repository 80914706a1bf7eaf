"""Models and fits on a device, beside the same on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.model.probing import difference
from tests.helpers.training import bright, fitted

# Of cuDNN and of other products in float32: what torch offers, its default, Lightning's advice.
SETTINGS = {"ieee": (False, "highest"), "default": (True, "highest"), "high": (True, "high")}


@contextlib.contextmanager
def precision_of_products(setting: str) -> Iterator[None]:
    """One of `SETTINGS`; torch's defaults afterwards."""
    try:
        set_precision(setting)
        yield
    finally:
        set_precision("default")


def set_precision(setting: str) -> None:
    torch.backends.cudnn.allow_tf32, products = SETTINGS[setting]
    torch.set_float32_matmul_precision(products)


@torch.no_grad()
def stir(model: nn.Module, std: float = 0.1, seed: int = 0) -> nn.Module:
    """Adds noise to all that is trained, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_((std * torch.randn(parameter.shape, generator=generator)).to(parameter))
    return model


def on_cpu(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().cpu() for t in tensors]


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest relative difference, wherever the tensors are, in the precision of the second."""
    second = on_cpu(b)
    return difference([x.to(y.dtype) for x, y in zip(on_cpu(a), second, strict=True)], second)


def gradients(model: nn.Module, outputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Of all that is trained, from a random projection of the outputs; zero where unused."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (o.float() * torch.randn(o.shape, generator=generator).to(o.device)).sum()
        for o in outputs
        if o.requires_grad
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


class Recurrent(nn.Module):
    """A classifier of sequences (B, T, 6)."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, classes: int = 4):
        super().__init__()
        self.body = kind(6, 8, num_layers=2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)[0].mean(1)))


def needs_half_recurrence(device: torch.device) -> None:
    """Skips where torch has no recurrent layers in bfloat16, which is oneDNN's affair."""
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            nn.LSTM(6, 8).to(device)(torch.zeros(2, 2, 6, device=device))
    except RuntimeError as error:
        pytest.skip(f"torch has no LSTM in bfloat16 here: {error}")


def fit(tmp_path, device: torch.device, module, *callbacks, **options):
    """The trainer after a fit on the device; Lightning leaves the module on the CPU."""
    options = {"data": bright(), "accelerator": device.type, "devices": 1, **options}
    return fitted(tmp_path, module, *callbacks, **options)


def finite(module: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in module.parameters())
