"""Adapters on whole models: exact, several at once, twice, combined; writes are kept."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lora_lightning import (
    AdapterBank,
    LoRACallback,
    adapters,
    combine,
    disabled,
    inject,
    load_adapter,
    merge,
    read_header,
    remove,
    save_adapter,
    set_active,
    unmerge,
    verify,
)
from lora_lightning.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterNotFoundError,
    ConfigError,
    TargetError,
    WeightWriteError,
)
from lora_lightning.lora.adapted_module import AdaptedModule, located, raw_tensor
from lora_lightning.lora.initialisation import METHODS
from lora_lightning.model.probing import difference
from lora_lightning.model.state import named_factors
from lora_lightning.training.checks import check_still_frozen
from tests.helpers.networks import Tied
from tests.helpers.training import randomise, tiny_vit

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def two_adapters() -> tuple[nn.Module, nn.Module, dict[str, torch.Tensor]]:
    """A model with adapters a and b (other layers, rules, ranks, heads), and each output."""
    base = tiny_vit()
    model = copy.deepcopy(base)
    options = {
        "a": {"rank": 2, "target_modules": ["attn.*", "pos_embed"]},
        "b": {"rank": 3, "scaling": "alpha/sqrt(r)", "trainable": ["head", "norms"]},
    }
    outputs = {}
    for seed, (name, kwargs) in enumerate(options.items()):
        inject(model, name=name, **kwargs)
        assert torch.equal(model(X), base(X)), "a new adapter starts from the source"
        with torch.no_grad():
            for factors in named_factors(model, name).values():
                factors.lora_B.normal_(std=0.1)
            model.head.weight.add_(0.1 * (seed + 1))
            model.norm.weight.add_(0.2 * seed)
        outputs[name] = model(X).detach()
    return base, model, outputs


def test_switching_brings_back_each_output_exactly():
    base, model, outputs = two_adapters()
    assert adapters(model) == ["a", "b"]
    for name in ("a", "b", "a"):
        set_active(model, name)
        assert torch.equal(model(X), outputs[name])
    set_active(model, None)
    assert torch.equal(model(X), base(X))
    with pytest.raises(AdapterNotFoundError, match=r"no adapter 'c'; there are \['a', 'b'\]"):
        set_active(model, "c")


def test_only_the_active_adapter_is_trainable():
    _, model, _ = two_adapters()
    set_active(model, "a")
    on = {n for n, p in model.named_parameters() if p.requires_grad}
    assert on
    assert all(".lora.a." in n or n.startswith(("lora.a.", "head.")) for n in on)


def test_disabled_is_the_source_and_back():
    base, model, outputs = two_adapters()
    with disabled(model) as same:
        assert same is model
        assert torch.equal(model(X), base(X))
        with disabled(model):
            assert torch.equal(model(X), base(X))
        assert torch.equal(model(X), base(X))
    assert torch.equal(model(X), outputs["b"])
    with pytest.raises(ZeroDivisionError), disabled(model):
        raise ZeroDivisionError
    assert torch.equal(model(X), outputs["b"])


def test_disabled_between_forward_and_backward():
    """A teacher's forward must not disturb the student's graph."""
    _, model, _ = two_adapters()
    loss = model(X).square().sum()
    expected = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    loss = model(X).square().sum()
    with disabled(model), torch.no_grad():
        model(X)
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, found, expected))


def test_delete_one_then_the_last():
    base, model, outputs = two_adapters()
    remove(model, "b")
    assert adapters(model) == ["a"]
    assert torch.equal(model(X), base(X))
    set_active(model, "a")
    assert torch.equal(model(X), outputs["a"])
    remove(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert vars(model).keys() == vars(base).keys()
    with pytest.raises(AdapterNotFoundError, match="has no adapter"):
        remove(model)
    with pytest.raises(AdapterNotFoundError):
        merge(model)


def test_remove_restores_requires_grad():
    model = tiny_vit()
    model.patch_embed.requires_grad_(False)
    inject(model, rank=1)
    assert not model.blocks[0].norm1.weight.requires_grad
    remove(model)
    off = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert off == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_injecting_twice():
    model = tiny_vit()
    report = inject(model, rank=2, seed=1)
    randomise(model)
    before = model(X)
    assert inject(model, rank=2, seed=1) is report
    assert torch.equal(model(X), before)
    with pytest.raises(AdapterExistsError, match="exists with another configuration"):
        inject(model, rank=3, seed=1)


# Attributes of modules (of an instance as well), devices of a file system, what fits no file name.
BAD_NAMES = ["", "a.b", "a b", "a/b", "a\n", "é", 3, "train", "pop", "training", "_modules",
             "T_destination", "con", "NUL", "lpt1", "x" * 151]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_cannot_be(name):
    model = nn.Sequential(nn.Linear(3, 3))
    inject(model, rank=1, target_modules="all", trainable=[])
    for call in (
        lambda: inject(model, rank=1, target_modules="all", name=name),
        lambda: combine(model, {"default": 1.0}, name),
        lambda: LoRACallback(name=name),
    ):
        with pytest.raises(ConfigError, match="cannot name an adapter"):
            call()


@pytest.mark.parametrize("name", ["conv", "lpt", "com10", "-x", "_", "0", "x" * 150])
def test_names_that_can_be(name, tmp_path):
    model = nn.Sequential(nn.Linear(3, 3))
    base = copy.deepcopy(model)
    inject(model, rank=1, target_modules="all", trainable=[], name=name)
    model.eval()
    path = save_adapter(model, tmp_path / f"{name}-epoch=99999-step=99999999.safetensors")
    assert load_adapter(base, path).name == name


def test_injecting_around_an_injected_module():
    model = tiny_vit()
    inject(model.blocks, rank=1, trainable=[])
    with pytest.raises(AdapterError, match="'blocks' inside this model has adapters"):
        inject(model, rank=1)


def test_the_same_seed_gives_the_same_factors():
    factors = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed + 100)
        model = tiny_vit()
        inject(model, rank=2, seed=seed)
        factors.append(named_factors(model, "default")["blocks.0.attn.qkv.weight"].lora_A)
    assert torch.equal(factors[0], factors[1])
    assert not torch.equal(factors[0], factors[2])
    torch.manual_seed(7)
    one, two = tiny_vit(), tiny_vit()
    torch.manual_seed(7)
    inject(one, rank=2)
    torch.manual_seed(7)
    inject(two, rank=2)
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(
        named_factors(one, "default")[name].lora_A, named_factors(two, "default")[name].lora_A
    )


@pytest.mark.parametrize("init", METHODS)
def test_torchs_default_device_has_no_say_in_a_start(init):
    """Random numbers and tables are made where they are used: on "meta" nothing would work."""
    y = torch.arange(2)
    given = {"data": [(X, y)], "loss": loss} if METHODS[init].needs != "nothing" else {}
    base, found = tiny_vit(), []
    for device in (None, "meta"):
        model = copy.deepcopy(base)
        torch.manual_seed(0)
        with torch.device(device) if device else nullcontext():
            inject(model, rank=2, init=init, **given)
        found.append([p for f in named_factors(model, "default").values() for p in f.matrices()])
    assert all(map(torch.equal, *found))


def test_torchs_default_device_has_no_say_afterwards(tmp_path):
    base, found = tiny_vit().eval(), []
    for device in (None, "meta"):
        model, fresh = copy.deepcopy(base), copy.deepcopy(base)
        with torch.device(device) if device else nullcontext():
            inject(model, rank=2, seed=0, target_modules="all", dropout=0.1, dora=True)
            loss(model, (X, torch.zeros(2, dtype=torch.int64, device="cpu"))).backward()
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()
            verify(model, X)
            path = save_adapter(model, tmp_path / f"{device}.safetensors")
            load_adapter(fresh, path)
            bank = AdapterBank(copy.deepcopy(base), [path])
            with torch.no_grad(), bank[[path.stem, None]]:
                mixed = bank.model(X)
            merge(model)
            unmerge(model)
        found.append([model(X), fresh(X), mixed])
    assert all(map(torch.equal, *found))


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_combination_is_the_weighted_sum_under_any_scaling():
    base, model, _ = two_adapters()
    weights = {"a": 0.5, "b": -0.25}
    expected = copy.deepcopy(base)
    with torch.no_grad():
        own = dict(expected.named_parameters())
        for name, w in weights.items():
            set_active(model, name)
            for path, f in named_factors(model, name).items():
                own[path] += w * f.delta(own[path].shape)
            for key in ("head.weight", "norm.weight"):
                own[key] += w * (dict(model.named_parameters())[key] - base.get_parameter(key))
    combine(model, weights, "mix")
    assert adapters(model) == ["a", "b", "mix"]
    assert difference([model(X)], [expected(X)]) < 1e-5
    verify(model, X)


def test_combination_refuses_what_is_not_linear():
    model = tiny_vit()
    inject(model, rank=1, name="a", dora=True)
    with pytest.raises(AdapterError, match="DoRA, whose weights are not linear"):
        combine(model, {"a": 1.0}, "b")
    with pytest.raises(AdapterNotFoundError, match=r"cannot combine \['z'\]"):
        combine(model, {"z": 1.0}, "b")


def test_merged_model_refuses_to_switch_and_keeps_edits():
    _, model, _ = two_adapters()
    merge(model)
    for act in (lambda: set_active(model, "a"), lambda: inject(model, rank=1, name="c")):
        with pytest.raises(AdapterError, match="the model is merged"):
            act()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.add_(1)
    with pytest.raises(AdapterError, match="changed since merge"):
        unmerge(model)
    unmerge(model, discard_changes=True)


def test_merge_then_convert_then_unmerge():
    _, model, outputs = two_adapters()
    merge(model)
    model.double()
    unmerge(model)
    assert difference([model(X.double())], [outputs["b"].double()]) < 1e-5


@torch.no_grad()
def test_merge_then_move_brings_the_raw_weights_along(monkeypatch):
    """They stayed on the device, where the model had been moved off it to make room."""
    _, model, outputs = two_adapters()
    raw = {id(raw_tensor(*located(model, path))) for path in named_factors(model, "b")}
    merge(model)
    assert pickle.dumps(model)
    copied = copy.deepcopy(model)
    moved, own = [], nn.ParameterList.to
    monkeypatch.setattr(
        nn.ParameterList, "to", lambda self, device: moved.extend(self) or own(self, device)
    )
    copied.cpu()
    assert len(moved) == len(raw)
    assert raw.isdisjoint(map(id, moved))
    moved.clear()
    model.cpu()
    assert raw == set(map(id, moved))
    for each in (model, copied):
        unmerge(each)
        assert torch.equal(each(X), outputs["b"])


def test_tied_weights_stay_tied():
    model, x = Tied(), torch.arange(9)
    before = model(x)
    inject(model, rank=2, target_modules="head", trainable=[])
    randomise(model)
    adapted, embedded = model(x), model.embed(x)
    merge(model)
    assert torch.equal(model.embed(x), embedded), "merging one layer changed the other"
    assert difference([model(x)], [adapted]) < 1e-6
    remove(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(x), before)


WRITES = {
    "copy_": lambda w: w.copy_(torch.ones_like(w)),
    "data.copy_": lambda w: w.data.copy_(torch.ones(w.shape)),
    "detach().zero_": lambda w: w.detach().zero_(),
    "item": lambda w: w.__setitem__(0, 1.0),
    "row": lambda w: w[0].fill_(1),
    "view": lambda w: w.view(-1).mul_(2),
    "chunk": lambda w: w.chunk(3)[1].zero_(),
    "kaiming": nn.init.kaiming_uniform_,
    "xavier": nn.init.xavier_uniform_,
    "trunc_normal": nn.init.trunc_normal_,
    "requires_grad_": lambda w: w.requires_grad_(False),
    "requires_grad =": lambda w: setattr(w, "requires_grad", False),
    "data =": lambda w: setattr(w, "data", torch.ones(w.shape)),
    "+=": lambda w: w.__iadd__(1),
    "foreach": lambda w: torch._foreach_zero_([w]),
    "out=": lambda w: torch.add(torch.ones(w.shape), 1, out=w),
}


@pytest.mark.parametrize("write", sorted(WRITES))
def test_a_write_through_weight_raises_with_the_way_to_do_it(write):
    model = tiny_vit()
    inject(model, rank=2)
    weight = model.blocks[0].attn.qkv.weight
    with torch.no_grad(), pytest.raises(WeightWriteError, match=r"with lora_lightning\.disabled"):
        WRITES[write](weight)


def test_the_ways_to_write_reach_the_raw_weight():
    model = tiny_vit()
    inject(model, rank=2, trainable=[])
    layer = model.blocks[0].attn.qkv
    with disabled(model), torch.no_grad():
        nn.init.ones_(layer.weight)
    assert torch.equal(layer._parameters["weight"], torch.ones_like(layer.weight + 0))
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape))
    assert not layer._parameters["weight"].any()
    with pytest.raises(TypeError):
        layer.weight = torch.zeros(2)


def test_reading_the_weight_computes_like_a_tensor():
    layer = nn.Linear(4, 3)
    inject(layer, rank=1, target_modules="all", trainable=[])
    randomise(layer)
    plain = layer._parameters["weight"] + named_factors(layer, "default")["weight"].delta((3, 4))
    w = layer.weight
    assert torch.equal(w.sum(), plain.sum())
    assert torch.equal(w.T @ w, plain.T @ plain)
    assert type(w * 2) is torch.Tensor
    assert w.shape == (3, 4)
    assert "EffectiveWeight" not in repr((w * 2).detach())
    w.sum().backward()
    assert named_factors(layer, "default")["weight"].lora_B.grad is not None


def failures(model: nn.Module) -> dict[str, str]:
    """What `verify` finds wrong with an adapter on every layer."""
    inject(model, rank=2, target_modules="all", trainable=[])
    return verify(model, torch.randn(3, 4), raise_on_failure=False)[0].failures


def test_verify_names_what_fails_and_why():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.gated = (nn.Linear(4, 4) for _ in range(3))
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.used(x) + self.gate * self.gated(x)

    found = failures(Half())
    assert "never uses this weight" in found["idle.weight"]
    assert "multiplies this path by zero" in found["gated.weight"]
    assert set(found) == {"idle.weight", "gated.weight"}


class Behind(nn.Linear):
    """Bypasses the adapted weight in eval."""

    def forward(self, x):
        weight = self.weight if self.training else self._parameters["weight"]
        return nn.functional.linear(x, weight, self.bias)


class Fused(nn.Linear):
    def forward(self, x):
        weight = self.weight if torch.is_grad_enabled() else self._parameters["weight"]
        return nn.functional.linear(x, weight, self.bias)


class Counts(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) * (1 + hasattr(self, "lora"))


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (Behind, "in eval"),
        (Fused, "fused path reads the raw weight"),
        (Counts, "merging changes the output"),
    ],
)
def test_verify_finds_a_layer_that_is_wrong_in_eval(layer, said):
    found = failures(nn.Sequential(nn.Linear(4, 4), layer(4, 4)))
    assert list(found) == ["1.weight"]
    assert said in found["1.weight"]


@pytest.mark.parametrize("training", [False, True])
def test_what_is_added_has_the_mode_of_its_layer(tmp_path, training):
    model = nn.Sequential(tiny_vit(), nn.LSTM(4, 3), nn.utils.parametrizations.weight_norm(
        nn.Linear(3, 3))).train(training)  # fmt: skip

    def modes():
        return {module.training for module in model.modules()}

    options = {"rank": 2, "target_modules": "all", "trainable": []}
    inject(model, **options)
    assert modes() == {training}
    inject(model, **options, xs=True, name="core")
    save_adapter(model, tmp_path / "a")
    load_adapter(model, tmp_path / "a", "loaded")
    assert modes() == {training}
    merge(model)
    model.train(not training)
    unmerge(model)
    assert modes() == {not training}


def test_verify_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    inject(model, rank=2, target_modules="all", trainable=["1"])
    model(torch.randn(3, 4)).sum().backward()
    model[1].bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    verify(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(rng, torch.get_rng_state())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def test_buffers_that_moved_with_the_model_are_still_the_adapters(tmp_path):
    """Converting or moving a model makes new buffer objects; their history goes on."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    source = copy.deepcopy(model).double()
    inject(model, rank=2, target_modules=["0"], trainable=[])
    model.double().train()
    model(torch.randn(4, 3, 8, 8).double())
    path = save_adapter(model, tmp_path / "a.safetensors")
    assert "1.running_mean" in read_header(path)["buffers"]
    remove(model)
    assert torch.equal(model[1].running_mean, source[1].running_mean)


