"""A mixed batch, with an adapter for each item, equals runs item by item."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lora_lightning import AdapterBank, load_adapter, merge
from lora_lightning.bank import products
from lora_lightning.bank.layout import Layout
from lora_lightning.errors import AdapterError
from lora_lightning.model.probing import difference, run
from tests.helpers.audio_zoo import build
from tests.helpers.bank_cases import IMAGES, NAMES, SWIN, check, images, one_by_one, small, write
from tests.helpers.training import tiny_vit
from tests.helpers.zoo import ZOO, targets


@pytest.mark.parametrize("name", IMAGES)
def test_images(name, tmp_path):
    make, size, options = IMAGES[name]
    torch.manual_seed(0)
    bank, _ = check(make(), tmp_path, images(size), **options)
    assert not any("groups" in place for place in bank.places.values())


def test_windows_are_found_and_stay_right_with_other_batches_and_pictures(tmp_path):
    base = small("swin_tiny_patch4_window7_224", **SWIN, window_size=4, strict_img_size=False)
    bank, paths = check(base, tmp_path, images(64), target_modules="all")
    assert bank.places["layers.0.blocks.0.attn.qkv.weight"] == str(Layout(0, False))
    for n, size in ((2, 64), (3, 96)):
        batch, names = (images(size, n),), ["c", "b", "a"][:n]
        with torch.no_grad(), bank[names]:
            mixed = run(base, batch)
        assert difference(mixed, one_by_one(base, paths, names, batch)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("Conformer", "all"),
        ("Wav2Vec2", "all"),
        ("WavLM", "auto"),
        ("WavLM", "all"),  # one table of positions for all items: attention runs in groups
        ("Emformer", "auto"),
        ("DeepSpeech", "all"),
    ],
)
def test_sound(name, chosen, tmp_path):
    base, batch = build(name)
    check(base, tmp_path, batch, names=["b", "c"], target_modules=chosen)


def test_time_is_not_taken_for_the_batch_when_both_are_of_one_size(tmp_path):
    """PEFT is silently wrong here."""
    base, _ = build("Conformer")
    x, lengths = torch.randn(5, 5, 16), torch.full((5,), 5)
    bank, paths = check(base, tmp_path, (x, lengths))
    assert bank.places["conformer_layers.0.ffn1.sequential.1.weight"] == str(Layout(1, None))
    attention = bank.places["conformer_layers.0.self_attn.out_proj.weight"]
    assert attention == "in groups, by conformer_layers.0.self_attn"  # torch's, of one function
    batch = (torch.randn(2, 9, 16), torch.tensor([9, 4]))
    with torch.no_grad(), bank[["c", None]]:
        mixed = run(base, batch)
    assert difference(mixed, one_by_one(base, paths, ["c", None], batch)) <= 1e-5


class Moved(nn.Module):
    """Two layers with the items in other dimensions: T first, or flattened with it."""

    def __init__(self, place: str):
        super().__init__()
        self.place, self.wide, self.narrow = place, nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        if self.place != "items first":
            x = x.transpose(0, 1)
        y = x.flatten(0, 1) if self.place == "flattened" else x
        y = self.narrow(self.wide(y).tanh()).view(x.shape)
        return y if self.place == "items first" else y.transpose(0, 1)


@pytest.mark.parametrize("place", ["items first", "time first", "flattened"])
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("form", [{}, {"dora": True}, {"trainable": ["biases"]}])
def test_items_one_by_one_and_all_at_once_agree(place, joined, form, tmp_path, monkeypatch):
    """Where it is faster, each item has a product of its own: on a CPU, without a graph."""
    monkeypatch.setattr(products, "_WORTH_A_CALL", 0 if joined else 10**9)
    calls = []
    inner = products._item_by_item
    monkeypatch.setattr(products, "_item_by_item", lambda *a: (calls.append(1), inner(*a)))
    torch.manual_seed(0)
    base, x = Moved(place), torch.randn(5, 7, 8)
    bank, paths = check(base, tmp_path, x, target_modules="all", **form)
    assert len(calls) == (2 if joined else 0)
    with torch.enable_grad(), bank[NAMES]:
        recorded = base(x)
    assert difference([recorded], one_by_one(base, paths, NAMES, (x,))) <= 1e-5
    assert len(calls) == (2 if joined else 0)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("kind", ZOO)
def test_every_kind_of_layer(kind, tmp_path):
    make, x = ZOO[kind]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = nn.Sequential(make())
    x = torch.cat([x, x.flip(-1), x[:1]])
    with torch.no_grad():
        base(x)  # the old weight norm's hook keeps what it computed, which must be no graph
    options = {"target_modules": ["*pos_embed"] if targets(kind) == "pos_embed" else "all"}
    dims = None
    if kind in ("LSTM", "LSTM projected", "GRU", "RNN"):
        # The last state is (layers, n, H).
        dims = [0] + [1] * (2 if kind.startswith("LSTM") else 1)
    check(base, tmp_path, x, dims=dims, **options)


@pytest.mark.parametrize(
    ("model", "form"),
    [
        ("vit", {"dora": True}),
        ("vit", {"xs": True}),
        ("vit", {"init": "pissa"}),
        ("vit", {"trainable": ["biases", "norms"]}),
        ("efficientnet", {"dora": True, "target_modules": "all"}),
        ("efficientnet", {"trainable": ["head", "norms"]}),
    ],
)
def test_every_form_of_adapter(model, form, tmp_path):
    make, size, _ = IMAGES[model]
    torch.manual_seed(0)
    check(make(), tmp_path, images(size), **form)


def test_forms_and_targets_differ_between_adapters(tmp_path):
    each = (
        {"dora": True, "target_modules": "attn.*"},
        {"target_modules": ["mlp.*", "head"], "trainable": ["norms"]},
        {"trainable": ["head"], "init": "olora"},
    )
    check(tiny_vit(), tmp_path, images(32), each=each)


def test_what_all_items_share_runs_in_groups(tmp_path):
    base = tiny_vit()
    bank, _ = check(base, tmp_path, images(32), trainable=["pos_embed"])
    assert bank.places["pos_embed"] == "in groups, by the whole model"


def test_one_name_for_all_needs_no_probe_and_none_is_the_source(tmp_path):
    base, x = tiny_vit(), images(32)
    paths = write(base, tmp_path)
    bank = AdapterBank(base, paths)
    with torch.no_grad():
        source = base(x)
        for names in ("b", ["b"] * 5):
            with bank[names]:
                alone = base(x)
            assert difference([alone], one_by_one(base, paths, ["b"] * 5, (x,))) <= 1e-5
        for names in (None, [None] * 5):
            with bank[names]:
                assert torch.equal(base(x), source)
    assert not bank.places
    assert not torch.equal(alone, source)


def test_a_model_with_adapters_of_its_own(tmp_path):
    base, x = tiny_vit(), images(32)
    paths = write(base, tmp_path, trainable=["head"])
    plain = copy.deepcopy(base)
    load_adapter(base, paths["a"], "own")
    bank = AdapterBank(base, paths)
    with torch.no_grad():
        own = base(x)
        with bank[NAMES]:
            mixed = base(x)
        assert torch.equal(base(x), own)
    assert difference([mixed], one_by_one(plain, paths, NAMES, (x,))) <= 1e-5
    merge(base)
    with pytest.raises(AdapterError, match="unmerge"), bank[NAMES]:
        pass


def test_inputs_get_gradients(tmp_path):
    base, x = tiny_vit().requires_grad_(False), images(32).requires_grad_()
    paths = write(base, tmp_path)
    bank = AdapterBank(base, paths)
    with bank[NAMES]:
        base(x).square().sum().backward()
    alone = copy.deepcopy(base)
    load_adapter(alone, paths["c"])
    one = x.detach()[3:4].requires_grad_()
    alone(one).square().sum().backward()
    assert difference([x.grad[3:4]], [one.grad]) <= 1e-4


def test_autocast_computes_in_its_precision(tmp_path):
    base, x = tiny_vit(), images(32)
    paths = write(base, tmp_path)
    bank = AdapterBank(base, paths, example=x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with bank[NAMES]:
            mixed = base(x)
        expected = one_by_one(base, paths, NAMES, (x,))
    assert mixed.dtype == torch.bfloat16
    assert difference([mixed.float()], [expected[0].float()]) < 0.05


def test_a_model_moved_to_another_precision(tmp_path):
    base, x = tiny_vit(), images(32)
    paths = write(base, tmp_path)
    bank = AdapterBank(base, paths, check="structure")
    with torch.no_grad(), bank[NAMES]:
        base(x)
    base.double()
    with torch.no_grad(), bank[NAMES]:
        mixed = base(x.double())
    assert mixed.dtype == torch.float64
    assert difference([mixed], one_by_one(base, paths, NAMES, (x.double(),))) <= 1e-12


def test_swapping_does_not_recompile(tmp_path):
    from torch._dynamo.testing import CompileCounter

    base = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Flatten(2), nn.Linear(49, 5)).eval()
    x = images(16, 4)
    bank = AdapterBank(base, write(base, tmp_path), example=x)
    counter = CompileCounter()
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    for names in (["a", "b", "c", "a"], ["c", None, "a", "b"], ["b", "c", "c", "a"]):
        with torch.no_grad(), bank[names]:
            assert difference([compiled(x)], [base(x)]) <= 1e-6
    assert counter.frame_count == 1
