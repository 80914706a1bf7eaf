"""Networks, and source models of the suites: trained once, kept in the cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.suites.case import Case, Pictures
from benchmarks.suites.fetch import folder
from lora_lightning.runner.progress import quiet_lightning
from lora_lightning.vision.backbones import create_backbone
from lora_lightning.vision.classifier import Classifier


class Network(NamedTuple):
    """A network, and how its source model is trained."""

    timm: str
    size: int  # side of its input
    epochs: int
    rate: float
    imagenet: str = "none"
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


NETWORKS = {
    "efficientnet": Network("tf_efficientnet_lite0", 64, 8, 1e-3, "package"),
    "vit": Network("vit_tiny_patch16_224", 28, 8, 1e-3, options={"img_size": 28, "patch_size": 7}),
    "convnext": Network("convnext_atto", 32, 8, 2e-3, options={"patch_size": 2}),
}
STEPS = 90  # of the source's training at least


def networks(case: Case) -> tuple[str, ...]:
    """Those that a case is measured with: without BatchNorm where there is enough to train on."""
    return tuple(NETWORKS) if len(case.train) >= 2000 else ("efficientnet",)


def inputs(pictures: Tensor, network: str) -> Tensor:
    """Bytes (N, 3, S, S) → what the network takes."""
    size = NETWORKS[network].size
    x = pictures.float() / 127.5 - 1
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def augmentation(case: Case, network: str) -> Any:
    """Crops, and flips where a mirrored picture is of the same class."""
    size = NETWORKS[network].size
    crop = v2.RandomResizedCrop(size, (0.7, 1.0), (0.85, 1.18), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(0.5 if case.flip else 0.0)])


class Augmented(Dataset[tuple[Tensor, int]]):
    """Inputs, each changed at random, and their labels."""

    def __init__(self, items: Tensor, labels: Tensor, transform: Any):
        self.items, self.labels, self.transform = items, labels, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.items[index]), int(self.labels[index])


def created(case: Case, network: str) -> nn.Module:
    """The network before it saw the source."""
    n, classes = NETWORKS[network], len(case.classes)
    if n.options:
        model: nn.Module = timm.create_model(n.timm, num_classes=classes, **n.options)
        return model
    return create_backbone(n.timm, classes, imagenet=n.imagenet)


def trained(case: Case, network: str, model: nn.Module, on: Pictures) -> nn.Module:
    """The model, trained on labelled pictures."""
    n = NETWORKS[network]
    own = inputs(on.pictures, network)
    data = Augmented(own, on.labels, augmentation(case, network))
    loader = DataLoader(data, 32, shuffle=True, drop_last=len(data) > 32)
    pretrained = n.imagenet != "none"
    passes = 2 if pretrained and len(data) >= 2000 else n.epochs
    epochs = min(40, max(passes, -(-STEPS // len(loader))))
    with quiet_lightning():
        Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(Classifier(model, n.rate, 0.01, 0.1), loader)  # fmt: skip
    return model.eval()


def source_model(case: Case, network: str) -> nn.Module:
    """The source model of a case, from the cache if it was trained before."""
    path = folder("models") / f"{case.source}-{network}.pt"
    seed_everything(0, verbose=False)
    model = created(case, network)
    if not path.exists():
        torch.save(trained(case, network, model, case.train).state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()
