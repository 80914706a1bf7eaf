"""Computing a layer's input again in the backward pass, from what the graph keeps anyway.

The gradient of A needs the input x of its layer. The frozen model does not: where W does not
train, torch keeps no x. But it keeps what made x (a LayerNorm's input, a GELU's, …) for their own
backward passes, and from there x is an elementwise step away, equal to rounding.

`recipe_for` walks up from ``x.grad_fn``, over reshapes, transposes and products with what is kept
(dropout's mask), until it finds such a tensor. Where the chain ends otherwise, or where somebody's
hooks pack saved tensors (activation checkpointing, offloading), there is none and x is to be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_DEEPEST = 6  # nodes up: reshape, clone, transpose, dropout and what made it are five


@dataclass(frozen=True)
class Recipe:
    """How to make a tensor again.

    Attributes:
        kept: What the graph holds in any case.
        build: The tensor, from these.
        by_rows: Whether some of its rows (x seen as a matrix) can be made of the same rows of the
            kept tensors that have as many, and the others as they are.
    """

    kept: tuple[Tensor, ...]
    build: Callable[[Sequence[Tensor]], Tensor]
    by_rows: bool = True


def recipe_for(x: Tensor) -> Recipe | None:
    """How to make x again without keeping it; ``None``: it must be kept."""
    # Saved tensors under hooks may lie elsewhere: to read them here would bring them back.
    if x.grad_fn is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    try:
        return _recipe(x.grad_fn, 0, 0)
    except AttributeError:  # another version of torch, whose nodes keep something else
        return None


def _recipe(node: Any, output: int, depth: int) -> Recipe | None:
    rule = _RULES.get(node.name().removesuffix("0"))
    if rule is None or output != 0 or depth == _DEEPEST:
        return None
    found: Recipe | None = rule(node, depth)
    return found


def _above(node: Any, depth: int, side: int = 0) -> Recipe | None:
    above, output = node.next_functions[side]
    return None if above is None else _recipe(above, output, depth + 1)


# ---- what made it ------------------------------------------------------------------------------


def _result(node: Any, depth: int, name: str = "_saved_result") -> Recipe:
    """The graph keeps the tensor itself."""
    return Recipe((getattr(node, name).detach(),), _first, by_rows=False)


def _of_input(function: Callable[..., Tensor], *settings: str) -> Callable[[Any, int], Recipe]:
    """A function of one kept input; `settings` are the node's names of its other arguments."""

    def rule(node: Any, depth: int) -> Recipe:
        rest = [_signed(getattr(node, f"_saved_{s}")) for s in settings]
        rows = function is not F.glu or node._saved_dim in (2**64 - 1, node._saved_self.dim() - 1)
        return Recipe((node._saved_self.detach(),), lambda kept: function(kept[0], *rest), rows)

    return rule


def _gelu(node: Any, depth: int) -> Recipe:
    make = partial(F.gelu, approximate=node._saved_approximate)
    return Recipe((node._saved_self.detach(),), lambda kept: make(kept[0]))


def _layer_norm(node: Any, depth: int) -> Recipe | None:
    affine = [t for t in (node._saved_weight, node._saved_bias) if t is not None]
    if len(affine) == 1:
        return None
    statistics = (node._saved_input, node._saved_result1, node._saved_result2)
    return Recipe(tuple(t.detach() for t in (*statistics, *affine)), _normalised)


def _normalised(kept: Sequence[Tensor]) -> Tensor:
    x, mean, rstd, *affine = kept
    out = torch.sub(x, mean).mul_(rstd)
    return torch.addcmul(affine[1], out, affine[0], out=out) if affine else out


# ---- steps from there to x -----------------------------------------------------------------------


def _product(node: Any, depth: int) -> Recipe | None:
    """Both sides are kept, or one is and the other can be made: dropout, gates, RMSNorm."""
    sides = [node._saved_self, node._saved_other]
    recipes = [
        _above(node, depth, i) if side is None else Recipe((side.detach(),), _first)
        for i, side in enumerate(sides)
    ]
    left, right = recipes
    if left is None or right is None:
        return None
    count = len(left.kept)
    return Recipe(
        left.kept + right.kept,
        lambda kept: left.build(kept[:count]) * right.build(kept[count:]),
        left.by_rows and right.by_rows,
    )


def _first(kept: Sequence[Tensor]) -> Tensor:
    return kept[0]


def _native_dropout(node: Any, depth: int) -> Recipe | None:
    inner, mask = _above(node, depth), node._saved_result1
    if inner is None or mask is None:
        return None
    scale = 1 / (1 - node._saved_p)
    return Recipe(
        (*inner.kept, mask),
        lambda kept: inner.build(kept[:-1]) * kept[-1] * scale,
        inner.by_rows,
    )


def _reshaped(node: Any, depth: int) -> Recipe | None:
    shape = tuple(node._input_metadata[0].shape)  # of the node's output, in torch's words
    return _then(_above(node, depth), lambda x: x.reshape(shape))


def _transposed(node: Any, depth: int) -> Recipe | None:
    a, b = (int(_signed(d)) for d in (node._saved_dim0, node._saved_dim1))
    return _then(_above(node, depth), lambda x: x.transpose(a, b))


def _permuted(node: Any, depth: int) -> Recipe | None:
    dims = [int(_signed(d)) for d in node._saved_dims]
    return _then(_above(node, depth), lambda x: x.permute(dims))


def _copied(node: Any, depth: int) -> Recipe | None:
    return _above(node, depth)


def _then(inner: Recipe | None, step: Callable[[Tensor], Tensor]) -> Recipe | None:
    return inner and Recipe(inner.kept, lambda kept: step(inner.build(kept)), by_rows=False)


def _signed(number: int | float) -> int | float:
    """Nodes give negative dimensions as unsigned numbers."""
    return int(number) - 2**64 if number >= 2**63 else number


_RULES: dict[str, Callable[[Any, int], Recipe | None]] = {
    "ReluBackward": _result,
    "SigmoidBackward": _result,
    "TanhBackward": _result,
    "ScaledDotProductFlashAttentionForCpuBackward": partial(_result, name="_saved_output"),
    "ScaledDotProductFlashAttentionBackward": partial(_result, name="_saved_output"),
    "ScaledDotProductEfficientAttentionBackward": partial(_result, name="_saved_output"),
    "GeluBackward": _gelu,
    "SiluBackward": _of_input(F.silu),
    "HardswishBackward": _of_input(F.hardswish),
    "HardtanhBackward": _of_input(F.hardtanh, "min_val", "max_val"),
    "GluBackward": _of_input(F.glu, "dim"),
    "NativeLayerNormBackward": _layer_norm,
    "MulBackward": _product,
    "NativeDropoutBackward": _native_dropout,
    "ViewBackward": _reshaped,
    "UnsafeViewBackward": _reshaped,
    "TransposeBackward": _transposed,
    "PermuteBackward": _permuted,
    "CloneBackward": _copied,
}
