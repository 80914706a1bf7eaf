r"""The gradients of low-rank factors as one operator, which compiled graphs can contain.

.. math:: \nabla A = s\,(g B)^T x, \qquad \nabla B = s\,g^T (x A^T)

As four products x and g are read twice each, which is what they cost: with r columns beside O and I
there is little to compute. On a CUDA device `triton_kernels` reads the wider of the two once, and
the other once more from the cache.

Legend of shapes: N rows, I in, O out, r rank.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from lora_lightning.lora.precision import is_half

# Off until it has been measured on a device: so far only Triton's interpreter ran the kernel.
# `benchmarks/gpu.py --only compiled` has both, as "ours" and "ours, triton".
use_triton = False
_LARGEST_RANK = 64  # whose tiles fit into the memory of a multiprocessor


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether Triton is installed, for a device with room for the tiles: 99 KiB, since Ampere."""
    if find_spec("triton") is None or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def by_triton(x: Tensor, rank: int) -> bool:
    """Whether the kernel computes the gradients from this input."""
    wanted = use_triton and x.device.type == "cuda" and is_half(x.dtype) and rank <= _LARGEST_RANK
    return wanted and _has_triton(x.device)


def products(g: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """By torch's products; those in half precision are rounded to it, as autograd's are."""
    back_NxR, h_NxR = g @ B.to(g.dtype), x @ A.to(x.dtype).T
    return scaling * (back_NxR.T @ x).to(A.dtype), scaling * (g.T @ h_NxR).to(B.dtype)


def _traced(g: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The operator in a compiled graph: of operations that the compiler sees, and the kernels."""
    if not by_triton(x, len(A)):
        return products(g, x, A, B, scaling)
    from lora_lightning.lora.fused import triton_kernels

    return triton_kernels.thin_gradients(g, x, A, B, scaling, torch.library.wrap_triton)


@torch.library.custom_op("lora_lightning::thin_gradients", mutates_args=())
def thin_gradients(
    g: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """s·(g B)ᵀ x (r, I) and s·gᵀ (x Aᵀ) (O, r), of rows g (N, O) and x (N, I)."""
    if not by_triton(x, len(A)):
        return products(g, x, A, B, scaling)
    from lora_lightning.lora.fused import triton_kernels

    return triton_kernels.thin_gradients(g, x, A, B, scaling)


@thin_gradients.register_fake
def _(g: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(A), torch.empty_like(B)


# As `torch.library.triton_op` does, which would import Triton here.
@thin_gradients.register_torch_dispatch(FunctionalTensorMode)
def _(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    with mode:
        return _traced(*args, **kwargs)
