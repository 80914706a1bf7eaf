"""What torch does with a weight, done with another weight for every item of the batch.

Each function takes the arguments of the torch function that it stands for, as those of
`lora_lightning.bank.products` do; `OPS` holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.bank.products import affine, conv, linear, mix_of, values, where
from lora_lightning.errors import AdapterError


def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """`torch.nn.functional.embedding` (what only its backward pass looks at has no effect)."""
    n, layout = where(input, weight)
    mix = mix_of(weight)
    assert mix is not None
    index = layout.items(input, n)
    rows, item = index.flatten(1), torch.arange(n, device=input.device)[:, None]
    if mix.full is not None:
        found = mix.full[item, rows]
    else:
        lora_A, lora_B = mix.factors()
        found = F.embedding(rows, mix.raw) + lora_B[item, rows] @ lora_A
    if mix.scale is not None:
        found = found * mix.scale[item, rows][..., None]
    return layout.back(found.view(*index.shape, -1))


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`."""
    n, layout = where(input, weight, bias)
    out = F.layer_norm(input, normalized_shape, None, None, eps)
    return affine(out, values(weight), values(bias), n, layout, -len(normalized_shape))


def rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`torch.nn.functional.rms_norm`."""
    n, layout = where(input, weight)
    out = F.rms_norm(input, normalized_shape, None, eps)
    return affine(out, values(weight), None, n, layout, -len(normalized_shape))


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.group_norm`."""
    n, layout = where(input, weight, bias)
    out = F.group_norm(input, num_groups, None, None, eps)
    return affine(out, values(weight), values(bias), n, layout, 1 - out.dim())


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""`torch.nn.functional.batch_norm` with running statistics, :math:`x a + b` of each item."""
    n, layout = where(input, running_mean, running_var, weight, bias)
    mean, variance = values(running_mean), values(running_var)
    if training or mean is None or variance is None:
        raise AdapterError(
            "a BatchNorm that normalises by the batch mixes its items: call model.eval(), or give "
            "it running statistics"
        )
    a, b = (variance + eps).rsqrt(), values(bias)
    if weight is not None:
        scale = values(weight)
        assert scale is not None
        a = a * scale
    shift = -mean * a if b is None else b - mean * a
    return affine(input, a, shift, n, layout, 1 - input.dim())


# Torch function → (what stands for it, how many dimensions its first argument, the input, has at
# least where there are items in it).
OPS: dict[Any, tuple[Callable[..., Tensor], int]] = {
    F.linear: (linear, 2),
    F.conv1d: (partial(conv, F.conv1d), 3),
    F.conv2d: (partial(conv, F.conv2d), 4),
    F.conv3d: (partial(conv, F.conv3d), 5),
    F.embedding: (embedding, 1),
    F.layer_norm: (layer_norm, 2),
    F.rms_norm: (rms_norm, 2),
    F.group_norm: (group_norm, 2),
    F.batch_norm: (batch_norm, 2),
}

# Those that are done with the items in the first dimension only.
ITEMS_FIRST: frozenset[Any] = frozenset([F.conv1d, F.conv2d, F.conv3d, F.group_norm])


def _called_conv(op: Any, layer: Any, x: Tensor, weight: Any, bias: Any) -> Tensor:
    if layer.padding_mode != "zeros":
        raise AdapterError("a bank cannot be compiled with convolutions that pad by themselves")
    return conv(op, x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


# The forward of a layer → the same with a weight and a bias that are given.
CALLED: dict[Any, Callable[..., Tensor]] = {
    nn.Linear.forward: lambda layer, x, weight, bias: linear(x, weight, bias),
    nn.Conv1d.forward: partial(_called_conv, F.conv1d),
    nn.Conv2d.forward: partial(_called_conv, F.conv2d),
    nn.Conv3d.forward: partial(_called_conv, F.conv3d),
}
