"""Initialisations: the function is unchanged, for every kind of layer; values as documented."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning import (
    LoRACallback,
    disabled,
    inject,
    merge,
    start_from_data,
    verify,
)
from lora_lightning.errors import (
    AdapterError,
    AdapterNotFoundError,
    ConfigError,
    DataError,
    DecompositionError,
)
from lora_lightning.linalg.decompose import truncated_svd
from lora_lightning.lora.initialisation import METHODS
from lora_lightning.model.data_driven.activations import observed
from lora_lightning.model.probing import difference, run
from lora_lightning.model.state import named_factors
from tests.helpers.audio_zoo import MODELS
from tests.helpers.audio_zoo import build as build_audio
from tests.helpers.gpu import cudnn_rnn, ieee_convolutions  # noqa: F401 - fixtures
from tests.helpers.training import Module, loader, randomise, tiny_vit, trainer
from tests.helpers.zoo import ZOO, crossed, targets, there_and_back

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
    pytest.mark.filterwarnings("ignore:.* tensors start as 'zero' does"),
]
UNSEEN = (nn.Embedding, nn.modules.conv._ConvTransposeNd)
WEIGHTS = [n for n, m in METHODS.items() if m.needs == "nothing" and n != "zero"]
DATA = [n for n, m in METHODS.items() if m.needs != "nothing"]


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return sum((t**2).mean() for t in run(model, batch))


def started(kind: str, init: str, **options):
    make, x = ZOO[kind]
    base = make().eval().requires_grad_(False)
    model = make().eval().requires_grad_(False)
    model.load_state_dict(base.state_dict())
    if METHODS[init].needs != "nothing":
        options |= {"data": [x], "forward": run, "loss": loss}
    inject(
        model, rank=2, alpha=3.0, target_modules=targets(kind), trainable=[], seed=0, init=init,
        **options,
    )  # fmt: skip
    return base, model, x


@pytest.mark.parametrize(("kind", "init"), crossed([*WEIGHTS, *DATA]))
def test_the_function_stays_and_everything_is_exact(kind, init, tmp_path):
    base, model, x = started(kind, init)
    with torch.no_grad():
        before = run(base, x)
        assert difference(run(model, x), before) <= 1e-6
        verify(model, x, tolerance=1e-5)
        assert difference(run(model, x), before) <= 1e-6
        randomise(model)
        assert difference(run(model, x), before) > 1e-4
    there_and_back(model, x, tmp_path / "a.safetensors", base)


def one(weight: torch.Tensor, init: str, rank: int = 3, alpha: float = 6.0, **options):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    model = nn.Sequential(layer)
    inject(model, rank=rank, alpha=alpha, target_modules="all", trainable=[], init=init, seed=0,
           **options)  # fmt: skip
    return named_factors(model, "default")["0.weight"]


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(10, 8, generator=torch.Generator().manual_seed(seed))


def test_pissa_and_milora_split_the_spectrum():
    w = weight()
    u, s, vh = truncated_svd(w)
    for init, part in (("pissa", slice(0, 3)), ("milora", slice(-3, None))):
        f = one(w, init)
        start = f.spec.scaling * f.lora_B @ f.lora_A
        torch.testing.assert_close(start, (u[:, part] * s[part]) @ vh[part])
        torch.testing.assert_close((f.lora_B**2).sum(0), (f.lora_A**2).sum(1))  # shared evenly


def test_a_large_weight_is_decomposed_at_random_and_well(monkeypatch):
    monkeypatch.setattr("lora_lightning.lora.initialisation.RANDOMISED_FROM", 8)
    left, right = torch.randn(40, 2), torch.randn(2, 30)
    w = left @ right
    f = one(w, "pissa", rank=2)
    torch.testing.assert_close(f.spec.scaling * f.lora_B @ f.lora_A, w, rtol=1e-3, atol=1e-4)


def test_olora_is_orthonormal_and_follows_the_weight():
    f = one(weight(), "olora")
    torch.testing.assert_close(f.lora_B.T @ f.lora_B, torch.eye(3))
    start = f.spec.scaling * f.lora_B @ f.lora_A
    torch.testing.assert_close(start, f.lora_B @ f.lora_B.T @ weight())


def test_orthogonal_rows():
    f = one(weight(), "orthogonal")
    torch.testing.assert_close(f.lora_A @ f.lora_A.T, torch.eye(3) / 3)
    assert not f.lora_B.any()


def test_eva_finds_the_directions_of_the_inputs():
    directions = torch.linalg.qr(torch.randn(8, 8)).Q.T
    x = torch.randn(200, 3) * torch.tensor([5.0, 3.0, 1.0]) @ directions[:3]
    f = one(weight(), "eva", data=list(x.split(50)))
    torch.testing.assert_close(f.lora_A @ f.lora_A.T, torch.eye(3), atol=1e-5, rtol=0)
    inside = (f.lora_A @ directions[:3].T).square().sum(1)
    torch.testing.assert_close(inside, torch.ones(3))
    few = one(weight(), "eva", data=[x[:1]])  # one direction, and two at random
    torch.testing.assert_close(few.lora_A @ few.lora_A.T, torch.eye(3), atol=1e-5, rtol=0)


def test_activation_nmf_finds_parts_and_semi_nmf_takes_signs():
    parts = torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0], [0] * 6 + [1, 1]])
    x = torch.rand(300, 3, generator=torch.Generator().manual_seed(1)) @ parts
    f = one(weight(), "activation-nmf", data=[x])
    assert (f.lora_A >= 0).all()
    assert not f.lora_B.any()
    unit = parts / parts.norm(dim=1, keepdim=True)
    assert float((f.lora_A.detach() @ unit.T).amax(dim=0).min()) > 0.95
    signed = one(weight(), "activation-nmf", data=[x - x.mean()])
    torch.testing.assert_close(signed.lora_A.norm(dim=1), torch.ones(3))


def test_lora_ga_steps_along_the_full_gradient():
    x, goal = torch.randn(64, 8), torch.randn(64, 10)

    def mse(model, batch):
        return ((model(batch) - goal) ** 2).mean()

    f = one(weight(), "lora-ga", data=[x], loss=mse)
    layer = nn.Linear(8, 10, bias=False)
    layer.weight.data = weight()
    mse(layer, x).backward()
    _, _, vh = truncated_svd(layer.weight.grad)
    rows = f.lora_A / f.lora_A.norm(dim=1, keepdim=True)
    torch.testing.assert_close((rows @ vh[:3].T).abs(), torch.eye(3), atol=1e-4, rtol=0)
    size = 10**0.25 / math.sqrt(16)
    torch.testing.assert_close(f.lora_B.norm(dim=0), torch.full((3,), size))


def test_corda_weighs_the_weight_by_the_inputs():
    x = torch.randn(500, 8) * torch.tensor([10.0, 8, 6, 0.1, 0.1, 0.1, 0.1, 0.1])
    f = one(weight(), "corda", data=[x])
    start = (f.spec.scaling * f.lora_B @ f.lora_A).detach()
    # Of what the layer makes of these inputs, the start holds nearly all.
    lost = (x @ (weight() - start).T).norm() / (x @ weight().T).norm()
    plain = truncated_svd(weight(), 3).product()
    assert float(lost) < 0.1 < float((x @ (weight() - plain).T).norm() / (x @ weight().T).norm())


def test_the_same_seed_gives_the_same_start():
    x = torch.randn(50, 8)
    for init in METHODS:
        given = {} if METHODS[init].needs == "nothing" else {"data": [x], "loss": loss}
        a, b = one(weight(), init, **given), one(weight(), init, **given)
        assert torch.equal(a.lora_A, b.lora_A), init
        assert torch.equal(a.lora_B, b.lora_B), init


# ---- what is seen of a model ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext", "test_nfnet"]
)
def test_every_layer_of_a_timm_model_is_seen(name):
    model = timm.create_model(name, num_classes=4)
    x = [torch.rand(2, 3, 64, 64)]
    inject(model, rank=1, init="eva", target_modules="all", trainable=[], data=x)
    for path, f in named_factors(model, "default").items():
        torch.testing.assert_close(f.lora_A.norm(dim=1), torch.ones(1), msg=path)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_a_speech_model_is_seen(name):
    model, inputs = build_audio(name)
    inject(model, rank=1, target_modules="all", trainable=[], clamp_rank=True)
    factors = named_factors(model, "default")
    modules = {
        p: (model.get_submodule(p.rpartition(".")[0]), p.rpartition(".")[2]) for p in factors
    }
    seen: dict[str, int] = {}

    def sink(path: str, rows: torch.Tensor) -> None:
        assert rows.shape[1] == factors[path].matrix[1]
        seen[path] = seen.get(path, 0) + len(rows)

    model.eval()
    with torch.no_grad(), disabled(model), observed(modules, sink):
        model(*inputs)
    rest = {p for p in factors if p not in seen}
    assert all(isinstance(modules[p][0], UNSEEN) for p in rest), rest


def test_rows_are_what_the_layer_multiplies():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1, groups=2, bias=False)
    model, x, rows = nn.Sequential(conv), torch.randn(2, 4, 7, 9), []
    with torch.no_grad(), observed({"w": (conv, "weight")}, lambda _, r: rows.append(r)):
        out = model(x)
    matrix = conv.weight.detach().reshape(2, 3, -1)  # groups, out/groups, in/groups·kernel
    per_group = rows[0].reshape(2, 4, 5, 2, -1)
    again = torch.einsum("bhwgi,goi->bgohw", per_group, matrix).flatten(1, 2)
    torch.testing.assert_close(again, out)


def test_a_product_from_the_other_side_is_not_its_input():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return x @ self.layer.weight

    model, seen = Other(), []
    with torch.no_grad(), observed({"w": (model.layer, "weight")}, lambda p, _: seen.append(p)):
        model(torch.rand(3, 4))
        assert not seen
        torch.nn.functional.linear(torch.rand(3, 4), model.layer.weight)
    assert seen == ["w"]


@pytest.mark.parametrize("frozen", [True, False])  # autocast keeps copies of what is trained
def test_weights_are_seen_through_autocasts_copies(frozen):
    x, seen = torch.randn(2, 3, 6), []
    layers = nn.MultiheadAttention(6, 2, batch_first=True), nn.LSTM(6, 5), nn.Conv1d(3, 4, 3)
    model = nn.ModuleList(layers).requires_grad_(not frozen).eval()
    names = (0, "in_proj_weight"), (1, "weight_ih_l0"), (1, "weight_hh_l0"), (2, "weight")
    modules = {name: (layers[i], name) for i, name in names}
    for autocast in (False, True):
        rows = defaultdict(list)
        kept = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        sink = lambda path, found, rows=rows: rows[path].append(found)  # noqa: E731
        with torch.no_grad(), kept, observed(modules, sink):
            model[0](x, x, x), model[1](x), model[2](x)
        seen.append({path: torch.cat(found) for path, found in rows.items()})
    plain, cast = seen
    assert plain.keys() == cast.keys() == modules.keys()
    for path, found in plain.items():
        torch.testing.assert_close(cast[path], found, atol=0.02, rtol=0.02)


def test_weights_that_share_a_storage_are_told_apart():
    """As those of a recurrent layer do on a GPU, where cuDNN wants them in one piece."""
    layer, x, seen = nn.LSTM(6, 4, bidirectional=True).eval(), torch.randn(5, 3, 6), []
    weights = dict(layer.named_parameters())
    for packed in (False, True):
        if packed:
            flat = torch.cat([w.detach().reshape(-1) for w in weights.values()])
            parts = flat.split([w.numel() for w in weights.values()])
            for weight, part in zip(weights.values(), parts, strict=True):
                weight.data = part.view(weight.shape)
        rows = defaultdict(list)
        sink = lambda path, found, rows=rows: rows[path].append(found)  # noqa: E731
        modules = {name: (layer, name) for name, w in weights.items() if w.ndim == 2}
        with torch.no_grad(), observed(modules, sink):
            layer(x)
        seen.append({path: torch.cat(found) for path, found in rows.items()})
    assert seen[0].keys() == seen[1].keys() == modules.keys()
    assert all(torch.equal(seen[1][path], found) for path, found in seen[0].items())


@pytest.mark.usefixtures("ieee_convolutions", "cudnn_rnn")
@pytest.mark.parametrize(
    "options", [{"init": init} for init in DATA] + [{"rank": "explained-variance"}]
)
def test_a_start_from_data_takes_torchs_settings_as_they_are(options):
    model = nn.GRU(6, 5)
    given = {"data": [torch.randn(4, 3, 6)], "loss": loss, "forward": run, "rank": 2}
    if "rank" in options:
        del given["loss"]
    inject(model, target_modules="all", trainable=[], **{**given, **options})
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"


def test_what_cannot_be_seen_is_named():
    model = nn.Sequential(nn.ConvTranspose1d(3, 4, 3))
    with pytest.warns(UserWarning, match=r"1 tensors start as 'zero' does.*0\.weight"):
        inject(model, rank=2, init="eva", target_modules="all", trainable=[],
               data=[torch.rand(2, 3, 9)])  # fmt: skip
    f = named_factors(model, "default")["0.weight"]
    assert f.lora_A.any()
    assert not f.lora_B.any()


def test_the_look_leaves_no_trace():
    model = timm.create_model("test_efficientnet", num_classes=4).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inject(model, rank=1, init="lora-ga", target_modules="all", trainable=[],
           data=[torch.rand(4, 3, 64, 64)], loss=lambda m, b: m(b).square().mean())  # fmt: skip
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not model.conv_stem._parameters["weight"].requires_grad


# ---- misuse --------------------------------------------------------------------------------------


def test_what_is_missing_is_said_before_the_model_is_touched():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.rand(2, 4)
    for init, given, error, said in (
        ("eva", {}, ConfigError, "pass data="),
        ("lora-ga", {"data": [x]}, ConfigError, "pass loss="),
        ("eva", {"data": []}, DataError, "no batch"),
        ("eva", {"data": ["a"]}, DataError, "got str"),
        ("eva", {"data": [x * float("nan")]}, DecompositionError, "NaN"),
    ):
        with pytest.raises(error, match=said):
            inject(model, init=init, rank=1, target_modules="all", trainable=[], **given)
    assert type(model[0]) is nn.Linear
    with pytest.raises(AdapterNotFoundError):
        start_from_data(model, [])
    inject(model, rank=1, target_modules="all", trainable=[])
    with pytest.raises(ConfigError, match="needs no data"):
        start_from_data(model, [])
    merge(model)
    with pytest.raises(AdapterError, match="merged"):
        start_from_data(model, [])


def test_a_source_checkpoint_after_injection_starts_it_anew():
    model, other = nn.Sequential(nn.Linear(8, 10)), nn.Sequential(nn.Linear(8, 10))
    inject(model, rank=3, alpha=6.0, init="pissa", target_modules="all", trainable=[], seed=0)
    model.load_state_dict(other.state_dict())
    f = named_factors(model, "default")["0.weight"]
    want = truncated_svd(other[0].weight, 3).product()
    torch.testing.assert_close(f.spec.scaling * f.lora_B @ f.lora_A, want)
    x = torch.randn(2, 8)
    torch.testing.assert_close(model(x), other(x))


# ---- in a trainer --------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", *DATA])
def test_the_callback_starts_from_the_trainers_batches(init, tmp_path):
    module = Module()
    source = {k: v.clone() for k, v in module.model.state_dict().items()}
    x = next(iter(loader()))[0]
    module.model.eval()
    before = module.model(x)
    starts = {}

    class Look(LoRACallback):
        def on_train_start(self, *args):
            super().on_train_start(*args)
            module.model.eval()
            starts["same"] = torch.allclose(module.model(x), before, atol=1e-5)
            starts["A"] = [f.lora_A.clone() for f in factors()]

    def factors():
        return list(named_factors(module.model, "default").values())

    trainer(tmp_path, Look(rank=2, seed=0, init=init, trainable=[])).fit(module, loader())
    assert starts["same"]
    uniform = Module()
    inject(uniform.model, rank=2, seed=0, trainable=[])
    drawn = named_factors(uniform.model, "default").values()
    assert all(not torch.equal(a, f.lora_A) for a, f in zip(starts["A"], drawn, strict=True))
    assert all(torch.equal(v, module.model.state_dict()[k]) for k, v in source.items())
    assert any((f.low_rank()[0] @ f.low_rank()[1]).abs().max() > 1e-6 for f in factors())


class MakesTensors(Module):
    """Its step makes a tensor, of the default precision, and multiplies by it."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]) @ torch.eye(4), batch[1])


