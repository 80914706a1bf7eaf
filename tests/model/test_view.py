"""`View`: its contents always equal those of the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_lightning import (
    adapters,
    combine,
    compress,
    disabled,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_active,
    shrink,
    unmerge,
    verify,
)
from lora_lightning.model.view import View
from tests.helpers.training import tiny_vit

KEPT = ("modules", "tensors", "parameters", "structure")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def same(one, other) -> bool:
    """Whether these hold the same objects, in the same order, under the same names."""
    if isinstance(one, int):
        return one == other
    pairs = [list(v.items()) if isinstance(v, dict) else v for v in (one, other)]
    return [(n, id(x)) for n, x in pairs[0]] == [(n, id(x)) for n, x in pairs[1]]


@pytest.fixture
def watched(monkeypatch):
    """Compare all that is read of a view with a fresh one; counts the reads."""
    reads = []

    def watch(name: str) -> None:
        look = View.__dict__[name].func

        def read(view: View):
            kept = view.__dict__.setdefault(f"kept {name}", look(view))
            assert same(kept, look(View(view.model))), f"{name} is stale"
            reads.append(name)
            return kept

        monkeypatch.setattr(View, name, property(read))

    for name in KEPT:
        watch(name)
    return reads


def test_no_operation_reads_a_stale_view(watched, tmp_path):
    model = tiny_vit()
    inject(model, rank=2, name="a", trainable=["head", "norms"])
    model.load_state_dict(model.state_dict())
    inject(model, rank=1, name="b", init="pissa")
    path = save_adapter(model, tmp_path / "b.safetensors")
    set_active(model, "a")
    combine(model, {"a": 0.5, "b": 0.5}, "c")
    load_adapter(model, path, "d")
    load_adapter(model, path, "d", overwrite=True)
    load_adapter(model, path, "c", overwrite=True)
    set_active(model, None)
    set_active(model, "b")
    compress(model, rank=1)
    shrink(model, 0.5)
    merge(model)
    with disabled(model):
        pass
    save_adapter(model, tmp_path / "merged.safetensors", "a")
    unmerge(model)
    verify(model, torch.randn(2, 3, 32, 32), raise_on_failure=False)
    merge(model)
    remove(model, "a")
    remove(model)
    assert not adapters(model)
    assert set(watched) == set(KEPT)
    assert len(watched) > 100


def test_the_watch_notices_a_stale_view(watched):
    model = network()
    view = View(model)
    assert view.tensors
    assert view.modules
    model[3].weight = nn.Parameter(torch.zeros(3, 6))
    with pytest.raises(AssertionError, match="tensors is stale"):
        assert view.tensors
    model[3] = nn.Identity()
    with pytest.raises(AssertionError, match="modules is stale"):
        assert view.modules


def test_what_it_keeps_is_the_base_alone():
    model = network()
    view, names = View(model), [n for n, _ in model.named_modules()]
    assert [n for n, _ in view.modules] == names
    assert view.tensors.keys() == model.state_dict().keys()
    assert view.parameters.keys() == dict(model.named_parameters()).keys()
    for name in ("a", "b"):
        inject(model, rank=1, name=name, target_modules="all")
    for each in (view, View(model)):
        assert [n for n, _ in each.modules] == names
        assert same(each.tensors, view.tensors)
        assert each.structure == view.structure


def test_it_tells_what_is_adapted_and_merged_now():
    model = network()
    view = View(model)
    assert not view.adapted
    assert not view.merged
    inject(model, rank=1, target_modules=["0"])
    assert list(view.adapted) == ["0"]
    assert view.adapted["0"] is model[0]
    merge(model)
    assert not view.adapted
    assert list(view.merged) == ["0"]
    unmerge(model)
    remove(model)
    assert not view.adapted
    assert not view.merged


def test_a_view_is_handed_on_as_it_is():
    view = View(network())
    assert View.of(view) is view
    assert View.of(view.model).model is view.model
