"""Behaviour of a GPU, emulated on a CPU: TF32, and cuDNN's recurrent layers in eval mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_MATMUL = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
_CONVOLUTION = {aten.convolution.default, aten.convolution_backward.default}


def _tf32(value: Any) -> Any:
    """To ten bits of mantissa, to nearest."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class TF32(TorchDispatchMode):
    """Within the block products are rounded as a GPU would under the settings of the moment."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        conv = func in _CONVOLUTION and torch.backends.cudnn.enabled
        used = torch.backends.cudnn.conv if conv else torch.backends.cuda.matmul
        if func in _MATMUL | _CONVOLUTION and used.fp32_precision == "tf32":
            args = [_tf32(x) for x in args]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cudnn_rnn(monkeypatch):
    """Recurrent layers that ran in eval mode have no backward pass, as with cuDNN."""

    def refuse(gradient: Tensor) -> None:
        raise RuntimeError("cudnn RNN backward can only be called in training mode")

    def of_cudnn(plain: Any) -> Any:
        def layer(*args: Any) -> Any:
            out = plain(*args)
            training = [a for a in args if isinstance(a, bool)][1]  # (bias), (training), …
            if torch.backends.cudnn.enabled and not training and out[0].requires_grad:
                out[0].register_hook(refuse)
            return out

        return layer

    for name in ("lstm", "gru"):
        monkeypatch.setattr(torch._VF, name, of_cudnn(getattr(torch._VF, name)))


@pytest.fixture
def ieee_convolutions():
    """By the newer of torch's two ways, after which reading the older one raises."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def high_precision_matmul():
    """TF32 in matrix products too, as Lightning advises."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")
