"""torchvision's detectors, tiny."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign


def _settings():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 32, 8, stride=8), nn.ReLU())
    backbone.out_channels = 32
    sizes = {"min_size": 32, "max_size": 32, "num_classes": 2}
    return backbone, AnchorGenerator(((16,),), ((1.0,),)), sizes


def retinanet() -> nn.Module:
    backbone, anchors, sizes = _settings()
    return RetinaNet(backbone, anchor_generator=anchors, **sizes)


def faster_rcnn() -> nn.Module:
    backbone, anchors, sizes = _settings()
    head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 4, 8), nn.ReLU())
    predictor = FastRCNNPredictor(8, sizes.pop("num_classes"))
    return FasterRCNN(
        backbone, rpn_anchor_generator=anchors, box_head=head, box_predictor=predictor,
        box_roi_pool=MultiScaleRoIAlign(["0"], 2, 2), **sizes,
    )  # fmt: skip


def boxes() -> DataLoader:
    """Pictures with a box each, in the form that detectors take."""
    generator = torch.Generator().manual_seed(0)
    target = {"boxes": torch.tensor([[4.0, 4.0, 24.0, 24.0]]), "labels": torch.tensor([1])}
    items = [(torch.rand(3, 32, 32, generator=generator), target) for _ in range(4)]
    return DataLoader(items, 2, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))


class Detection(pl.LightningModule):
    """What a user writes: the sum of the losses, which are there in training mode alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return sum(self.model(list(batch[0]), list(batch[1])).values())

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-4)
