"""Recomputing a layer's input in the backward pass, from what the graph keeps anyway.

The gradient of A needs the input x of its layer. The frozen model does not: where W is frozen,
torch keeps no x. But it keeps the inputs of the operations that computed x (a LayerNorm's, a
GELU's, …) for their backward passes, and from these x follows by an elementwise step, equal to
rounding.

`recipe_for` walks up from ``x.grad_fn``, over reshapes, transposes and products with kept tensors
(dropout's mask), until it finds such a tensor. Where the chain ends otherwise, where hooks pack
saved tensors (activation checkpointing, offloading), or where x was modified in place, x is saved.

Writes that the graph does not record are not seen here either: a tensor further up that is
overwritten under ``no_grad``, and only then multiplied or reshaped into x, is recomputed with its
old value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_DEEPEST = 6  # nodes: reshape, clone, transpose, dropout and the operation itself are five


# From kept tensors to x. The dtype is one in which x will be cast anyway: it may be built in it.
Build = Callable[..., Tensor]


class Recipe(NamedTuple):
    """How to recompute a tensor."""

    kept: tuple[Tensor, ...]  # tensors that the graph keeps in any case
    build: Build  # computes the tensor from these, under ``no_grad``; holds no reference to them
    # Whether it is elementwise or along the last dimension alone, so that some of its rows can be
    # computed from the same rows of the kept tensors
    by_rows: bool = True


def recipe_for(x: Tensor) -> Recipe | None:
    """How to recompute x; ``None``: it must be kept."""
    node = x.grad_fn
    # One modified in place, perhaps under no_grad, is not recorded by the graph. Saved tensors
    # under hooks may be stored elsewhere: reading them here would fetch them.
    if node is None or x._version or torch._C._autograd._top_saved_tensors_default_hooks(True):
        return None
    try:
        return _recipe(node, 0, 0)
    except (AttributeError, RuntimeError):
        # Another version of torch, whose nodes keep something else; or a saved tensor was freed
        return None  # or overwritten, which autograd reports where it is needed


def _recipe(node: Any, output: int, depth: int) -> Recipe | None:
    rule = _RULES.get(node.name())
    if rule is None or output != 0 or depth == _DEEPEST:
        return None
    found: Recipe | None = rule(node, depth)
    return found


def _above(node: Any, depth: int, side: int = 0) -> Recipe | None:
    above, output = node.next_functions[side]
    return None if above is None else _recipe(above, output, depth + 1)


def _unpacked(saved: Any) -> None:
    """Check by one saved tensor of a node that hooks packed none of them.

    Raises:
        RuntimeError: reading them would compute or fetch them.
    """
    if getattr(saved, "unpack_hook", None) is not None:
        raise RuntimeError("saved under hooks")


# ---- operations ---------------------------------------------------------------------------------


def _result(node: Any, depth: int) -> Recipe:
    """The graph keeps the tensor itself."""
    _unpacked(node._raw_saved_result)
    return Recipe((node._saved_result,), _first, False)


def _attention(node: Any, depth: int) -> Recipe:
    _unpacked(node._raw_saved_output)
    return Recipe((node._saved_output,), _first, False)


def _of_input(function: Callable[..., Tensor], *settings: str) -> Callable[[Any, int], Recipe]:
    """A function of one kept input; `settings` are the node's names of its other arguments."""

    def rule(node: Any, depth: int) -> Recipe:
        _unpacked(node._raw_saved_self)
        rest = [getattr(node, f"_saved_{s}") for s in settings]
        return Recipe((node._saved_self,), lambda kept, dtype=None: function(kept[0], *rest))

    return rule


def _glu(node: Any, depth: int) -> Recipe:
    _unpacked(node._raw_saved_self)
    kept, dim = node._saved_self, _signed(node._saved_dim)
    last = dim in (-1, kept.dim() - 1)
    return Recipe((kept,), lambda kept, dtype=None: F.glu(kept[0], -1 if last else dim), last)


def _gelu(node: Any, depth: int) -> Recipe:
    _unpacked(node._raw_saved_self)
    plain = node._saved_approximate == "none"
    return Recipe((node._saved_self,), _gelu_again if plain else _gelu_by_tanh_again)


