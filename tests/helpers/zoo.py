"""Layers of every kind that can be adapted, each with an input, as (make, input) pairs."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from lora_lightning import load_adapter, merge, remove, save_adapter, unmerge
from lora_lightning.model.probing import difference, run


def image(channels: int = 4, size: int = 9) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(3))


def sequence(features: int = 6) -> torch.Tensor:
    return torch.randn(2, 5, features, generator=torch.Generator().manual_seed(3))


def signal(channels: int = 4) -> torch.Tensor:
    return torch.randn(2, channels, 16, generator=torch.Generator().manual_seed(3))


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, dim=2 if layer.weight.dim() == 3 else 0)


class Attend(nn.Module):
    """Self-attention with the query as key and value, or with keys of other widths."""

    def __init__(self, **options):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.kdim, self.vdim = options.get("kdim", 8), options.get("vdim", 8)

    def forward(self, x):
        return self.attend(x, x[..., : self.kdim], x[..., : self.vdim])[0]


class Cell(nn.Module):
    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.cell = kind(6, 5)

    def forward(self, x):
        out = self.cell(x[:, 0])
        out = self.cell(x[:, 1], out)  # a state of zeros would hide the recurrent weight
        return out[0] if isinstance(out, tuple) else out


class Positions(nn.Module):
    """A bare parameter, as ViT's pos_embed."""

    def __init__(self, *shape: int):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return torch.tanh(x + self.pos_embed)


class Functional(nn.Linear):
    """Reads its weight instead of being called the usual way."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 1.5, self.bias)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Bilinear(6, 6, 5)

    def forward(self, x):
        return self.mix(x, x.flip(-1))


ZOO = {
    "Linear": (lambda: nn.Linear(6, 5), sequence()),
    "Linear without bias": (lambda: nn.Linear(6, 5, bias=False), sequence()),
    "Linear subclass": (lambda: Functional(6, 5), sequence()),
    "Bilinear": (Pair, sequence()),
    "Embedding": (lambda: nn.Embedding(7, 6), torch.arange(6).view(2, 3)),
    "Embedding padding": (lambda: nn.Embedding(7, 6, padding_idx=0), torch.arange(6).view(2, 3)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(7, 6), torch.arange(6).view(2, 3)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), signal()),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), image()),
    "Conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1), image()),
    "Conv2d dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), image()),
    "Conv2d string padding": (lambda: nn.Conv2d(4, 6, 3, padding="same"), image()),
    "Conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), image()),
    "Conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), image()),
    "Conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), image()),
    "Conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), image()),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), torch.randn(2, 2, 4, 4, 4)),
    "Conv2dSame": (lambda: Conv2dSame(4, 6, 3, stride=2), image()),
    "StdConv2d": (lambda: StdConv2d(4, 6, 3), image()),
    "StdConv2dSame": (lambda: StdConv2dSame(4, 6, 3, stride=2), image()),
    "ScaledStdConv2d": (lambda: ScaledStdConv2d(4, 6, 3), image()),
    "ScaledStdConv2dSame": (lambda: ScaledStdConv2dSame(4, 6, 3, stride=2), image()),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), signal()),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, output_padding=0), image()),
    "ConvTranspose2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), image()),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 4, 2), torch.randn(2, 2, 4, 4, 4)),
    "MultiheadAttention": (Attend, sequence(8)),
    "MultiheadAttention kdim": (lambda: Attend(kdim=6, vdim=4), sequence(8)),
    "LSTM": (lambda: nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True), sequence()),
    "LSTM projected": (lambda: nn.LSTM(6, 4, proj_size=3, batch_first=True), sequence()),
    "GRU": (lambda: nn.GRU(6, 4, batch_first=True), sequence()),
    "RNN": (lambda: nn.RNN(6, 4, batch_first=True), sequence()),
    "LSTMCell": (lambda: Cell(nn.LSTMCell), sequence()),
    "GRUCell": (lambda: Cell(nn.GRUCell), sequence()),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), sequence()),
    "weight norm conv": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3, groups=2), dim=2),
        signal(),
    ),
    "weight norm hook": (lambda: old_weight_norm(nn.Linear(6, 5)), sequence()),
    "weight norm hook conv": (lambda: old_weight_norm(nn.Conv1d(4, 4, 3, groups=2)), signal()),
    "pos_embed": (lambda: Positions(1, 5, 6), sequence()),
    "pos_embed map": (lambda: Positions(1, 4, 9, 9), image()),
    "bias table": (lambda: Positions(5, 6), sequence()),
}

# One kind for each way in which layers compute.
WAYS = ["Linear", "Conv2d", "Conv2d grouped", "Embedding", "MultiheadAttention", "LSTM", "GRU",
        "StdConv2d", "weight norm"]  # fmt: skip

BARE = ("pos_embed", "pos_embed map", "bias table")


def targets(kind: str) -> str:
    return "pos_embed" if kind in BARE else "all"


def crossed(values: list[str]) -> list:
    """Every kind with every value; of kinds that compute as another the fast tier has a quarter."""
    return [
        pytest.param(
            kind, value, marks=[] if kind in WAYS or (i + j) % 4 == 0 else pytest.mark.slow
        )
        for i, kind in enumerate(sorted(ZOO))
        for j, value in enumerate(values)
    ]


@torch.no_grad()
def there_and_back(model: nn.Module, x: torch.Tensor, path: Path, base: nn.Module) -> None:
    """Merged, unmerged, saved, taken off and loaded, the adapted model says what it said."""
    adapted = run(model, x)
    merge(model)
    assert difference(run(model, x), adapted) < 1e-5
    unmerge(model)
    assert difference(run(model, x), adapted) == 0
    save_adapter(model, path)
    remove(model)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in model.state_dict().items())
    load_adapter(model, path)
    assert difference(run(model, x), adapted) == 0
