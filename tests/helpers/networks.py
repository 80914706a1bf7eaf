"""Small networks of a kind that several rooms are tested with."""

from __future__ import annotations

import torch
from torch import nn


class Tied(nn.Module):
    """An output layer that is an embedding's, and a layer between that is not; always the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.middle = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.middle(self.embed(x)).tanh())


class Sides(nn.Module):
    """Reads a vector off the mean of each half of a picture, by a linear head."""

    def __init__(self, skew: float = 0.0):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        with torch.no_grad():
            # The sine is what the right has more than the left, but for a preference for a side.
            self.fc.weight.copy_(torch.tensor([[0.5, 0.5], [-1.0, 1.0]]))
            self.fc.bias.copy_(torch.tensor([0.0, skew]))

    def forward(self, x):
        left, right = x.chunk(2, dim=-1)
        return self.fc(torch.stack([left.mean((1, 2, 3)), right.mean((1, 2, 3))], dim=1))


class PackedTensor(torch.Tensor):
    """A quantised weight of an ordinary layer, as torchao's `quantize_` makes them."""

    @staticmethod
    def __new__(cls, data, scale):
        like = {"dtype": scale.dtype, "device": scale.device, "requires_grad": False}
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, **like)

    def __init__(self, data, scale):
        self.data8, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data8", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, *_):
        return cls(parts["data8"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].data8, args[0].scale)
        if func is not torch.ops.aten.t.default:
            raise NotImplementedError(f"{func} of a packed tensor")
        return (args[0].data8 * args[0].scale).t()


def quantise(layer: nn.Module) -> None:
    """In place, as `quantize_` does."""
    weight = layer.weight.detach()
    scale = weight.abs().max() / 127
    packed = PackedTensor((weight / scale).round().to(torch.int8), scale)
    layer.weight = nn.Parameter(packed, requires_grad=False)