def _gelu_again(kept: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    return F.gelu(kept[0])


def _gelu_by_tanh_again(kept: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    return F.gelu(kept[0], approximate="tanh")


def _layer_norm(node: Any, depth: int) -> Recipe | None:
    _unpacked(node._raw_saved_input)
    weight, bias = node._saved_weight, node._saved_bias
    statistics = node._saved_input, node._saved_result1, node._saved_result2
    if weight is None and bias is None:
        return Recipe(statistics, _normalised)
    if weight is None or bias is None:
        return None
    return Recipe((*statistics, weight, bias), _normalised)


def _normalised(kept: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """A layer norm again; torch's own would need its ε, which the graph does not keep."""
    x, mean, rstd, *affine = kept
    dtype = dtype or x.dtype  # the statistics are wider where x is in half precision
    if not affine:
        return torch.sub(x, mean).mul_(rstd).to(dtype)
    weight, bias = affine
    if x.is_cuda:  # in two passes; on a CPU, where rows stay in the cache, three are faster
        out, sign = torch.addcmul(mean * rstd, x, rstd, value=-1), -1
    else:
        out, sign = torch.sub(x, mean).mul_(rstd), 1
    room = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    return torch.addcmul(bias, out, weight, value=sign, out=room)


# ---- steps from there to x -----------------------------------------------------------------------


def _product(node: Any, depth: int) -> Recipe | None:
    """Both sides are kept, or one is and the other can be recomputed: dropout, gates, RMSNorm."""
    _unpacked(node._raw_saved_self)
    _unpacked(node._raw_saved_other)
    sides = [node._saved_self, node._saved_other]
    left, right = [
        _above(node, depth, i) if side is None else Recipe((side,), _first)
        for i, side in enumerate(sides)
    ]
    if left is None or right is None:
        return None
    count, one, other = len(left.kept), left.build, right.build
    return Recipe(
        left.kept + right.kept,
        lambda kept, dtype=None: one(kept[:count]) * other(kept[count:]),
        left.by_rows and right.by_rows,
    )


def _first(kept: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    return kept[0]


def _native_dropout(node: Any, depth: int) -> Recipe | None:
    inner, p = _above(node, depth), node._saved_p
    if inner is None or p == 1:
        return None
    _unpacked(node._raw_saved_result1)
    build, scale = inner.build, 1 / (1 - p)  # eager torch calls it in training alone
    return Recipe(
        (*inner.kept, node._saved_result1),
        lambda kept, dtype=None: build(kept[:-1]) * kept[-1] * scale,
        inner.by_rows,
    )


def _reshaped(node: Any, depth: int) -> Recipe | None:
    shape = tuple(node._input_metadata[0].shape)  # of the node's output, despite its name
    return _then(_above(node, depth), lambda x: x.reshape(shape))


def _transposed(node: Any, depth: int) -> Recipe | None:
    a, b = _signed(node._saved_dim0), _signed(node._saved_dim1)
    return _then(_above(node, depth), lambda x: x.transpose(a, b))


def _permuted(node: Any, depth: int) -> Recipe | None:
    dims = [_signed(d) for d in node._saved_dims]
    return _then(_above(node, depth), lambda x: x.permute(dims))


def _copied(node: Any, depth: int) -> Recipe | None:
    return _above(node, depth)


def _then(inner: Recipe | None, step: Callable[[Tensor], Tensor]) -> Recipe | None:
    if inner is None:
        return None
    build = inner.build
    return Recipe(inner.kept, lambda kept, dtype=None: step(build(kept)), False)


def _signed(dim: int) -> int:
    """A dimension, which nodes save as an unsigned number."""
    return dim - 2**64 if dim >= 2**63 else dim


# By the names of torch's nodes; a custom function's ends in "Backward", without the zero.
_RULES: dict[str, Callable[[Any, int], Recipe | None]] = {
    "ReluBackward0": _result,
    "SigmoidBackward0": _result,
    "TanhBackward0": _result,
    "ScaledDotProductFlashAttentionForCpuBackward0": _attention,
    "ScaledDotProductFlashAttentionBackward0": _attention,
    "ScaledDotProductEfficientAttentionBackward0": _attention,
    "ScaledDotProductCudnnAttentionBackward0": _attention,
    "GeluBackward0": _gelu,
    "SiluBackward0": _of_input(F.silu),
    "HardswishBackward0": _of_input(F.hardswish),
    "HardtanhBackward0": _of_input(F.hardtanh, "min_val", "max_val"),
    "GluBackward0": _glu,
    "NativeLayerNormBackward0": _layer_norm,
    "MulBackward0": _product,
    "NativeDropoutBackward0": _native_dropout,
    "ViewBackward0": _reshaped,
    "UnsafeViewBackward0": _reshaped,
    "TransposeBackward0": _transposed,
    "PermuteBackward0": _permuted,
    "CloneBackward0": _copied,
}
