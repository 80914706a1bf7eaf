"""State dicts hold what a fresh model needs, or are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_lightning import inject, merge, remove, unmerge
from lora_lightning.errors import AdapterError
from lora_lightning.model.probing import difference
from tests.helpers.networks import Tied
from tests.helpers.training import randomise


class Normed(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def normed() -> nn.Module:
    model = Normed()
    inject(model, rank=2, target_modules="all", trainable=[], seed=0)
    return model


@pytest.mark.parametrize("left_out", [["running_mean", "running_var"], ["running_var"]])
def test_moved_statistics_are_missed_where_a_filter_left_them_out(left_out):
    model, x = normed(), torch.randn(8, 6)
    model.train()(x + 3)
    buffers = dict(model.named_buffers())
    kept = {n: t for n, t in model.state_dict().items() if "lora" in n or n in buffers}
    fresh = normed()
    fresh.load_state_dict(kept)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    part = {n: t for n, t in kept.items() if n.rpartition(".")[2] not in left_out}
    with pytest.raises(RuntimeError, match=rf"Missing key\(s\).*1\.{left_out[0]}"):
        normed().load_state_dict(part)


@pytest.mark.parametrize("targets", [["head"], ["embed"], ["embed", "head"], "auto", ["middle"]])
def test_merged_ties_are_not_saved_into_a_model_that_ties_again(targets):
    model, x = Tied(), torch.arange(9)
    adapted = {row.module for row in inject(model, rank=2, target_modules=targets).rows}
    if targets == "auto":
        assert adapted == {"middle"}, "an output layer tied to an embedding"
    randomise(model)
    expected = model(x)
    assert model.state_dict()
    merge(model)
    assert difference([model(x)], [expected]) < 1e-5
    if adapted == {"middle"}:
        fresh = Tied()
        fresh.load_state_dict(model.state_dict())
        assert difference([fresh(x)], [expected]) < 1e-5
    else:
        with pytest.raises(AdapterError, match=r"was tied to .*unmerge\(model\)"):
            model.state_dict()
        unmerge(model)
    assert model.state_dict()
    remove(model)
    assert not model._state_dict_pre_hooks
