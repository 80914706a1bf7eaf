"""Every kind of layer: exact at the start, trainable, mergeable, removable."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_lightning import disabled, inject, merge, remove, unmerge, verify
from lora_lightning.errors import TargetError
from lora_lightning.lora import layers
from lora_lightning.lora.factors import Factors
from lora_lightning.model.probing import difference, run
from lora_lightning.model.state import named_factors
from tests.helpers.training import randomise
from tests.helpers.zoo import ZOO, targets

# Torch's own remark on one of its kernels.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
KINDS = sorted(ZOO)
OPTIONS = {
    "plain": {},
    "dora": {"dora": True},
    "freeze_a": {"freeze_a": True},
    "rank_stabilised": {"scaling": "alpha/sqrt(r)"},
}


def adapted(
    kind: str, onto: nn.Module | None = None, **options
) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    make, x = ZOO[kind]
    # Both frozen: torch picks the kernels of some layers by requires_grad.
    base = make().eval().requires_grad_(False)
    model = (onto or make()).eval().requires_grad_(False)
    model.load_state_dict(base.state_dict())
    inject(model, rank=2, target_modules=targets(kind), trainable=[], seed=0, **options)
    return base, model, x


@torch.no_grad()
def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return run(model, x)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_computes_its_weights_once_a_forward(monkeypatch, kind):
    layer = kind(3, 4, num_layers=2)
    inject(layer, rank=2, target_modules="all", trainable=[])
    read = []
    own = Factors.effective
    monkeypatch.setattr(Factors, "effective", lambda *given: read.append(given[0]) or own(*given))
    layer(torch.randn(5, 2, 3))
    assert len(read) == len(set(read)) == len(named_factors(layer, "default")) == 4
    layer(torch.randn(5, 2, 3))
    assert len(read) == 8


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_at_the_start_alive_and_mergeable(kind, options):
    base, model, x = adapted(kind, **options)
    assert equal(outputs(model, x), outputs(base, x))
    found = verify(model, x, tolerance=1e-5)[0]
    assert found.effect > 1e-4
    assert equal(outputs(model, x), outputs(base, x)), "verify left a trace"


@pytest.mark.parametrize("kind", KINDS)
def test_merge_unmerge_remove(kind):
    model = ZOO[kind][0]()
    classes = [type(m) for m in model.modules()]
    base, model, x = adapted(kind, onto=model)
    randomise(model)
    before, keys = outputs(model, x), list(base.state_dict())
    merge(model)
    merged = outputs(model, x)
    assert difference(merged, before) < 1e-5
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    merge(model)
    assert equal(outputs(model, x), merged), "merging twice changed something"
    with disabled(model):
        assert equal(outputs(model, x), outputs(base, x))
    unmerge(model)
    unmerge(model)
    assert equal(outputs(model, x), before)
    remove(model)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in model.state_dict().items())
    assert equal(outputs(model, x), outputs(base, x))


@pytest.mark.parametrize("kind", KINDS)
def test_base_keys_stay_and_the_source_loads_after_injection(kind):
    base, model, _ = adapted(kind)
    own = model.state_dict()
    assert [k for k in own if ".lora." not in k and not k.startswith("lora.")] == list(
        base.state_dict()
    )
    model.load_state_dict(base.state_dict(), strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_deep_copy_and_pickle(kind):
    _, model, x = adapted(kind)
    randomise(model)
    if "hook" not in kind:  # torch cannot copy the tensor that the old hook keeps
        assert equal(outputs(copy.deepcopy(model), x), outputs(model, x))
    if kind in ("weight norm", "weight norm conv"):
        return  # torch refuses to pickle any parametrised module
    reloaded = pickle.loads(pickle.dumps(model))
    assert equal(outputs(reloaded, x), outputs(model, x))
    assert [type(m) for m in reloaded.modules()] == [type(m) for m in model.modules()]
    merge(reloaded)
    unmerge(reloaded)
    assert equal(outputs(reloaded, x), outputs(model, x))


@pytest.mark.parametrize("kind", KINDS)
def test_effect_is_the_same_in_training_and_eval(kind):
    _, model, x = adapted(kind)
    randomise(model)
    evaluating = outputs(model, x)
    assert difference([o.detach() for o in run(model.train(), x)], evaluating) < 1e-6


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Conv2d grouped", "LSTM", "Linear subclass"])
def test_dropout_acts_in_training_only(kind):
    _, model, x = adapted(kind, dropout=0.5)
    randomise(model)
    evaluating = outputs(model, x)
    assert equal(outputs(model, x), evaluating)
    model.train()
    drawn = [run(model, x, seed=s)[0] for s in range(3)]
    assert any(not torch.equal(drawn[0], d) for d in drawn[1:])
    merge(model)
    assert difference(outputs(model, x), evaluating) < 1e-5, "merging must not drop anything"


def test_factorised_and_effective_paths_are_chosen():
    paths = {}
    for kind in KINDS:
        model = ZOO[kind][0]()
        report = inject(model, rank=1, target_modules=targets(kind), trainable=[])
        paths[kind] = {row.path for row in report.rows}
    factorised = {k for k, p in paths.items() if p == {"factorised"}}
    assert factorised == {
        "Linear", "Linear without bias", "Embedding", "Embedding padding", "Conv1d", "Conv2d",
        "Conv2d 1x1", "Conv2d dilated", "Conv2d string padding", "Conv2d reflect",
        "Conv2d circular", "Conv3d",
    }  # fmt: skip
    assert paths["MultiheadAttention"] == {"effective", "factorised"}  # out_proj is a Linear


@settings(max_examples=40, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    transposed=st.booleans(),
)
def test_any_convolution(channels, kernel, stride, padding, dilation, groups, mode, transposed):
    """By both paths the output is that of a plain layer with weight W + ΔW."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    options = {} if transposed else {"padding_mode": mode}
    layer = kind(
        channels[0] * groups, channels[1] * groups, kernel, stride, padding,
        dilation=dilation, groups=groups, **options,
    )  # fmt: skip
    plain = copy.deepcopy(layer)
    inject(layer, rank=1, target_modules="all", trainable=[], seed=0)
    randomise(layer)
    factors = named_factors(layer, "default")["weight"]
    x = torch.randn(2, channels[0] * groups, 8, 8)
    with torch.no_grad():
        plain.weight += factors.delta(plain.weight.shape)
        assert difference([layer(x)], [plain(x)]) < 1e-5


