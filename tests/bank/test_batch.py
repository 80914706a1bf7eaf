"""Values used for an item: tied weights, weight norm, precision, and memory of autograd."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lora_lightning import AdapterBank
from lora_lightning.errors import TargetError
from lora_lightning.model.probing import difference, run
from tests.helpers.bank_cases import check, one_by_one, tiny, write
from tests.helpers.networks import Tied

FORMS = [
    {"target_modules": ["embed"], "trainable": ["head"]},
    {"target_modules": ["head"], "trainable": ["embed"]},
    {"target_modules": ["middle"], "trainable": ["head"]},
    {"target_modules": ["embed"], "trainable": []},
]


def alone_and_mixed(base, folder, x, **options):
    torch.manual_seed(0)
    names = ["a", "b", None]
    bank, paths = check(base, folder, x, names=names, **options)
    for name in "ab":
        with torch.no_grad(), bank[name]:
            alone = run(base, (x,))
        assert difference(alone, one_by_one(base, paths, [name] * 3, (x,))) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"xs": True}])
def test_factors_on_a_tensor_that_is_owned_under_another_name(form, kind, tmp_path):
    tokens = torch.randint(0, 7, (3, 4), generator=torch.Generator().manual_seed(0))
    if "xs" in kind and form in FORMS[:2]:  # no state dict would hold what XS comes from
        with pytest.raises(TargetError, match=r"is tied to .* trained in full under that name"):
            alone_and_mixed(Tied(), tmp_path, tokens, **form, **kind)
        return
    alone_and_mixed(Tied(), tmp_path, tokens, **form, **kind)


def test_ties_differ_between_adapters(tmp_path):
    tokens = torch.randint(0, 7, (3, 4), generator=torch.Generator().manual_seed(0))
    alone_and_mixed(Tied(), tmp_path, tokens, each=(FORMS[3], FORMS[0]))


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    "each",
    [
        ({"trainable": ["gain"], "target_modules": "all"},),
        ({"trainable": ["0"], "target_modules": ["1"]}, {"target_modules": "all"}),
        ({"trainable": ["0"], "target_modules": "all", "dora": True}, {"target_modules": ["1"]}),
    ],
)
def test_weight_norm_with_parameters_of_its_own(old, each, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
        base = nn.Sequential(norm(nn.Linear(6, 5)), nn.Linear(5, 4)).eval()
    if each[0]["trainable"] == ["gain"]:
        each = ({**each[0], "trainable": ["*weight_g" if old else "*original0"]},)
    x = torch.randn(3, 6)
    with torch.no_grad():
        before = base(x)
        alone_and_mixed(base, tmp_path, x, each=each)
        assert torch.equal(base(x), before)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift, self.inner = nn.Parameter(torch.randn(1, 4, 6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.inner(x + self.shift[:1])


def test_rows_of_a_bare_parameter(tmp_path):
    alone_and_mixed(Bare(), tmp_path, torch.randn(3, 4, 6), target_modules=["shift"])


class Like(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = x.type_as(self.inner.weight).to(self.last.weight)
        return nn.functional.linear(self.inner(x), self.last.weight.type_as(self.inner.weight))


def test_another_tensor_made_like_a_weight(tmp_path):
    alone_and_mixed(Like(), tmp_path, torch.randn(3, 6), target_modules="all")


# ---- modes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{}, {"xs": True}, {"dora": True}, {"trainable": ["1"]}])
def test_what_is_read_under_autocast_or_inference_mode_serves_afterwards(form, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4)).eval()
    paths = write(base, tmp_path, **form)
    bank, names, x = AdapterBank(base, paths), ["a", "b", None], torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        with bank[names]:
            base(x)
        with bank["a"]:
            base(x)
    for chosen in (names, ["a"] * 3):
        with torch.no_grad(), bank[chosen]:
            mixed = base(x)
        assert difference([mixed], one_by_one(base, paths, chosen, (x,))) <= 1e-5
        leaf = x.clone().requires_grad_()
        with bank[chosen]:
            base(leaf).sum().backward()
        assert leaf.grad is not None


def test_a_graph_over_two_blocks(tmp_path):
    base = tiny()
    bank = AdapterBank(base, write(base, tmp_path))
    grads = []
    for together in (True, False):
        x = torch.ones(2, 6, requires_grad=True)
        outputs = []
        for names in (["a", "b"], ["b", "a"]):
            with bank[names]:
                outputs.append(base(x).square().sum())
            if not together:
                outputs.pop().backward()
        if together:
            sum(outputs).backward()
        grads.append(x.grad)
    assert difference([grads[0]], [grads[1]]) <= 1e-5


@pytest.mark.parametrize("autocast", [True, False])
def test_norms_in_another_precision_do_not_change_that_of_the_activations(autocast, tmp_path):
    base = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(6),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
    ).eval()
    paths = write(base, tmp_path, target_modules=["0"], trainable=["norms"])
    x = torch.randn(3, 3, 8, 8)
    if not autocast:
        base, x = base.bfloat16(), x.bfloat16()
        for norm in (base[1], base[2], base[4]):
            norm.float()
    bank = AdapterBank(base, paths, check="structure")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        source = base(x)
        with bank["a"]:
            alone = base(x)
        with bank[["a", "b", None]]:
            mixed = base(x)
    assert mixed.dtype == alone.dtype == source.dtype == torch.bfloat16
    assert difference([mixed[:1].float()], [alone[:1].float()]) < 0.05
    assert difference([mixed[2:].float()], [source[2:].float()]) < 0.05
