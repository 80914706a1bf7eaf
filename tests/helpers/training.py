"""A tiny network, data, a LightningModule and a Trainer, all real, all quick."""

from __future__ import annotations

import copy
import warnings

import lightning.pytorch as pl
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoRACallback
from lora_lightning.lora.factors import Factors


def tiny_vit(classes: int = 4) -> nn.Module:
    """A real timm ViT: 2 blocks, 32 pixels."""
    return timm.create_model(
        "test_vit", img_size=32, patch_size=8, depth=2, num_classes=classes
    ).eval()


class Module(pl.LightningModule):
    """What a user writes: a network called `model`, a loss, an optimizer."""

    def __init__(self, model: nn.Module | None = None, lr: float = 1e-2):
        super().__init__()
        self.model = model if model is not None else tiny_vit()
        self.lr = lr

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0
        )


class TwoBackbones(Module):
    """With a second network beside `model`."""

    def __init__(self):
        super().__init__()
        self.second = tiny_vit()

    def forward(self, x):
        return self.model(x) + self.second(x)


class Losses(Module):
    """Records its losses."""

    def __init__(self, model: nn.Module | None = None, lr: float = 1e-2):
        super().__init__(model, lr)
        self.losses: list[float] = []
        self.val_losses: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.val_losses.append(nn.functional.cross_entropy(self(x), y).item())


class Late(Module):
    """A module that builds its network in `configure_model`."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.model = None

    def configure_model(self):
        self.model = self.model or tiny_vit()


def fresh(seed: int = 0, **options) -> Module:
    """Always the same for a seed."""
    torch.manual_seed(seed)
    return Module(**options)


def alike(count: int) -> list[Module]:
    """Modules with the same weights."""
    model = tiny_vit()
    return [Module(copy.deepcopy(model)) for _ in range(count)]


def lora(**options) -> LoRACallback:
    """A callback of rank 2."""
    return LoRACallback(**{"rank": 2, "seed": 0, **options})


def loader(items: int = 8, size: int = 32, classes: int = 4, batch: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(items, 3, size, size, generator=generator)
    y = torch.arange(items) % classes
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def bright(
    items: int = 16, seed: int = 1, shape: tuple[int, ...] = (3, 32, 32), batch: int = 8
) -> DataLoader:
    """Inputs whose mean is their class, which can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(items) % 4
    x = 0.3 * torch.randn(items, *shape, generator=generator)
    x += (y - 1.5).view(-1, *[1] * len(shape))
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def trainer(tmp_path, *callbacks, **options) -> pl.Trainer:
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})


def fitted(tmp_path, module, *callbacks, data=None, held_out=None, ckpt=None, **options):
    """The trainer, after a fit with these callbacks."""
    t = trainer(tmp_path, *callbacks, **options)
    t.fit(module, loader() if data is None else data, held_out, ckpt_path=ckpt)
    return t


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def saved(checkpoint: dict, part: str = "state_dict") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, without what names the base that is left out."""
    return {k: v for k, v in checkpoint[part].items() if isinstance(v, torch.Tensor)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@torch.no_grad()
def randomise(model: nn.Module, std: float = 0.1, seed: int = 0) -> None:
    """Give every B random values, so that adapters have an effect."""
    generator = torch.Generator().manual_seed(seed)
    for factors in (m for m in model.modules() if isinstance(m, Factors)):
        factors.lora_B.copy_(std * torch.randn(factors.lora_B.shape, generator=generator))
