"""Loading over an adapter equals removing it and loading."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from lora_lightning import (
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_active,
    unmerge,
)
from lora_lightning.errors import AdapterError, AdapterFileError
from lora_lightning.lora.factors import Factors
from lora_lightning.model.adapter_file.format import read
from lora_lightning.model.state import named_factors, state_of
from lora_lightning.model.view import View
from tests.helpers.training import tiny_vit

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
KINDS = {
    "plain": {},
    "dropout": {"dropout": 0.1},
    "DoRA": {"dora": True},
    "A frozen": {"freeze_a": True},
    "start kept aside": {"init": "pissa"},
    "core alone": {"xs": True},
    "other scaling": {"scaling": "alpha/sqrt(r)", "alpha": 3.0},
    "without head": {"trainable": []},
    "head and norms": {"trainable": ["head", "norms"]},
}


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit()


def trained(base: nn.Module, seed: int, path, **options):
    """The file of an adapter that training moved everything of."""
    model = copy.deepcopy(base)
    inject(model, **{"rank": 2, "seed": seed, "name": "alice", **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return save_adapter(model, path)


@pytest.fixture
def files(base, tmp_path):
    """From two sets of options to the files of two adapters."""

    def make(one: dict, two: dict):
        first = trained(base, 1, tmp_path / "one.safetensors", **one)
        return first, trained(base, 2, tmp_path / "two.safetensors", **two)

    return make


def loaded(base: nn.Module, file) -> nn.Module:
    model = copy.deepcopy(base)
    load_adapter(model, file)
    return model


def ways(model: nn.Module, file, name: str = "alice") -> tuple[nn.Module, nn.Module]:
    """The file loaded in the adapter's place, and after the adapter was removed."""
    other = copy.deepcopy(model)
    load_adapter(model, file, name, overwrite=True)
    remove(other, name)
    load_adapter(other, file, name)
    return model, other


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def everything(model: nn.Module) -> dict[str, object]:
    """All that decides what the model does from here on, to be compared by `==`."""
    state, layers = state_of(model), View(model).adapted
    assert state is not None
    return {
        "state dict": {k: raw(v) for k, v in model.state_dict().items()},
        "keys": list(model.state_dict()),
        "parameters": [(n, p.requires_grad, p.dtype) for n, p in model.named_parameters()],
        "gradients": [n for n, p in parameters(model).items() if p.grad is not None],
        "classes": [(n, type(m)) for n, m in model.named_modules()],
        "modes": [(n, m.training) for n, m in model.named_modules() if isinstance(m, Factors)],
        "specs": [
            (n, m.spec, m.matrix) for n, m in model.named_modules() if isinstance(m, Factors)
        ],
        "active": {n: m.lora_active for n, m in layers.items()},
        "adapters": list(state.configs),
        "source": {n: raw(value) for n, (_, value) in state.source.items()},
        "parked": {a: {n: raw(v) for n, v in p.items()} for a, p in state.parked.items()},
        "state": replace(state, source={}, parked={}, chosen=(0, {})),
        "output": [raw(model(X))] if not model.training else [],
    }


def same(one: nn.Module, two: nn.Module) -> None:
    a, b = everything(one), everything(two)
    for key in a:
        assert a[key] == b[key], key
    for name in list(a["adapters"]):  # and once more without each other's
        set_active(one, name)
        set_active(two, name)
        assert everything(one)["state dict"] == everything(two)["state dict"]
    remove(one)
    remove(two)
    assert [(n, p.requires_grad) for n, p in one.named_parameters()] == [
        (n, p.requires_grad) for n, p in two.named_parameters()
    ]
    assert torch.equal(one.eval()(X), two.eval()(X))


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".lora." in n}


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        *((kind, False) for kind in KINDS),
        *(
            pytest.param(kind, True, marks=[] if kind in ("dropout", "DoRA") else pytest.mark.slow)
            for kind in KINDS
        ),
    ],
)
def test_one_of_the_same_layers_and_sizes(base, files, kind, training):
    first, second = files(KINDS[kind], KINDS[kind])
    model = loaded(base, first).train(training)
    before, modules = parameters(model), list(model.modules())
    model(X).sum().backward()
    replaced, reloaded = ways(model, second)
    assert list(map(id, replaced.modules())) == list(map(id, modules))
    assert all(parameters(replaced)[n] is p for n, p in before.items())
    assert len(before) >= 8
    same(replaced, reloaded)


