"""W + s·BA cannot be assigned as W; tools that read weights work or say what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune
from torchvision.models.feature_extraction import create_feature_extractor

from lora_lightning import disabled, inject, merge, remove, unmerge
from lora_lightning.errors import AdapterError, WeightWriteError
from lora_lightning.model.probing import difference
from tests.helpers.networks import quantise
from tests.helpers.training import randomise

REFUSALS = (WeightWriteError, AdapterError, AssertionError)  # the last is torch's, with our words


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).eval()


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()


def normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)))


def vit() -> nn.Module:
    return timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=2).eval()


def adapted(model: nn.Module, targets: str = "all") -> nn.Module:
    inject(model, rank=1, target_modules=targets, trainable=[])
    randomise(model)
    return model


def assigned(change: Callable) -> Callable:
    return lambda m: setattr(m[0], "weight", nn.Parameter(change(m[0].weight)))


@torch.no_grad()
def _fused_by_hand(layer, norm):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    layer.weight.data = layer.weight.data * scale[:, None]


X = torch.ones(2, 6)
CALLS = {
    "clone": (linear, assigned(lambda w: w.detach().clone())),
    "transformed": (linear, assigned(lambda w: torch.cat([w[:2], w[2:]]) * 2)),
    "by numpy": (linear, assigned(lambda w: torch.from_numpy(w.detach().numpy().copy()))),
    "quantised": (linear, lambda m: quantise(m[0])),
    "itself": (linear, assigned(lambda w: w)),
    "under another name": (linear, lambda m: m[0].register_parameter("old", m[0].weight)),
    "none": (linear, lambda m: setattr(m[0], "weight", None)),
    "parametrised": (normed, lambda m: setattr(m[0], "weight", 2 * m[0].weight.detach())),
    "fuse_conv_bn_eval": (conv, lambda m: nn.utils.fuse_conv_bn_eval(*m)),
    "fuse_linear_bn_eval": (linear, lambda m: nn.utils.fuse_linear_bn_eval(*m)),
    "fuse_modules": (conv, lambda m: torch.ao.quantization.fuse_modules(m, [["0", "1"]])),
    "spectral_norm": (linear, lambda m: parametrizations.spectral_norm(m[0])),
    "orthogonal": (linear, lambda m: parametrizations.orthogonal(m[0])),
    "weight_norm": (linear, lambda m: parametrizations.weight_norm(m[0])),
    "spectral_norm's hook": (linear, lambda m: nn.utils.spectral_norm(m[0])),
    "prune": (linear, lambda m: prune.l1_unstructured(m[0], "weight", 0.5)),
    "symbolic_trace": (linear, torch.fx.symbolic_trace),
    "create_feature_extractor": (linear, lambda m: create_feature_extractor(m, ["0"])),
    "prepare_fx": (linear, lambda m: prepare_fx(m, get_default_qconfig_mapping(), (X,))),
    "fuse by hand": (linear, lambda m: _fused_by_hand(*m)),
    "symbolic_trace of a read": (lambda: vit().blocks[0].attn, torch.fx.symbolic_trace),
    "patch_size": (vit, lambda m: m.set_input_size(patch_size=4), "patch_embed.proj"),
    "img_size": (vit, lambda m: m.set_input_size(img_size=64), "pos_embed"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("what", sorted(CALLS))
def test_whoever_reads_a_weight_and_writes_it_back_is_told_to_merge(what):
    """BA would count twice, or be lost: refused, the model is as it was."""
    make, call, *targets = CALLS[what]
    model = adapted(make(), *targets)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(REFUSALS, match=r"merge\(model\)"):
        call(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("what", ["fuse_conv_bn_eval", "fuse_linear_bn_eval", "symbolic_trace"])
def test_after_merging_they_work(what):
    make, call, *_ = CALLS[what]
    model, x = adapted(make()), torch.randn(2, 3, 6, 6) if make is conv else torch.randn(3, 6)
    expected = model(x)
    merge(model)
    assert difference([call(model)(x)], [expected]) < 1e-6


def test_a_merged_layer_is_quantised_like_any_other():
    """As torchao's `quantize_`, with which this was compared on 2026-11-28 (0.18)."""
    model, x = adapted(linear()), torch.randn(3, 6)
    expected = model(x)
    merge(model)
    plain = linear()
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        quantise(each[0])
    assert torch.equal(model(x), plain(x))
    assert difference([model(x)], [expected]) < 0.02
    with pytest.raises(AdapterError, match="changed since merge"):
        unmerge(model)
    unmerge(model, discard_changes=True)
    assert torch.equal(model(x), expected)


def test_ways_to_replace_the_raw_weight():
    model, x = adapted(linear()), torch.randn(3, 6)
    layer, expected = model[0], model(x)
    layer.weight = layer._parameters["weight"]  # as re-tying does
    assert torch.equal(model(x), expected)
    with disabled(model):
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert torch.equal(model(x), expected)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert torch.equal(model(x), expected)
    assert model.get_parameter("0.weight") is dict(model.named_parameters())["0.weight"]
    graph = make_fx(model)(x)
    assert difference([graph(x)], [expected]) < 1e-6


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.LSTM(6, 5), nn.Embedding(6, 5)])
def test_a_forward_kept_by_its_owner_works_after_merging(layer):
    """As accelerate does: it replaces the instance's forward and calls the old one."""
    x = torch.arange(4) if isinstance(layer, nn.Embedding) else torch.randn(3, 6)
    model, first = nn.ModuleList([layer]), lambda: layer(x)[0]
    source = first()
    adapted(model)
    old, expected = layer.forward, first()
    layer.forward = lambda *args: old(*args)
    for change in (merge, unmerge):
        change(model)
        assert difference([first()], [expected]) < 1e-6
    remove(model)
    assert torch.equal(first(), source)
