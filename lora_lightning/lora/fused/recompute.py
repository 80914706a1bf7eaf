"""Recomputing a layer's input in the backward pass, from what the graph keeps anyway.

The gradient of A needs the input x of its layer. The frozen model does not: where W is frozen,
torch keeps no x. But it keeps the inputs of the operations that computed x (a LayerNorm's, a
GELU's, …) for their backward passes, and from these x follows by an elementwise step, equal to
rounding.

`recipe_for` walks up from ``x.grad_fn``, over reshapes, transposes and products with kept tensors
(dropout's mask), until it finds such a tensor. Where the chain ends otherwise, where hooks pack
saved tensors (activation checkpointing, offloading), or where x was modified in place, there is
none and x has to be saved.

Writes that the graph does not record are not seen here either: a tensor further up that is
overwritten under ``no_grad``, and only then multiplied or reshaped into x, is recomputed with its
old value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_DEEPEST = 6  # nodes: reshape, clone, transpose, dropout and the operation itself are five


@dataclass(frozen=True)
class Recipe:
    """How to recompute a tensor.

    Attributes:
        kept: Tensors that the graph keeps in any case.
        build: Computes the tensor from these; holds no reference to them.
        by_rows: Whether it is elementwise or along the last dimension alone, so that some of its
            rows can be computed from the same rows of the kept tensors.
    """

    kept: tuple[Tensor, ...]
    build: Callable[[Sequence[Tensor]], Tensor]
    by_rows: bool = True


def recipe_for(x: Tensor) -> Recipe | None:
    """How to recompute x; ``None``: it must be kept."""
    # Saved tensors under hooks may be stored elsewhere: reading them here would fetch them.
    if x.grad_fn is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    if x._version:  # modified in place, perhaps under no_grad, which the graph does not record
        return None
    try:
        return _recipe(x.grad_fn, 0, 0)
    except (AttributeError, RuntimeError):
        # Another version of torch, whose nodes keep something else; or a saved tensor was freed or
        # overwritten, which autograd reports where it is needed.
        return None


def _recipe(node: Any, output: int, depth: int) -> Recipe | None:
    rule = _RULES.get(node.name())
    if rule is None or output != 0 or depth == _DEEPEST:
        return None
    found: Recipe | None = rule(node, depth)
    return found


def _above(node: Any, depth: int, side: int = 0) -> Recipe | None:
    above, output = node.next_functions[side]
    return None if above is None else _recipe(above, output, depth + 1)


def _saved(node: Any, name: str) -> Any:
    """The tensor that the node saved under this name.

    Raises:
        RuntimeError: hooks packed it, so that reading it would compute or fetch it.
    """
    if getattr(getattr(node, f"_raw_saved_{name}"), "unpack_hook", None) is not None:
        raise RuntimeError("saved under hooks")
    kept = getattr(node, f"_saved_{name}")
    return None if kept is None else kept.detach()


# ---- operations ---------------------------------------------------------------------------------


def _result(node: Any, depth: int, name: str = "result") -> Recipe:
    """The graph keeps the tensor itself."""
    return Recipe((_saved(node, name),), _first, by_rows=False)


def _of_input(function: Callable[..., Tensor], *settings: str) -> Callable[[Any, int], Recipe]:
    """A function of one kept input; `settings` are the node's names of its other arguments."""

    def rule(node: Any, depth: int) -> Recipe:
        rest = [getattr(node, f"_saved_{s}") for s in settings]
        return Recipe((_saved(node, "self"),), lambda kept: function(kept[0], *rest))

    return rule


def _glu(node: Any, depth: int) -> Recipe:
    kept, dim = _saved(node, "self"), _signed(node._saved_dim)
    last = dim in (-1, kept.dim() - 1)
    return Recipe((kept,), lambda kept: F.glu(kept[0], -1 if last else dim), by_rows=last)


def _gelu(node: Any, depth: int) -> Recipe:
    make = partial(F.gelu, approximate=node._saved_approximate)
    return Recipe((_saved(node, "self"),), lambda kept: make(kept[0]))


def _layer_norm(node: Any, depth: int) -> Recipe | None:
    affine = [t for t in (_saved(node, "weight"), _saved(node, "bias")) if t is not None]
    if len(affine) == 1:
        return None
    statistics = [_saved(node, name) for name in ("input", "result1", "result2")]
    return Recipe((*statistics, *affine), _normalised)


def _normalised(kept: Sequence[Tensor]) -> Tensor:
    x, mean, rstd, *affine = kept
    out = torch.sub(x, mean).mul_(rstd)
    out = torch.addcmul(affine[1], out, affine[0], out=out) if affine else out
    return out.to(x.dtype)  # the statistics are wider where x is in half precision


# ---- steps from there to x -----------------------------------------------------------------------


def _product(node: Any, depth: int) -> Recipe | None:
    """Both sides are kept, or one is and the other can be recomputed: dropout, gates, RMSNorm."""
    sides = [_saved(node, "self"), _saved(node, "other")]
    left, right = [
        _above(node, depth, i) if side is None else Recipe((side,), _first)
        for i, side in enumerate(sides)
    ]
    if left is None or right is None:
        return None
    count, one, other = len(left.kept), left.build, right.build
    return Recipe(
        left.kept + right.kept,
        lambda kept: one(kept[:count]) * other(kept[count:]),
        left.by_rows and right.by_rows,
    )


def _first(kept: Sequence[Tensor]) -> Tensor:
    return kept[0]


def _native_dropout(node: Any, depth: int) -> Recipe | None:
    inner, mask, p = _above(node, depth), _saved(node, "result1"), node._saved_p
    if inner is None or mask is None or p == 1:
        return None
    build, scale = inner.build, 1 / (1 - p)  # eager torch calls it in training alone
    return Recipe(
        (*inner.kept, mask), lambda kept: build(kept[:-1]) * kept[-1] * scale, inner.by_rows
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
    return Recipe(inner.kept, lambda kept: step(build(kept)), by_rows=False)


def _signed(dim: int) -> int:
    """A dimension, which nodes save as an unsigned number."""
    return dim - 2**64 if dim >= 2**63 else dim


# By the names of torch's nodes; a custom function's ends in "Backward", without the zero.
_RULES: dict[str, Callable[[Any, int], Recipe | None]] = {
    "ReluBackward0": _result,
    "SigmoidBackward0": _result,
    "TanhBackward0": _result,
    "ScaledDotProductFlashAttentionForCpuBackward0": partial(_result, name="output"),
    "ScaledDotProductFlashAttentionBackward0": partial(_result, name="output"),
    "ScaledDotProductEfficientAttentionBackward0": partial(_result, name="output"),
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