OTHERS = {
    "another rank": ({}, {"rank": 3}),
    "other layers": ({}, {"target_modules": "attn.qkv"}),
    "more layers": ({"target_modules": "attn.qkv"}, {}),
    "DoRA for plain": ({}, {"dora": True}),
    "plain for DoRA": ({"dora": True}, {}),
    "a core for factors": ({}, {"xs": True}),
    "factors for a core": ({"xs": True}, {}),
    "a start kept aside": ({}, {"init": "olora"}),
    "A frozen": ({}, {"freeze_a": True}),
    "A no more frozen": ({"freeze_a": True}, {}),
    "another head": ({"trainable": []}, {"trainable": ["head"]}),
    "no head": ({"trainable": ["head"]}, {"trainable": []}),
    "dropout": ({}, {"dropout": 0.5}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_one_that_differs(base, files, case):
    first, second = files(*OTHERS[case])
    model = loaded(base, first).eval()
    same(*ways(model, second))


@pytest.mark.parametrize("active", ["alice", "bob", None])
def test_one_of_several(base, files, active):
    first, second = files({}, {})
    model = copy.deepcopy(base).eval()
    inject(model, rank=1, name="bob", trainable=["norms"], seed=3)
    load_adapter(model, first)
    inject(model, rank=1, name="carol", seed=4)
    set_active(model, active)
    same(*ways(model, second))


def test_an_adapter_whose_base_trains(base, files):
    first, second = files({}, {})
    model = copy.deepcopy(base).eval()
    inject(model, rank=2, name="alice", freeze=False, seed=5)
    same(*ways(model, second))
    model = copy.deepcopy(base).eval()
    inject(model, rank=2, name="bob", freeze=False, seed=5)
    load_adapter(model, first)
    same(*ways(model, second))


def half(model: nn.Module) -> None:
    for factors in named_factors(model, "alice").values():
        for tensor in factors.tensors().values():  # their own `bfloat16` leaves them in float32
            tensor.data = tensor.data.bfloat16()


def eval_one(model: nn.Module) -> None:
    next(iter(named_factors(model, "alice").values())).train(not model.training)


def frozen(model: nn.Module) -> None:
    for parameter in parameters(model).values():
        parameter.requires_grad_(False)


def resized(model: nn.Module) -> None:
    for factors in named_factors(model, "alice").values():
        factors.resize(1, 1.0)


def merged_and_back(model: nn.Module) -> None:
    merge(model)
    unmerge(model)


@pytest.mark.parametrize("change", [half, eval_one, frozen, resized, merged_and_back])
def test_whatever_was_done_to_the_old_one(base, files, change):
    first, second = files({"trainable": []}, {"trainable": []})
    model = loaded(base, first).eval()
    change(model)
    same(*ways(model, second))


def test_a_model_in_another_precision(base, files):
    first, second = files({}, {})
    model = loaded(base, first).eval()
    replaced, reloaded = ways(model.bfloat16(), second)
    found, expected = replaced.state_dict(), reloaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    wide = {t.dtype for key, t in found.items() if ".lora." in key}
    assert wide == {torch.float32}
    assert {t.dtype for key, t in found.items() if ".lora." not in key} == {torch.bfloat16}


def test_factors_made_in_inference_mode_are_made_anew(base, files):
    first, second = files({}, {})
    model, expected = copy.deepcopy(base), copy.deepcopy(base)
    with torch.inference_mode():
        load_adapter(model, first)
    load_adapter(model, second, "alice", overwrite=True)
    load_adapter(expected, second, "alice")
    assert torch.equal(model(X), expected(X))


def test_a_merged_model_is_left_alone(base, files):
    first, second = files({}, {})
    model = loaded(base, first).eval()
    merge(model)
    output = model(X)
    with pytest.raises(AdapterError, match="unmerge"):
        load_adapter(model, second, "alice", overwrite=True)
    assert torch.equal(model(X), output)


def test_an_optimizer_goes_on_with_the_new_values(base, files):
    first, second = files({"trainable": []}, {"trainable": []})
    model = loaded(base, first)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).square().sum().backward()
    load_adapter(model, second, "alice", overwrite=True)
    values = {n: p.detach().clone() for n, p in parameters(model).items()}
    optimizer.step()  # the old gradients are void
    assert all(torch.equal(p, values[n]) for n, p in parameters(model).items())
    model(X).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, values[n]) for n, p in parameters(model).items())


def test_values_are_the_models_own(base, files):
    """Neither the old adapter's copies nor the file follow."""
    first, second = files({}, {})
    model = loaded(base, first).eval()
    ema, data = copy.deepcopy(model), second.read_bytes()
    before = ema(X)
    load_adapter(model, second, "alice", overwrite=True)
    output = model(X)
    assert torch.equal(ema(X), before)
    with torch.no_grad():
        for parameter in parameters(model).values():
            parameter.add_(1)
    assert second.read_bytes() == data
    load_adapter(model, second, "alice", overwrite=True)
    assert torch.equal(model(X), output)
    # Each in memory of its own, so that saving one does not save all.
    sizes = [p.untyped_storage().nbytes() - p.nbytes for p in parameters(model).values()]
    assert set(sizes) == {0}


