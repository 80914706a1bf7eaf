"""Adapters on a generator: flow matching, its files, merging, and several domains in one batch."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import AdapterBank, LoRACallback, PrefixCache, load_adapter, merge
from lora_lightning.errors import ConfigError
from tests.helpers.training import trainer

SIZE, PATCH, DIM, CLASSES = 8, 2, 32, 3


class Velocity(nn.Module):
    """The velocity v(x, t, y) of a flow from noise to pictures of class y."""

    def __init__(self):
        super().__init__()
        self.embed = PatchEmbed(SIZE, PATCH, 3, DIM)
        self.label, self.time = nn.Embedding(CLASSES, DIM), nn.Linear(2, DIM)
        self.blocks = nn.ModuleList(Block(DIM, 2) for _ in range(2))
        self.out = nn.Linear(DIM, 3 * PATCH**2)

    def forward(self, x, t, y):
        condition = (self.label(y) + self.time(torch.stack([t.sin(), t.cos()], 1)))[:, None]
        hidden = self.embed(x) + condition
        for block in self.blocks:
            hidden = block(hidden) + condition
        return nn.functional.fold(self.out(hidden).mT, SIZE, PATCH, stride=PATCH)


class FlowMatching(LightningModule):
    """Lipman et al. 2023, "Flow matching for generative modeling", arXiv:2210.02747."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        x, y = batch
        t, noise = torch.rand(len(x)), torch.randn_like(x)
        between = torch.lerp(noise, x, t[:, None, None, None])
        return nn.functional.mse_loss(self.model(between, t, y), x - noise)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


@torch.no_grad()
def sampled(model, noise, classes, steps=4):
    for step in range(steps):
        t = torch.full((len(noise),), step / steps)
        noise = noise + model(noise, t, classes) / steps
    return noise


def fit(tmp_path, source, data, *callbacks):
    task = FlowMatching(copy.deepcopy(source))
    trainer(tmp_path, *callbacks, max_epochs=1).fit(task, DataLoader(data, 6))
    return task.model.eval()


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    return Velocity()


def test_several_domains_in_one_batch_of_samples(tmp_path, source):
    """By files of a fit that is verified; each item as by its own adapter, merged or not."""
    files, generators = {}, {}
    for seed, name in enumerate(("dim", "coloured")):
        torch.manual_seed(seed)
        data = TensorDataset(torch.randn(12, 3, SIZE, SIZE), torch.arange(12) % CLASSES)
        callback = LoRACallback(rank=2 + seed, output_dir=tmp_path / name)
        generators[name] = fit(tmp_path, source, data, callback)
        files[name] = callback.adapter_path_
    base = copy.deepcopy(source).eval()
    noise, classes = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 0])
    names = ["dim", "coloured", None, "dim"]
    with AdapterBank(base, files)[names]:
        mixed = sampled(base, noise, classes)
    for i, name in enumerate(names):
        one = copy.deepcopy(base)
        if name is not None:
            load_adapter(one, files[name])
            torch.testing.assert_close(
                sampled(one, noise, classes), sampled(generators[name], noise, classes)
            )
            merge(one)
        alone = sampled(one.eval(), noise[i : i + 1], classes[i : i + 1])
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)
        far = (alone - sampled(base, noise[i : i + 1], classes[i : i + 1])).abs().max()
        assert far > 0.1 if name else far == 0


def test_a_cache_of_the_prefix_is_refused_where_the_condition_passes_it(tmp_path, source):
    data = TensorDataset(torch.randn(12, 3, SIZE, SIZE), torch.arange(12) % CLASSES)
    with pytest.raises(ConfigError, match="used past it as well"):
        fit(tmp_path, source, data, LoRACallback(rank=2, blocks=[-1]), PrefixCache(budget_mb=8))
