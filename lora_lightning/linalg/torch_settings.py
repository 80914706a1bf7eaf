"""Torch's process-wide settings and random numbers, restored exactly at the end of a block.

They belong to the process: no other thread may set them meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# A precision that is not set is inherited: an operator's from its backend, that from the generic
# one. cuDNN's own (``conv``, ``rnn``) are left out. They can be set in two ways, by
# ``fp32_precision`` and by ``allow_tf32``, and where these two disagree, reading the latter raises,
# as `torch.backends.cudnn.flags` does; so `ieee` does without cuDNN instead.
_PRECISIONS = (
    *(("generic", "all"), ("cuda", "all"), ("cuda", "matmul")),
    *(("mkldnn", operator) for operator in ("all", "matmul", "conv", "rnn")),
)
_REDUCED = {"tf32": 2.0**-10, "bf16": 2.0**-7}  # the rounding error of a factor


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Within the block torch's own kernels run in place of cuDNN's.

    `torch.backends.cudnn.flags` would read and set TF32's flags too, and so raises after a caller
    has set ``fp32_precision``.
    """
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@contextmanager
def ieee() -> Iterator[None]:
    """Within the block float32 products are computed in float32: no TF32, no bfloat16.

    Convolutions and recurrent layers run without cuDNN, whose backward pass of recurrent layers
    raises in eval mode; other settings change only where they allow less than float32.
    """
    changed = []
    try:
        with without_cudnn():
            # Parents first, so that what is still reduced then is an operator's own setting.
            for key in _PRECISIONS:
                if (before := torch._C._get_fp32_precision_getter(*key)) in _REDUCED:
                    torch._C._set_fp32_precision_setter(*key, "ieee")
                    changed.append((*key, before))
            yield
    finally:
        for setting in changed[::-1]:
            torch._C._set_fp32_precision_setter(*setting)


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Within the block random numbers are drawn aside, from `seed` if one is given.

    `torch.manual_seed` would seed all GPUs, and `torch.random.fork_rng` restore the named ones.
    """
    with torch.random.fork_rng(_gpus()):
        if seed is not None:
            set_seed(seed)
        yield


def set_seed(seed: int) -> None:
    """Seed the generators that `forked_rng` restores: the CPU's, and all GPUs' once any is used."""
    torch.default_generator.manual_seed(seed)
    for index in _gpus():
        torch.cuda.default_generators[index].manual_seed(seed)


def shuffled(count: int, seed: int = 0) -> Tensor:
    """(count,): a permutation that depends on the seed alone, whatever torch's default device."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")


def rng_states() -> list[Tensor]:
    """Where these generators stand: whoever draws moves one of them."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, _gpus())]


def _gpus() -> list[int]:
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return list(range(torch.cuda.device_count())) if used else []


def rounding(tensor: Tensor) -> float:
    """The relative rounding error of products with a floating-point tensor, as torch is set now."""
    kind, found = tensor.device.type, torch.finfo(tensor.dtype).eps
    if kind != "meta" and torch.is_autocast_enabled(kind):
        found = max(found, torch.finfo(torch.get_autocast_dtype(kind)).eps)
    if tensor.dtype == torch.float32:
        backend = "mkldnn" if kind == "cpu" else kind
        found = max([found, *(_REDUCED.get(p, 0.0) for p in _used_precisions(backend))])
    return found


def _used_precisions(backend: str) -> list[str]:
    operators = ["matmul"]
    if backend == "mkldnn" or torch.backends.cudnn.enabled:
        operators += ["conv", "rnn"]
    known = backend in ("cuda", "mkldnn")
    return [torch._C._get_fp32_precision_getter(backend, o) for o in operators if known]
