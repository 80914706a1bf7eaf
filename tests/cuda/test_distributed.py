"""DDP with one process: NCCL on the device, gloo on a CPU."""

from __future__ import annotations

import os

import pytest
import torch

from lora_lightning import FitGuard
from lora_lightning.model.state import named_factors
from tests.helpers.cuda import Recurrent, apart, fit, needs_half_recurrence
from tests.helpers.training import Losses, bright, lora, tiny_vit

pytestmark = [
    pytest.mark.cuda,
    # What torch and Lightning say of groups, barriers and devices is not about our code.
    pytest.mark.filterwarnings("ignore"),
]
OPTIONS = {
    "plain": {},
    "from data": {"rank": "explained-variance", "max_rank": 6, "rank_energy": 0.9, "init": "eva"},
    "pruned": {"rank": 4, "prune_to": 2},
    "core alone": {"rank": 4, "xs": True},
}


@pytest.fixture(autouse=True)
def _alone():
    """Lightning leaves its group and its environment behind."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", OPTIONS)
def test_one_process_is_as_none(tmp_path, name, device):
    found = []
    for strategy in ("auto", "ddp"):
        torch.manual_seed(0)
        module = Losses(tiny_vit(), lr=3e-3)
        # Else Lightning shuffles.
        options = {"strategy": strategy, "use_distributed_sampler": False, "max_epochs": 6}
        adapter = lora(output_dir=tmp_path / strategy, **OPTIONS[name])
        fit(tmp_path, device, module, adapter, **options)
        assert adapter.adapter_path_.exists()
        found.append(module)
    assert found[1].losses == pytest.approx(found[0].losses, rel=1e-3, abs=1e-4)
    ranks = [[f.spec.rank for f in named_factors(m.model, "default").values()] for m in found]
    assert ranks[0] == ranks[1]
    factors = [
        [p for f in named_factors(m.model, "default").values() for p in f.parameters()]
        for m in found
    ]
    assert apart(factors[1], factors[0]) < 5e-2


def test_mixed_precision_recurrent_layers_and_a_guard(tmp_path, device):
    needs_half_recurrence(device)
    torch.manual_seed(0)
    module = Losses(Recurrent())
    adapter = lora(target_modules="all", trainable=[])
    options = {"strategy": "ddp", "precision": "bf16-mixed", "max_epochs": 4}
    fit(tmp_path, device, module, adapter, data=bright(shape=(5, 6)), **options)
    assert module.losses[-1] < module.losses[0]
    module, guard = Losses(tiny_vit()), FitGuard()
    data, held_out = bright(32, 1), bright(12, 2)
    fit(tmp_path, device, module, lora(rank=4), guard, data=data, held_out=held_out, **options)
    assert guard.history_
