"""Files of adapters, and a bank's mixed batch against one run for each adapter."""

from __future__ import annotations

import copy

import timm
import torch
from torch import nn

from lora_lightning import AdapterBank, inject, load_adapter, save_adapter
from lora_lightning.model.probing import difference, run
from tests.helpers.training import randomise, tiny_vit
from tests.model.test_every_timm import wake

NAMES = ["a", "b", None, "c", "a"]


@torch.no_grad()
def write(base: nn.Module, folder, names: str = "abc", each: tuple = (), **options):
    """Files of adapters of different ranks and scalings, whose owned tensors differ as well."""
    paths = {}
    options = {"target_modules": "all" if isinstance(base, nn.Sequential) else "auto", **options}
    for i, name in enumerate(names):
        model = copy.deepcopy(base)
        own = {"rank": 1 + i % 3, "alpha": 2.0 + i, "clamp_rank": True, "seed": i, "trainable": []}
        report = inject(model, **{**own, **options, **(each[i % len(each)] if each else {})})
        randomise(model, 0.3, seed=i)
        live = dict(model.named_parameters(remove_duplicate=False))
        for key in report.extras:
            live[key].add_(0.1 * torch.randn(live[key].shape))
        for key, value in model.named_parameters():
            if key.endswith(("magnitude", "core")):
                value.add_(0.2 * torch.rand(value.shape))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(0.1 * i)
                module.running_var.mul_(1 + 0.1 * i)
        paths[name] = save_adapter(model, folder / f"{name}.safetensors")
    return paths


def one_by_one(base: nn.Module, paths, names, batch: tuple, dims=None) -> list[torch.Tensor]:
    """Item i from a run of the whole batch with a model that has its adapter alone."""
    runs = {}
    for name in set(names):
        model = copy.deepcopy(base)
        if name is not None:
            load_adapter(model, paths[name])
        runs[name] = run(model, batch)
    found = []
    for k in range(len(runs[names[0]])):
        d = 0 if dims is None else dims[k]
        rows = [runs[name][k].select(d, i) for i, name in enumerate(names)]
        found.append(torch.stack(rows, d))
    return found


@torch.no_grad()
def check(base, folder, batch, names=NAMES, dims=None, effect: float = 1e-3, **options):
    """Mixed against one by one; the bank and its files are returned for more."""
    batch = batch if isinstance(batch, tuple) else (batch,)
    paths = write(base.eval(), folder, **options)
    before = copy.deepcopy(base.state_dict())
    classes = [type(m) for m in base.modules()]
    bank = AdapterBank(base, folder)
    with bank[names] as model:
        assert model is base
        mixed = run(model, batch)
    expected = one_by_one(base, paths, names, batch, dims)
    assert difference(mixed, expected) <= 1e-5
    assert difference(mixed, run(base, batch)) > effect
    assert [type(m) for m in base.modules()] == classes
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert not base._forward_pre_hooks
    return bank, paths


def images(size: int, n: int = len(NAMES)) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(4))


def small(name: str, **options) -> nn.Module:
    model = timm.create_model(name, num_classes=4, **options)
    wake(model)
    return model.eval()


SWIN = {"img_size": 64, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 2)}
IMAGES = {
    "vit": (tiny_vit, 32, {"target_modules": "all"}),
    "swinv2": (
        lambda: small("swinv2_tiny_window8_256", **SWIN, window_size=4),
        64,
        {"target_modules": ["qkv", "proj", "fc?"]},
    ),
    "beit": (
        lambda: small("beit_base_patch16_224", img_size=32, embed_dim=64, depth=1, num_heads=2),
        32,
        {"target_modules": "all"},
    ),
    "eva": (
        lambda: small("eva02_tiny_patch14_224", img_size=28, depth=1),
        28,
        {"target_modules": "all"},
    ),
    "efficientnet": (lambda: small("test_efficientnet"), 48, {"target_modules": "all"}),
}


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3)).eval()


def same(bank, paths, names, batch):
    """Another batch with the same bank."""
    with torch.no_grad(), bank[names] as base:
        mixed = run(base, batch)
    assert difference(mixed, one_by_one(base, paths, names, batch)) <= 1e-5


class Layer(nn.Module):
    """A linear layer to be used in some way."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 4)