# Bytes of files: safetensors is the judge of what may be read.


def laid_out(change):
    """A small file whose entries and bytes `change(entries, data)` has changed."""

    def make(path):
        raw = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, {"lora_lightning": "x"})
        size = 8 + int.from_bytes(raw[:8], "little")
        entries, data = json.loads(raw[8:size]), raw[size:]
        entries, data = change(entries, data) or (entries, data)
        head = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        head += b" " * (-len(head) % 8)
        path.write_bytes(len(head).to_bytes(8, "little") + head + data)

    return make


def setting(name: str, **fields):
    return laid_out(lambda entries, data: entries[name].update(fields))


def written(change):
    """With the header's bytes changed by `change`."""

    def whole(entries, data):
        return change(json.dumps(entries).encode()), data

    return laid_out(whole)


LAYOUTS = {
    "nothing": laid_out(lambda e, d: None),
    "a hole": setting("b", data_offsets=[28, 44]),
    "an overlap": setting("b", data_offsets=[20, 36]),
    "the same bytes twice": setting("b", data_offsets=[0, 24], shape=[6]),
    "too long for its shape": setting("a", shape=[2, 2]),
    "too short for its shape": setting("a", shape=[2, 4]),
    "another type": setting("a", dtype="F64"),
    "an unknown type": setting("a", dtype="F33"),
    "integers": setting("a", dtype="I32"),
    "halves": setting("a", dtype="BF16", shape=[2, 6]),
    "negative sizes": setting("a", shape=[-2, -3]),
    "sizes that are no whole numbers": setting("a", shape=[2.0, 3.0]),
    "a size that is no whole number": setting("a", shape=[2, 3.0]),
    "a size that is true": setting("a", shape=[6, True]),
    "sizes that are texts": setting("a", shape=["2", "3"]),
    "no size": setting("a", shape=None),
    "offsets that are no whole numbers": setting("a", data_offsets=[0.0, 24.0]),
    "offsets the wrong way": setting("a", data_offsets=[24, 0]),
    "one offset": setting("a", data_offsets=[0]),
    "three offsets": setting("a", data_offsets=[0, 24, 24]),
    "negative offsets": setting("a", data_offsets=[-24, 0]),
    "empty": setting("b", shape=[0], data_offsets=[24, 24]),
    "a scalar too many": setting("b", shape=[], data_offsets=[24, 28]),
    "an entry that is a list": laid_out(lambda e, d: e.update(b=[])),
    "an entry of nothing": laid_out(lambda e, d: e.update(b={})),
    "other order": laid_out(lambda e, d: (dict(reversed(e.items())), d)),
    "bytes left over": laid_out(lambda e, d: (e, d + b"0000")),
    "bytes missing": laid_out(lambda e, d: (e, d[:-4])),
    "no bytes": laid_out(lambda e, d: (e, b"")),
    "metadata that is no text": laid_out(lambda e, d: e.update(__metadata__={"lora_lightning": 1})),
    "metadata that is a list": laid_out(lambda e, d: e.update(__metadata__=[])),
    "no tensors": laid_out(lambda e, d: ({"__metadata__": e["__metadata__"]}, b"")),
    "a list": written(lambda text: b"[" + text + b"]"),
    "two things": written(lambda text: text + text),
    "half a header": written(lambda text: text[:-9]),
    "space first": written(lambda text: b" " + text),
    "another encoding": written(lambda text: text.decode().encode("utf-16")),
    "no text": written(lambda text: text.replace(b'"x"', b'"\xff\xfe"')),
    "deep": written(lambda text: b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "no number": written(lambda text: text.replace(b"24", b"NaN")),
    "false for zero": setting("a", data_offsets=[False, 24]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_read_that_safetensors_refuses(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(
        "lora_lightning.model.adapter_file.format._parse", lambda metadata, path: metadata
    )
    path = tmp_path / "a.safetensors"
    LAYOUTS[layout](path)
    try:
        expected = load_file(path)
    except SafetensorError:
        with pytest.raises(AdapterFileError, match="damaged or no safetensors"):
            read(path)
        return
    header, found = read(path)
    assert header == {"lora_lightning": "x"}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_both_verdicts_occur(tmp_path):
    refused = set()
    for name, make in LAYOUTS.items():
        make(tmp_path / "a")
        try:
            load_file(tmp_path / "a")
        except SafetensorError:
            refused.add(name)
    assert 20 < len(refused) < len(LAYOUTS) - 3