def test_a_part_of_the_source_does_not_renew_the_rest():
    model = tiny_vit()
    before = model.head.weight.detach().clone()
    inject(model, rank=2)
    with torch.no_grad():
        model.head.weight.add_(1)
    model.load_state_dict({}, strict=False)
    remove(model)
    assert torch.equal(model.head.weight, before)


def test_unmerging_refuses_as_a_whole_and_sees_writes_through_data():
    model = tiny_vit()
    inject(model, rank=2)
    merge(model)
    model.blocks[1].mlp.fc2.weight.data.zero_()
    with pytest.raises(AdapterError, match="changed since merge"):
        unmerge(model)
    assert not any(isinstance(m, AdaptedModule) for m in model.modules()), "half unmerged"


def test_an_error_inside_disabled_leaves_a_merged_model_merged():
    model = tiny_vit()
    inject(model, rank=2)
    randomise(model)
    merge(model)
    before = model(X)
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("order", ["embed first", "head first"])
def test_a_tied_head_is_trained(order):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            names = ["embed", "head"] if order == "embed first" else ["head", "embed"]
            for name in names:
                self.add_module(
                    name, nn.Embedding(9, 6) if name == "embed" else nn.Linear(6, 9, bias=False)
                )
            self.middle = nn.Linear(6, 6)
            self.head.weight = self.embed.weight

    model = Tied()
    inject(model, rank=2, target_modules=["middle"], trainable=["head"])
    assert model.head.weight.requires_grad
    check_still_frozen(model)


def test_a_module_with_its_own_lora_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].lora = "mine"
    with pytest.raises(TargetError, match="attribute 'lora' of its own"):
        inject(model, rank=2, target_modules=["0", "1"], trainable=[])
    assert type(model[0]) is nn.Linear
