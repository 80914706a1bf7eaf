"""Running a model to look at it, and leaving no trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Attributes by which timm and torchaudio drop whole paths or layers at random.
_RATES = ("drop_prob", "layer_drop", "drop_path_rate", "drop_rate")


def run(model: nn.Module, batch: Any, seed: int = 0) -> list[Tensor]:
    """The floating-point outputs of one forward, random numbers drawn from `seed`.

    `batch` is a tensor, a tuple of arguments, or a mapping of keyword arguments.
    """
    args, kwargs = _as_call(batch)
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return list(_tensors(model(*args, **kwargs)))


def _as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
        elif output.is_complex():
            yield torch.view_as_real(output)
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for f in dataclasses.fields(output):
            yield from _tensors(getattr(output, f.name))


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put modes, buffers and gradients back at the end of the block."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, value in buffers:
            buffer.data.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def without_noise(model: nn.Module, training: bool) -> Iterator[None]:
    """Training (or eval) mode without dropout, stochastic depth or moving statistics."""
    model.train(training)
    rates = []
    for module in model.modules():
        if isinstance(module, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)):
            module.eval()
        for key in _RATES:
            rate = module.__dict__.get(key)
            if isinstance(rate, float):
                rates.append((module, key, rate))
                setattr(module, key, 0.0)
    try:
        yield
    finally:
        for module, key, rate in rates:
            setattr(module, key, rate)
