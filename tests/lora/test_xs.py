"""LoRA-XS: r² parameters a layer, and otherwise like any adapter."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lightning import (
    LoRACallback,
    LoRAConfig,
    combine,
    compress,
    disabled,
    inject,
    load_adapter,
    merge,
    parameter_groups,
    read_header,
    remove,
    save_adapter,
    set_active,
    unmerge,
    verify,
)
from lora_lightning.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    DecompositionError,
    TargetError,
)
from lora_lightning.linalg.decompose import spectrum
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.xs import Basis, XSFactors, leading_halves
from lora_lightning.model.probing import difference, run
from lora_lightning.model.state import named_factors, state_of
from tests.helpers.networks import Tied
from tests.helpers.training import Module, fitted, same, tiny_vit
from tests.helpers.zoo import ZOO, targets, there_and_back
from tests.model.test_state import calls

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def move(model: nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Give every core random values, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for factors in (m for m in model.modules() if isinstance(m, XSFactors)):
        factors.core.copy_(std * torch.randn(factors.core.shape, generator=generator))


def moved_vit(base: nn.Module | None = None, seed: int = 0, **options) -> nn.Module:
    model = xs_vit(base, **options)
    move(model, seed)
    return model


def factors_of(model: nn.Module, name: str = "default") -> dict[str, XSFactors]:
    found = named_factors(model, name)
    assert all(isinstance(f, XSFactors) for f in found.values())
    return found


def xs_vit(base: nn.Module | None = None, **options) -> nn.Module:
    model = tiny_vit() if base is None else copy.deepcopy(base)
    inject(model, **{"rank": 4, "xs": True, "trainable": [], **options})
    return model


# ---- every kind of layer -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(ZOO))
def test_every_kind_of_layer(kind, tmp_path):
    make, x = ZOO[kind]
    base, model = (make().eval().requires_grad_(False) for _ in range(2))
    model.load_state_dict(base.state_dict())
    before = run(base, x)
    report = inject(
        model, rank=3, alpha=3.0, xs=True, target_modules=targets(kind), trainable=[],
        clamp_rank=True,
    )  # fmt: skip
    assert difference(run(model, x), before) <= 1e-6
    squares = sum(row.rank**2 for row in report.rows)
    assert report.trainable_parameters == squares
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == squares
    verify(model, x, tolerance=1e-5)
    move(model)
    with torch.no_grad():
        adapted = run(model, x)
        assert difference(adapted, before) > 1e-3
        there_and_back(model, x, path := tmp_path / "a.safetensors", base)
        sizes = {key: tensor.numel() for key, tensor in load_file(path).items()}
        assert sizes == {f"{p}.core": f.spec.rank**2 for p, f in factors_of(model).items()}
        assert state_of(model).reports["default"].trainable_parameters == squares
        compress(model, energy=1.0)
        assert difference(run(model, x), adapted) < 1e-4


@pytest.mark.parametrize("options", [{"dora": True}, {"dropout": 0.3}])
def test_with_dora_and_dropout(options, tmp_path):
    base = tiny_vit()
    model = xs_vit(base, **options)
    assert torch.equal(model(X), base(X))
    verify(model, X)
    move(model)
    with torch.no_grad():
        for f in factors_of(model).values():
            if f.magnitude is not None:
                f.magnitude.mul_(1.1)
    path = save_adapter(model, tmp_path / "a.safetensors")
    fresh = copy.deepcopy(base)
    report = load_adapter(fresh, path)
    assert torch.equal(fresh(X), model(X))
    expected = sum(16 + (r.shape[0] if options.get("dora") else 0) for r in report.rows)
    assert report.trainable_parameters == expected


# ---- what is frozen, and what trains -------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_the_halves_are_those_of_the_svd(shape):
    w = torch.randn(shape)
    lora_B, lora_A = leading_halves(w, 4)
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    torch.testing.assert_close(lora_A @ lora_A.T, torch.eye(4).double())
    torch.testing.assert_close(lora_B @ lora_A, (u[:, :4] * s[:4]) @ vh[:4])
    torch.testing.assert_close(lora_B.T @ lora_B, torch.diag(s[:4] ** 2))
    assert all(column[column.abs().argmax()] > 0 for column in lora_B.T)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_a_direction_without_a_singular_value_is_left_out(shape):
    w = torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
    lora_B, lora_A = leading_halves(w, 4)
    torch.testing.assert_close(lora_B @ lora_A, w.double(), atol=1e-5, rtol=0)
    assert not lora_B[:, 2:].any()
    assert not lora_A[2:].any()


def test_vectors_hold_where_singular_values_lie_close_together():
    """An orthogonal weight, whose values differ by rounding alone, summed in another order."""
    q = nn.init.orthogonal_(torch.empty(64, 48))
    a, b = Basis(q, 4).renew(q), Basis(q.flip(0), 4).renew(q.flip(0))
    inside = (a.lora_A @ b.lora_A.T).abs()
    torch.testing.assert_close(inside, torch.eye(4), atol=1e-3, rtol=0)


def test_the_gradient_is_the_plain_formula():
    layer = nn.Linear(8, 10, bias=False)
    model, weight = nn.Sequential(layer), layer.weight.detach().clone()
    inject(model, rank=3, alpha=6.0, xs=True, target_modules="all", trainable=[])
    x, goal = torch.randn(5, 8), torch.randn(5, 10)
    f = factors_of(model)["0.weight"]
    move(model)
    ((model(x) - goal) ** 2).sum().backward()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    # The product of both halves is the same whatever the vectors' signs.
    B, A = f.basis.lora_B, f.basis.lora_A
    torch.testing.assert_close(B @ A, (u[:, :3] * s[:3]) @ vh[:3])
    effective = weight + 2.0 * B @ f.core.detach() @ A
    G = 2 * (x @ effective.T - goal).T @ x
    torch.testing.assert_close(f.core.grad, 2.0 * B.T @ G @ A.T)
    assert layer._parameters["weight"].grad is None


def test_both_paths_give_the_same_gradient():
    make, x = ZOO["Conv2d"]
    layer = make()
    inject(layer, rank=3, xs=True, target_modules="all", trainable=[])
    move(layer)
    core = layer.lora["default"]["weight"].core
    (factorised,) = torch.autograd.grad(layer(x).square().sum(), core)
    out = layer._conv_forward(x, layer.weight, layer.bias)
    (effective,) = torch.autograd.grad(out.square().sum(), core)
    torch.testing.assert_close(factorised, effective, rtol=1e-4, atol=1e-4)


def test_optimizer_groups_and_spectrum():
    model = xs_vit(trainable=["head"])
    groups = {g["name"]: g for g in parameter_groups(model, 1e-2, lora_plus_ratio=16)}
    assert groups.keys() == {"core", "full", "no_decay"}
    assert groups["core"]["lr"] == 1e-2
    assert len(groups["core"]["params"]) == len(factors_of(model))
    move(model)
    f = next(iter(factors_of(model).values()))
    values = spectrum(*f.low_rank(), f.spec.scaling)
    torch.testing.assert_close(values, torch.linalg.svdvals(f.delta(f.matrix))[:4])


# ---- several, moved, copied ----------------------------------------------------------------------


def test_adapters_of_one_rank_share_what_is_frozen(tmp_path):
    base = tiny_vit()
    paths = []
    for seed in range(3):
        model = moved_vit(base, seed)
        paths.append((save_adapter(model, tmp_path / f"{seed}.safetensors"), model(X)))
    many = copy.deepcopy(base)
    for i, (path, _) in enumerate(paths):
        load_adapter(many, path, f"n{i}")
    inject(many, rank=2, xs=True, trainable=[], name="smaller")

    def shared(model):
        a, b, small = (factors_of(model, n) for n in ("n0", "n2", "smaller"))
        one = all(a[p].lora_A is b[p].lora_A and a[p].basis is b[p].basis for p in a)
        return one and all(small[p].basis is not a[p].basis for p in a)

    assert shared(many)
    for i, (_, expected) in enumerate(paths):
        set_active(many, f"n{i}")
        assert torch.equal(many(X), expected)
    assert shared(copy.deepcopy(many))
    assert shared(pickle.loads(pickle.dumps(many)))
    assert shared(copy.deepcopy(many).double())
    twin = copy.deepcopy(many).double()
    torch.testing.assert_close(twin(X.double()).float(), paths[2][1])
    remove(many, "n2")
    set_active(many, "n1")
    assert torch.equal(many(X), paths[1][1])
    remove(many)
    assert torch.equal(many(X), base(X))


def test_one_more_of_many_costs_what_one_costs(tmp_path):
    base = tiny_vit()
    path = save_adapter(xs_vit(base), tmp_path / "a.safetensors")
    counts = []
    for number in (2, 8):
        model = copy.deepcopy(base)
        for i in range(number):
            load_adapter(model, path, f"n{i}")
        load_adapter(model, path, "warm")
        counts.append(calls(lambda model=model: load_adapter(model, path, "more")))
    assert counts[0] == counts[1]


def test_state_dicts_hold_cores_and_no_more():
    model = xs_vit()
    own = {k for k in model.state_dict() if ".lora." in k}
    assert own == {f"{p.rpartition('.')[0]}.lora.default.weight.core" for p in factors_of(model)}


# ---- other bases ---------------------------------------------------------------------------------


def test_a_source_checkpoint_after_injection_gives_its_vectors():
    other, model = tiny_vit(), moved_vit()
    model.load_state_dict(other.state_dict(), strict=True)
    for path, f in factors_of(model).items():
        raw = other.get_parameter(path).reshape(f.matrix)
        lora_B, lora_A = leading_halves(raw, 4)
        torch.testing.assert_close(f.basis.lora_B, lora_B.float())
        torch.testing.assert_close(f.basis.lora_A, lora_A.float())
    with disabled(model):
        assert torch.equal(model(X), other(X))


def test_a_whole_state_dict_brings_base_and_core_together():
    """Another base and trained cores: the frozen factors must follow the base."""
    trained, model = moved_vit(), xs_vit()
    model.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(model(X), trained(X))


@pytest.mark.filterwarnings("ignore:a state dict holds the head")
@pytest.mark.parametrize(("target", "trained"), [("embed", "head"), ("head", "embed")])
def test_a_weight_that_trains_under_another_name_is_not_what_it_was_computed_from(target, trained):
    own, words = {"xs": True, "rank": 2, "target_modules": [target]}, torch.arange(9)[None]
    model = Tied()
    with pytest.raises(TargetError, match=f"{target}.weight, which is tied to {trained}.weight"):
        inject(model, trainable=[trained], **own)
    assert same(model.state_dict(), Tied().state_dict())

    def both():
        model = Tied()
        inject(model, trainable=[], **own)
        inject(model, rank=2, target_modules=["middle"], trainable=[trained], name="other")
        return model

    model, fresh = both(), both()
    move(model)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    with pytest.raises(TargetError, match=f"tied to {trained}.weight and trained in full"):
        inject(model, trainable=[], name="third", **own)
    fresh.load_state_dict(model.state_dict())
    for each in (model, fresh):
        set_active(each, "default")
    assert torch.equal(fresh(words), model(words))
    assert not torch.equal(fresh(words), Tied()(words))


@pytest.mark.parametrize("whole", [True, False])
def test_injected_on_the_meta_device(whole):
    trained = moved_vit()
    source = copy.deepcopy(trained)
    remove(source)
    with torch.device("meta"):
        model = tiny_vit()
    inject(model, rank=4, xs=True, trainable=[])
    if whole:
        model.load_state_dict(trained.state_dict(), assign=True)
        assert torch.equal(model.eval()(X), trained(X))
    else:
        model.to_empty(device="cpu")
        model.load_state_dict(source.state_dict())
        assert torch.equal(model.eval()(X), source(X))
        move(model)
        assert torch.equal(model(X), trained(X))


def test_a_file_is_refused_by_a_base_with_other_vectors(tmp_path, monkeypatch):
    base = tiny_vit()
    model = moved_vit(base)
    path = save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(BaseMismatchError, match="other weights"):
        load_adapter(tiny_vit(), path)
    load_adapter(tiny_vit(), path, check="structure")

    def another(matrix, rank):
        lora_B, lora_A = leading_halves(matrix, rank)
        sign = torch.tensor([1.0, -1.0, 1.0, 1.0]).double()
        return lora_B * sign, lora_A * sign[:, None]

    monkeypatch.setattr("lora_lightning.lora.xs.leading_halves", another)
    with pytest.raises(BaseMismatchError, match="for 8 of 8 of them"):
        load_adapter(copy.deepcopy(base), path)


def test_a_base_in_another_precision(tmp_path):
    """Rounding the weight turns vectors whose singular values lie close together."""
    base = tiny_vit()
    half = copy.deepcopy(base).bfloat16()
    kept = copy.deepcopy(half.state_dict())
    model = moved_vit(base, rank=40)
    path = save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(BaseMismatchError, match="holds cores alone"):
        load_adapter(half, path)
    assert all(torch.equal(v, kept[k]) for k, v in half.state_dict().items())
    # One that moves after it was trained brings its vectors along, rounded.
    load_adapter(copy.deepcopy(base), save_adapter(copy.deepcopy(model).bfloat16(), path))
    compress(model, energy=1.0)
    load_adapter(half, save_adapter(model, path))


def test_an_inactive_and_a_merged_one_save_the_same_file(tmp_path):
    model = moved_vit()
    path = save_adapter(model, tmp_path / "a.safetensors")
    merge(model)
    assert save_adapter(model, tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    unmerge(model)
    inject(model, rank=1, name="plain")
    again = save_adapter(model, tmp_path / "c.safetensors", "default")
    assert again.read_bytes() == path.read_bytes()
    header = read_header(path)
    assert header["config"]["xs"] is True
    assert all(t["xs"] and isinstance(t["basis"], float) for t in header["targets"])


# ---- made into others ----------------------------------------------------------------------------


def test_compress_makes_a_plain_one(tmp_path):
    base = tiny_vit()
    model = moved_vit(base)
    before = {p: f.delta(f.matrix).detach() for p, f in factors_of(model).items()}
    found = compress(model, rank=2)
    assert found.parameters_before == 16 * len(before)
    for path, f in named_factors(model, "default").items():
        assert type(f) is Factors
        assert f.lora_A.requires_grad
        values = torch.linalg.svdvals(before[path])
        torch.testing.assert_close(torch.linalg.svdvals(f.delta(f.matrix))[:2], values[:2])
    fresh = copy.deepcopy(base)
    load_adapter(fresh, save_adapter(model, tmp_path / "a.safetensors"))
    assert torch.equal(fresh(X), model(X))


def test_combined_with_a_plain_one():
    model = moved_vit(name="tiny")
    inject(model, rank=2, name="plain", trainable=[])
    with torch.no_grad():
        for f in named_factors(model, "plain").values():
            f.lora_B.normal_()
    parts = [named_factors(model, n) for n in ("tiny", "plain")]
    combine(model, {"tiny": 0.7, "plain": -0.2}, "sum")
    for path, f in named_factors(model, "sum").items():
        tiny, plain = (p[path].delta(f.matrix) for p in parts)
        torch.testing.assert_close(f.delta(f.matrix), 0.7 * tiny - 0.2 * plain)


# ---- in a trainer --------------------------------------------------------------------------------


def test_a_resumed_fit_is_an_uninterrupted_one(tmp_path):
    base = tiny_vit()

    def fit(epochs, ckpt=None):
        module = Module(copy.deepcopy(base))
        callback = LoRACallback(rank=4, xs=True, output_dir=tmp_path)
        return module, fitted(tmp_path, module, callback, max_epochs=epochs, ckpt=ckpt), callback

    whole, _, callback = fit(4)
    _, half, _ = fit(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    stored = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert {k.rpartition(".")[2] for k in stored if ".lora." in k} == {"core"}
    resumed, _, _ = fit(4, tmp_path / "half.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())
    assert all(f.core.any() for f in factors_of(whole.model).values())
    fresh = copy.deepcopy(base)
    load_adapter(fresh, callback.adapter_path_)
    assert torch.equal(fresh(X), whole.model.eval()(X))


def test_a_plain_checkpoint_is_refused_in_words():
    plain, model = tiny_vit(), xs_vit()
    inject(plain, rank=4, trainable=[])
    with pytest.raises(AdapterFileError, match="no place for"):
        model.load_state_dict(plain.state_dict())
    with pytest.raises(AdapterFileError, match="no place for"):
        plain.load_state_dict(model.state_dict())
    with pytest.raises(AdapterFileError, match="another rank"):
        xs_vit(rank=2).load_state_dict(model.state_dict())


# ---- misuse --------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused():
    for given, said in (
        ({"freeze_a": True}, "freezes both factors"),
        ({"init": "pissa"}, "init='pissa' has nothing to set"),
        ({"init": "eva"}, "init='eva' has nothing to set"),
        ({"xs": "yes"}, "xs must be true or false"),
    ):
        with pytest.raises(ConfigError, match=said):
            LoRAConfig(**{"xs": True, **given})
    model = tiny_vit()
    with pytest.raises(ConfigError, match="xs=True needs a frozen base"):
        inject(model, xs=True, rank=2, freeze=False)
    for value in (0.0, float("nan")):
        with torch.no_grad():
            model.blocks[1].mlp.fc1.weight.fill_(value)
        with pytest.raises(TargetError, match=r"blocks\.1\.mlp\.fc1\.weight\. Load the source"):
            inject(model, xs=True, rank=2)
    assert type(model.blocks[0].attn.qkv) is nn.Linear
    with pytest.raises(DecompositionError, match="NaN"):
        leading_halves(torch.full((3, 3), float("nan")), 1)
