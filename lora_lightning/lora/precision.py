"""The precision of factors: float32 at least, whatever the base's.

In float16 AdamW's ε underflows and B = 0 gives 0/0; in bfloat16 a step of less than half an ulp is
lost. So factors and their gradients stay in float32 on a base in half precision, as in PEFT
(``autocast_adapter_dtype=True``), and are cast to the base's dtype where they meet its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_half(dtype: torch.dtype) -> bool:
    """Whether floating-point numbers of this dtype have less than 32 bits."""
    return dtype.is_floating_point and dtype.itemsize < 4


def factor_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of factors on this weight."""
    return torch.float32 if is_half(weight.dtype) else weight.dtype


def kept_wide(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`convert` as `nn.Module._apply` takes it, where half precision becomes float32."""

    def wide(tensor: Tensor) -> Tensor:
        out = convert(tensor)
        if out.dtype == tensor.dtype or not is_half(out.dtype):
            return out
        return tensor.to(device=out.device, dtype=torch.float32)

    return wide


def is_quantised(tensor: Any) -> bool:
    """Whether it holds integers and scales, and passes for a floating-point one: torchao's."""
    if torch.compiler.is_compiling():  # Dynamo does not look a class's module up
        return False
    return type(tensor).__module__.startswith("torchao.")


def floating(tensor: Tensor) -> Tensor:
    """The numbers that a tensor stands for, in a plain one."""
    return tensor.dequantize() if is_quantised(tensor) else tensor
