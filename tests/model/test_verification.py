"""`verify` where arithmetic is not that of a CPU in float32."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from lora_lightning import inject, verify
from tests.helpers.gpu import TF32, cudnn_rnn, high_precision_matmul  # noqa: F401 - fixtures
from tests.helpers.training import tiny_vit


@pytest.mark.usefixtures("high_precision_matmul")
@pytest.mark.parametrize("name", ["test_efficientnet", "tiny_vit"])
def test_verify_is_in_ieee_arithmetic_where_training_is_not(name):
    """With TF32 merged and unmerged outputs differ by 1e-3, of which no layer is the cause."""
    model = tiny_vit() if name == "tiny_vit" else timm.create_model(name)
    inject(model, rank=2)
    x = torch.randn(2, 3, 32, 32)
    with TF32():
        plain = model.eval()(x)
        assert verify(model, x)[0].merge_error < 2e-6
        assert torch.equal(model(x), plain)
    assert not torch.equal(model(x), plain)


def test_verify_compiles_nothing():
    """Neither for its modes nor for a batch of another size, nor does it undo what is compiled."""
    compiled = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    inject(model, rank=2, target_modules="all", trainable=[])
    model.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    model(torch.randn(8, 4))
    assert len(compiled) == 1
    verify(model, torch.randn(2, 4))
    model(torch.randn(8, 4))
    assert len(compiled) == 1


@pytest.mark.usefixtures("cudnn_rnn")
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_verify_needs_no_backward_pass_of_cudnns_in_eval(layer):
    model = layer(4, 3)
    inject(model, rank=2, target_modules="all", trainable=[])
    x = torch.randn(5, 2, 4)
    verify(model, x)
    with pytest.raises(RuntimeError, match="only be called in training"):
        model.eval()(x)[0].sum().backward()


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]
)
def test_verify_accepts_what_rounding_to_16_bits_explains(dtype, autocast):
    """Also where outputs are in float32."""

    class Float(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to(self[0].bias.dtype)).float()

    model = Float(*(nn.Linear(64, 64) for _ in range(6))).to(dtype)
    inject(model, rank=2, target_modules="all", trainable=[])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = verify(model, torch.randn(3, 64))[0]
    assert 1e-4 < found.merge_error < 2e-2
