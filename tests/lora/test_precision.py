"""A base in half precision: its factors stay in float32 and learn, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning import LoRACallback, fused, inject, merge, unmerge
from lora_lightning.model.probing import difference, randomise, run
from lora_lightning.model.state import named_factors
from tests.helpers.training import Module, fitted
from tests.helpers.zoo import ZOO, targets

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
HALVES = [torch.bfloat16, torch.float16]
CASES = [
    *((kind, "converted", {}) for kind in ZOO),
    *((kind, "adapted", {"dora": True}) for kind in ZOO),
    *((kind, "adapted", {"xs": True}) for kind in ("Linear", "Conv2d")),
    *((kind, "adapted", {"init": "pissa"}) for kind in ("Linear", "Conv2d")),
]


def in_half(kind: str, dtype: torch.dtype, first: str, **options) -> tuple[nn.Module, nn.Module]:
    """A base in half precision, and one that is adapted after (or before) it is converted."""
    make, _ = ZOO[kind]
    base = make().eval().requires_grad_(False)
    model = copy.deepcopy(base)
    options = {"rank": 2, "target_modules": targets(kind), "trainable": [], "seed": 0} | options
    if first == "converted":
        model.to(dtype)
    inject(model, **options)
    return base.to(dtype), model.to(dtype)


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize(("kind", "first", "options"), CASES, ids=str)
@torch.no_grad()
def test_any_layer_in_bfloat16(kind, first, options):
    """The base's output at the start; later what the rounded W' gives; W comes back as it was."""
    base, model = in_half(kind, torch.bfloat16, first, **options)
    x = converted(ZOO[kind][1], torch.bfloat16)
    assert all(map(torch.equal, run(model, x), run(base, x)))
    factors = named_factors(model, "default")
    randomise(model, factors, seed=0)
    assert {t.dtype for f in factors.values() for t in f.tensors().values()} == {torch.float32}
    out, before = run(model, x), copy.deepcopy(model.state_dict())
    assert {o.dtype for o in out} == {o.dtype for o in run(base, x)}
    merge(model)
    assert difference([o.float() for o in run(model, x)], [o.float() for o in out]) < 5e-2
    unmerge(model)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))


@pytest.mark.parametrize("dtype", HALVES)
@torch.no_grad()
def test_a_merged_weight_is_rounded_once(dtype):
    _, model = in_half("Linear", dtype, "adapted")
    factors = named_factors(model, "default")
    randomise(model, factors, seed=0)
    ((path, f),) = factors.items()
    raw = model.state_dict()[path].float()
    merge(model)
    assert torch.equal(model.state_dict()[path], (raw + f.delta(raw.shape)).to(dtype))


@pytest.mark.usefixtures("as_if_inputs_were_large")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [{}, {"freeze_a": True}, {"xs": True}], ids=str)
def test_the_fused_path_is_the_plain_one(dtype, options):
    """Gradients reach the factors in float32; those of float32's formula, to rounding."""
    model = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 20)).to(dtype)
    inject(model, rank=4, target_modules=["1"], trainable=[], **options)
    randomise(model, named_factors(model, "default"), seed=0)
    exact = copy.deepcopy(model)
    x = torch.randn(30, 24).to(dtype)
    for tensor in (*exact.parameters(), *exact.buffers()):
        tensor.data = tensor.data.float()

    def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        model(x).float().square().mean().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    found = gradients(model, x)
    assert {g.dtype for g in found} == {torch.float32}
    with fused(False):
        plain, right = gradients(model, x), gradients(exact, x.float())
    assert difference(found, right) < 3e-2
    assert difference(plain, right) < 3e-2


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Embedding"])
def test_dora_keeps_the_dtype_of_the_output_under_autocast(kind):
    make, x = ZOO[kind]
    base, model = make(), make()
    inject(model, rank=2, target_modules=targets(kind), trainable=[], dora=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(model, x)[0].dtype == run(base, x)[0].dtype


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_a_core_is_fused_under_autocast(kind):
    """Whose product with the frozen factors autocast would round."""
    make, x = ZOO[kind]
    model = make()
    inject(model, rank=2, target_modules=targets(kind), trainable=[], xs=True)
    randomise(model, named_factors(model, "default"), seed=0)
    (core,) = [p for p in model.parameters() if p.requires_grad]
    found = []
    for smallest in (0, 2**60):
        with fused(smallest=smallest), torch.autocast("cpu", dtype=torch.bfloat16):
            (out,) = run(model, x)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), core)])
    assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    assert difference(*found) < 3e-2


class Regressor(Module):
    """One step's update of A is far below half an ulp of bfloat16."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)), lr=1e-5)

    def training_step(self, batch, batch_idx):
        return (self(batch) - 1).float().square().mean()


# Its fingerprint is another once the base was rounded to float16 (see `fingerprint`).
@pytest.mark.filterwarnings("ignore:the base's weights changed .* rounded to float16")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=str)
@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_small_steps_add_up_in_half_precision(tmp_path, precision, options):
    """AdamW's ε underflowed in float16 (0/0 where B = 0), and A stood still in bfloat16."""
    torch.manual_seed(0)
    module = Regressor()
    options = {"target_modules": "all", "trainable": [], "output_dir": tmp_path} | options
    callback = LoRACallback(rank=2, **options)
    data = DataLoader(torch.randn(24, 16), batch_size=4)
    starts = {}
    module.on_train_start = lambda: starts.update(copy.deepcopy(module.state_dict()))
    fitted(tmp_path, module, callback, data=data, precision=precision, max_epochs=2)
    ended = module.state_dict()
    moved = {key: (ended[key] - starts[key]).abs().max() for key in ended if ".lora." in key}
    assert {ended[key].dtype for key in moved} == {torch.float32}
    for key, most in moved.items():
        assert 5e-6 < most < 2e-4, key
    assert all(torch.equal(ended[key], starts[key]) for key in ended.keys() - moved.keys())