@pytest.mark.parametrize(
    ("init", "precision"),
    [
        pytest.param(init, precision, marks=[] if i == j else pytest.mark.slow)
        for i, init in enumerate(["eva", "activation-nmf", "lora-ga"])
        for j, precision in enumerate(["64-true", "bf16-true", "bf16-mixed"])
    ],
)
def test_the_look_is_in_the_precision_of_the_fit(init, precision, tmp_path):
    module = MakesTensors()
    callback = LoRACallback(rank=2, seed=0, init=init)
    trainer(tmp_path, callback, precision=precision).fit(module, loader())
    drawn = Module().to(module.model.head.weight.dtype)
    inject(drawn.model, rank=2, seed=0)
    for path, other in named_factors(drawn.model, "default").items():
        f = named_factors(module.model, "default")[path]
        assert f.lora_A.dtype == other.lora_A.dtype
        # Four steps of 0.01 do not lead here from what is drawn without a look.
        assert not torch.allclose(f.lora_A, other.lora_A, atol=0.1)


def test_ranks_are_chosen_where_the_network_is_built_in_the_precision_of_the_fit(tmp_path):
    class Late(MakesTensors):
        def configure_model(self):
            self.model = tiny_vit()

    callback = LoRACallback(rank="explained-variance", max_rank=4, seed=0)
    trainer(tmp_path, callback, precision="64-true").fit(Late(), loader())
    early = LoRACallback(rank="explained-variance", max_rank=4, seed=0)
    trainer(tmp_path, early, precision="64-true").fit(MakesTensors(), loader())
    assert len({row.rank for row in early.report_.rows}) > 1
    assert len(callback.report_.rows) == len(early.report_.rows)


