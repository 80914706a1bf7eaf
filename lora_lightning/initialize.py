"""Starting values of the factors. One function a method, listed in `INITIALIZERS`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Initializer = Callable[[Tensor, Tensor, torch.Generator], None]


@torch.no_grad()
def zero(lora_A: Tensor, lora_B: Tensor, generator: torch.Generator) -> None:
    r"""B = 0 and A uniform in :math:`\pm 1/\sqrt{in}`: training starts from the base, exactly.

    The bound is that of `torch.nn.Linear` (Kaiming uniform with a = sqrt 5), as in Hu et al.
    2021. Drawn on the CPU, so that every device starts from the same factors.

    Shapes: lora_A (r, in), lora_B (out, r).
    """
    lora_B.zero_()
    if lora_A.is_meta:
        return
    bound = 1 / math.sqrt(lora_A.shape[1])
    if lora_A.device.type == "cpu" and lora_A.dtype == torch.float32:
        lora_A.uniform_(-bound, bound, generator=generator)
        return
    drawn = torch.empty(lora_A.shape, dtype=torch.float32)
    lora_A.copy_(drawn.uniform_(-bound, bound, generator=generator))


INITIALIZERS: dict[str, Initializer] = {"zero": zero}