def test_an_embedding_that_rewrites_its_weight_is_refused():
    model = nn.Sequential(nn.Embedding(7, 6, max_norm=0.5))
    with pytest.raises(TargetError, match="max_norm rewrites the weight"):
        inject(model, rank=1, target_modules="all", trainable=[])


LOOKS = {
    "plain": {},
    "padding": {"padding_idx": 1},
    "by frequency": {"scale_grad_by_freq": True},
    "both": {"padding_idx": 1, "scale_grad_by_freq": True},
    "sparse": {"sparse": True},
}


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}], ids=str)
@pytest.mark.parametrize("looks", LOOKS)
def test_factors_of_an_embedding_get_the_gradient_of_its_effective_weight(looks, options):
    layer, index = (
        nn.Embedding(6, 5, **LOOKS[looks]).double(),
        torch.tensor([[1, 1, 1, 2], [3, 1, 0, 4]]),
    )
    inject(layer, rank=2, target_modules="all", trainable=[], **options)
    randomise(layer)
    factors = named_factors(layer, "default")["weight"]
    out = layer(index)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    own = [p.grad for p in factors.parameters()]
    weight = factors.effective(layer._parameters["weight"])
    table = weight.detach().requires_grad_()
    dense = {**LOOKS[looks], "sparse": False}
    wanted = nn.functional.embedding(index, table, **dense)
    assert torch.allclose(out, wanted, atol=1e-12)
    wanted.backward(upstream)
    for parameter in factors.parameters():
        parameter.grad = None
    weight.backward(table.grad)
    for got, parameter in zip(own, factors.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-9, atol=1e-12)
    verify(layer, index)


def test_delta_is_b_times_a_times_scaling():
    layer = nn.Linear(3, 2, bias=False)
    inject(layer, rank=1, alpha=4.0, target_modules="all", trainable=[])
    factors = named_factors(layer, "default")["weight"]
    with torch.no_grad():
        layer._parameters["weight"].zero_()
        factors.lora_A.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        factors.lora_B.copy_(torch.tensor([[1.0], [-1.0]]))
        # s = alpha / r = 4: rows are 4·(1, 2, 3) and its negative.
        expected = torch.tensor([[4.0, 8.0, 12.0], [-4.0, -8.0, -12.0]])
        assert torch.equal(layer.weight + 0, expected)
        assert torch.equal(layer(torch.eye(3)), expected.T)


def test_dora_keeps_row_norms_at_the_magnitude():
    layer = nn.Linear(6, 5)
    norms = layer.weight.detach().norm(dim=1)
    inject(layer, rank=2, target_modules="all", trainable=[], dora=True)
    randomise(layer, std=1.0)
    assert torch.allclose((layer.weight + 0).norm(dim=1), norms, rtol=1e-5)


class Scaled(nn.Module):
    """A layer of a user's own: its weight, times a number."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(5, 6)), 3.0

    def forward(self, x):
        return self.scale * nn.functional.linear(x, self.weight)


class ScaledMore(Scaled):
    pass


class Gated(nn.Module):
    """Another, of two weights."""

    def __init__(self):
        super().__init__()
        self.weight, self.gate = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        return (x @ self.weight.T) * (x @ self.gate.T).sigmoid()


def test_a_kind_of_layer_is_added_in_one_place(monkeypatch):
    monkeypatch.setattr(layers, "_KINDS", dict(layers._KINDS))

    @layers.layer_kind(Scaled)
    def forward(self, x):
        factors = self.factors("weight")
        out = nn.functional.linear(x, self._parameters["weight"])
        if factors is not None:
            out = out + factors.spec.scaling * (x @ factors.lora_A.T) @ factors.lora_B.T
        return self.scale * out

    layers.add_layer_kind(Gated, tensors=lambda layer: ("weight", "gate"))
    for make, tensors, path in (
        (Scaled, {"weight"}, "factorised"),
        (ScaledMore, {"weight"}, "factorised"),
        (Gated, {"weight", "gate"}, "effective"),
    ):
        model, x = nn.Sequential(make()), torch.randn(2, 6)
        report = inject(model, rank=2, target_modules="all", trainable=[])
        assert {row.tensor for row in report.rows} == tensors
        assert {row.path for row in report.rows} == {path}
        verify(model, x)
        remove(model)
        assert type(model[0]) is make
