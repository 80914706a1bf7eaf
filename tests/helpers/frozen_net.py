"""A small network whose first layers are frozen, and what `PrefixCache` must give for it."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

from lora_lightning import PrefixCache
from tests.helpers.audio_zoo import noise


class Net(nn.Module):
    """`a` and `b` are frozen, `c` is trained."""

    def __init__(self, a: nn.Module | None = None, mid: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.mid = a or nn.Linear(8, 8), mid or nn.Tanh()
        self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 4)
        for module in (self.a, self.mid, self.b):
            module.requires_grad_(False)

    def forward(self, x):
        return self.c(torch.relu(self.b(self.mid(self.a(x)))))


def plainly(model: nn.Module, *args, **kwargs) -> torch.Tensor:
    """The output by the model's own forward, no hooks."""
    with torch.no_grad():
        return model.forward(*args, **kwargs)


def exact(model: nn.Module, *args, **kwargs) -> bool:
    """Whether a forward in training gives what it gives without the cache; it learns a little."""
    expected = plainly(model, *args, **kwargs)
    out = model(*args, **kwargs)
    out.sum().backward()
    return torch.allclose(out, expected, atol=1e-6)


@contextmanager
def attached(model: nn.Module, **options):
    with PrefixCache(10, **options).attach(model) as cache:
        yield cache


X, OTHER = noise(4, 8), noise(8, 8)[4:]


def exact_first(model: nn.Module, x: torch.Tensor = X, **options) -> bool:
    with attached(model, **options):
        return exact(model, x)