def test_a_resumed_fit_does_not_start_again(tmp_path):
    whole, first = Module(), Module()
    resumed = Module()
    for m in (first, resumed):
        m.load_state_dict(whole.state_dict())

    def fit(module, epochs, ckpt=None):
        t = trainer(tmp_path, LoRACallback(rank=2, seed=0, init="corda"), max_epochs=epochs)
        t.fit(module, loader(), ckpt_path=ckpt)
        return t

    fit(whole, 2)
    fit(first, 1).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 2, tmp_path / "half.ckpt")
    a, b = (named_factors(m.model, "default") for m in (whole, resumed))
    for path, f in a.items():
        torch.testing.assert_close(f.start_A, b[path].start_A)
        torch.testing.assert_close(f.lora_B, b[path].lora_B)


def test_a_look_at_the_data_does_not_change_the_order_of_training(tmp_path):
    orders = []
    for init in ("zero", "eva"):
        module, seen = Module(), []
        step = module.training_step
        module.training_step = lambda batch, i, step=step, seen=seen: (
            seen.append(float(batch[0].sum())), step(batch, i))[1]  # fmt: skip
        torch.manual_seed(3)
        shuffled = DataLoader(loader().dataset, batch_size=2, shuffle=True)
        trainer(tmp_path, LoRACallback(rank=2, seed=0, init=init)).fit(module, shuffled)
        orders.append(seen)
    assert orders[0] == orders[1]
