"""Input activations of each weight of a model on target batches.

Inputs are taken where the arithmetic happens, below the modules: of each matrix product or
convolution whose operand *is* an adapted weight (a part of it, or a copy in autocast's precision),
the other operand. So a layer
counts however it is used: called, read by the model's own ``F.linear(x, layer.weight)``, packed
in an attention, or within a recurrent cell. A weight that is computed from others (weight norm,
weight standardisation) appears in no product; there the module's own input is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lightning.lora.adapted_module import raw_tensor
from lora_lightning.model.probing import without_cudnns_rnn

_weak: Any = StorageWeakRef  # which has no types
Sink = Callable[[str, Tensor], None]  # the weight's path, rows (N, in·kernel) of its input
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ROWS = 1024  # of a layer's input in one batch; more are drawn from at random

aten = torch.ops.aten
# operator → places of (input, weight) among its arguments; weights come transposed in these.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}
_UNTRANSPOSED = {aten.linear.default: (0, 1)}
_CONVOLUTION = aten.convolution.default
_CAST = aten._to_copy.default


class Inputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block, `sink` is given the inputs of each weight.

    Args:
        weights: Path → raw weight, a parameter.
        sink: What takes rows (N, in·kernel); the order of columns is that of the weight's matrix.
    """

    def __init__(self, weights: dict[str, Tensor], sink: Sink):
        super().__init__()  # type: ignore[no-untyped-call]
        self._paths: dict[int, list[tuple[str, Tensor]]] = {}
        self._casts: dict[int, tuple[Any, list[tuple[str, Tensor]]]] = {}
        for path, weight in weights.items():
            self._paths.setdefault(_storage(weight), []).append((path, weight))
        self._sink = sink
        self._generator = torch.Generator().manual_seed(0)  # of the choice among many rows
        self.times: dict[str, int] = {}  # path → how often it was seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, and record its operands."""
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS or func in _UNTRANSPOSED:
            x, w = _PRODUCTS.get(func) or _UNTRANSPOSED[func]
            self._product(args[x], args[w], -1 if func in _UNTRANSPOSED else -2)
        elif func is _CAST and (paths := self._of(args[0])):
            self._note(out, paths)
        elif func is _CONVOLUTION and not args[6]:  # not transposed
            for path, weight in self._of(args[1]):
                if weight.shape == args[1].shape:
                    patches = _patches(args[0], args[1].shape, args[3], args[4], args[5], args[8])
                    self.take(path, patches, len(weight.shape) - 2)
        return out

    def _product(self, x: Tensor, used: Tensor, side: int) -> None:
        columns = used.shape[side]
        for path, weight in self._of(used):
            # A part of the rows, such as the query's of a packed projection, has the same columns.
            # x W, not x Wᵀ, multiplies the other side, which a square weight shows by its strides.
            same = weight.ndim == 2 and weight.shape[1] == columns
            if same and used.stride(side) == weight.stride(1):
                self.take(path, x.reshape(-1, columns))

    def _of(self, tensor: Any) -> list[tuple[str, Tensor]]:
        if not isinstance(tensor, Tensor):
            return []
        key, start = _storage(tensor), tensor.storage_offset()
        copy, paths = self._casts.get(key, (None, []))
        if copy is not None and not copy.expired():
            return paths
        # A part of a weight counts; for cuDNN all weights of a recurrent layer share one storage.
        weights = self._paths.get(key, [])
        return [(p, w) for p, w in weights if 0 <= start - w.storage_offset() < w.numel()]

    def _note(self, copy: Tensor, paths: list[tuple[str, Tensor]]) -> None:
        """Know a weight's copy as the weight for as long as there is one, without keeping it."""
        self._casts = {k: cast for k, cast in self._casts.items() if not cast[0].expired()}
        self._casts[_storage(copy)] = _weak(copy.untyped_storage()), paths

    def take(self, path: str, rows: Tensor, kernel: int = 0) -> None:
        """Pass on at most `ROWS` rows (…, in), followed by that many kernel dimensions."""
        if not rows.numel():  # of a batch without items
            return
        self.times[path] = self.times.get(path, 0) + 1
        rows = rows.detach()
        leading = rows.shape[: rows.ndim - 1 - kernel]
        count = leading.numel()
        if count > ROWS:
            chosen = torch.randperm(count, generator=self._generator, device="cpu")[:ROWS]
            chosen = chosen.to(rows.device)
            rows = rows[torch.unravel_index(chosen, leading)]
            leading = rows.shape[:1]
        rows = rows.reshape(leading.numel(), -1)
        self._sink(path, rows if rows.dtype == torch.float64 else rows.float())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _patches(
    x: Tensor,
    weight: torch.Size,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The patches of a convolution: (B, positions…, groups, in/groups, kernel…) of (B, in, …).

    A view, in which windows overlap: flattening it would multiply the input by the kernel's size.
    """
    kernel, n = weight[2:], len(weight) - 2
    if x.ndim == n + 1:  # without a batch
        x = x[None]
    pad = [p for size in reversed(padding) for p in (size, size)]
    windows = nn.functional.pad(x, pad)
    for i in range(n):
        span = (kernel[i] - 1) * dilation[i] + 1
        windows = windows.unfold(2 + i, span, stride[i])[..., :: dilation[i]]
    # (B, g, in/g, positions…, kernel…)
    windows = torch.unflatten(windows, 1, (groups, -1))
    return windows.permute([0, *range(3, 3 + n), 1, 2, *range(3 + n, 3 + 2 * n)])


@contextmanager
def observed(modules: dict[str, tuple[nn.Module, str]], sink: Sink) -> Iterator[Inputs]:
    """Within the block forwards of a model give `sink` the inputs of these weights.

    Args:
        modules: Path → (module, name of its tensor).
        sink: See `Inputs`.

    Fused attention and recurrent kernels, whose products cannot be observed, are disabled within.
    """
    weights = {p: raw_tensor(m, t) for p, (m, t) in modules.items()}
    holders = [module for module, _ in modules.values()]
    mode = Inputs({p: w for p, w in weights.items() if isinstance(w, nn.Parameter)}, sink)
    handles = [
        module.register_forward_hook(_unless_seen(mode, path))
        for path, (module, _) in modules.items()
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS))
    ]
    try:
        with _unfused(), without_cudnns_rnn(holders), mode:
            yield mode
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unfused() -> Iterator[None]:
    mha: Any = torch.backends.mha
    mkldnn: Any = torch.backends.mkldnn
    before = mha.get_fastpath_enabled(), mkldnn.enabled
    mha.set_fastpath_enabled(False)
    mkldnn.enabled = False
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before[0])
        mkldnn.enabled = before[1]


def _unless_seen(mode: Inputs, path: str) -> Callable[[Any, tuple[Any, ...], Any], None]:
    """Use a module's own input where its weight was in no product since its last forward."""
    before = 0

    def take(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal before
        if mode.times.get(path, 0) == before and inputs:
            x = inputs[0].detach()
            if isinstance(module, nn.Linear):
                mode.take(path, x)
            else:
                mode.take(path, _of_convolution(module, x), len(module.kernel_size))
        before = mode.times.get(path, 0)

    return take


def _of_convolution(module: Any, x: Tensor) -> Tensor:
    padding = list(module.padding) if not isinstance(module.padding, str) else []
    if not any(padding):  # "same", which classes with a forward of their own do themselves
        spans = zip(module.kernel_size, module.dilation, strict=True)
        padding = [(k - 1) * d // 2 for k, d in spans]
    shape = module.weight.shape
    return _patches(x, shape, module.stride, padding, module.dilation, module.groups)
