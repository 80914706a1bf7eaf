"""Ranks and initial factors from the trainer's own batches, by whatever module a user wrote."""

from __future__ import annotations

from collections import namedtuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning import FitGuard, LoRACallback, inject
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.lora.factors import Factors
from tests.helpers.detectors import Detection, boxes, faster_rcnn, retinanet
from tests.helpers.training import trainer

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
Item = namedtuple("Item", ["image", "label"])
loss_of = nn.functional.cross_entropy


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


class Named(nn.Module):
    """Takes its input by name alone, and a scale."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, *, image, label=None):
        return self.net(image)


class Loss(nn.Module):
    """Gives the loss alone in training."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, y=None):
        found = self.net(x)
        return {"loss": loss_of(found, y)} if self.training else {"logits": found}


class Decider(nn.Module):
    """Gives classes in eval mode."""

    def __init__(self, decide=lambda y: y.argmax(1)):
        super().__init__()
        self.net, self.decide = net(), decide

    def forward(self, x):
        found = self.net(x)
        return found if self.training else self.decide(found)


class Base(pl.LightningModule):
    """Has no forward, as README's."""

    def __init__(self, network=None):
        super().__init__()
        self.model = network or net()

    def configure_optimizers(self):  # the factors stay those that the fit started with
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


class Plain(Base):
    def training_step(self, batch, batch_idx):
        return loss_of(self.model(batch[0]), batch[1])


class OneArgument(Base):
    def training_step(self, batch):
        return loss_of(self.model(batch[0]), batch[1])

    def predict_step(self, batch):
        return self.model(batch[0])


class Iterator(Base):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return loss_of(self.model(batch[0]), batch[1])


class OfDicts(Base):
    def forward(self, batch):
        return self.model(batch["image"])

    def training_step(self, batch, batch_idx):
        return loss_of(self(batch), batch["label"])


class HandsOn(Base):
    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return loss_of(self(image=batch["image"]), batch["label"])


class OfTuples(Base):
    def training_step(self, batch, batch_idx):
        return loss_of(self.model(batch.image), batch.label)


class OfLoss(Base):
    def training_step(self, batch, batch_idx):
        return self.model(*batch)["loss"]


class OfTwo(Base):
    def training_step(self, batch, batch_idx):
        return loss_of(self.model(batch["a"][0]), batch["a"][1])


def batches(make=lambda x, y: (x, y)):
    return DataLoader([make(x, y) for x, y in zip(X, Y, strict=True)], 4)


def dicts():
    return batches(lambda x, y: {"image": x, "label": y})


def two():
    return CombinedLoader({"a": batches(), "b": batches()})


OF_A = {"forward": lambda model, batch: model(batch["a"][0])}
IMAGE = {"forward": lambda model, batch: model(batch["image"])}
MODULES = {
    "README's": (Plain, batches, {}),
    "steps of one argument": (OneArgument, batches, {}),
    "a step that is given an iterator": (Iterator, batches, {}),
    "a forward of a whole dict": (OfDicts, dicts, {}),
    "a forward that hands on names": (lambda: HandsOn(Named()), dicts, {}),
    "named tuples": (OfTuples, lambda: batches(Item), {}),
    "a network that gives its loss in training": (lambda: OfLoss(Loss()), batches, {}),
    "a network that gives classes in eval": (lambda: Plain(Decider()), batches, {}),
    "two loaders": (OfTwo, two, OF_A),
    "a dict of loaders": (OfTwo, lambda: {"a": batches(), "b": batches()}, OF_A),
}


def started(tmp_path, module, data, init, **options):
    given = {
        "rank": "explained-variance",
        "max_rank": 2,
        "target_modules": "all",
        "trainable": [],
        **options,
    }
    callback = LoRACallback(init=init, verify=False, **given)
    trainer(tmp_path, callback, max_epochs=1).fit(module, data)
    return [p for m in module.modules() if isinstance(m, Factors) for p in m.parameters()]


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter`")
@pytest.mark.parametrize("init", ["eva", "lora-ga"])
@pytest.mark.parametrize("kind", MODULES)
def test_whatever_the_module_the_start_is_that_of_the_plain_one(kind, init, tmp_path):
    make, data, options = MODULES[kind]
    found = started(tmp_path, make(), data(), init, **options)
    wanted = started(tmp_path, Plain(), batches(), init)
    assert len(found) == len(wanted) == 6
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("init", ["eva", "lora-ga"])
@pytest.mark.parametrize("make", [retinanet, faster_rcnn])
def test_detectors_start_from_their_data(make, init, tmp_path):
    options = {"exclude_modules": ["backbone"], "max_rank": 2}
    assert started(tmp_path, Detection(make()), boxes(), init, **options)


def test_what_a_module_does_not_say_is_asked_for(tmp_path):
    class Asks(Base):
        def training_step(self, batch, batch_idx):
            return loss_of(self.model(batch["image"]), batch["label"])

    with pytest.raises(DataError, match=r"(?s)keys \('image', 'label'\), was given.*Pass forward="):
        started(tmp_path, Asks(), dicts(), "eva")
    assert started(tmp_path, Asks(), dicts(), "eva", **IMAGE)
    with pytest.raises(ConfigError, match=r"several training loaders.*data=.*forward="):
        started(tmp_path, OfTwo(), two(), "eva")


@pytest.mark.filterwarnings("ignore:FitGuard. the source model is kept")
def test_held_out_losses_of_detectors_are_those_of_training_mode(tmp_path):
    module, guard = Detection(retinanet()), FitGuard(boxes())
    lora = LoRACallback(rank=1, target_modules=["head.*"], trainable=[], verify=False)
    items = [boxes().collate_fn([item]) for item in boxes().dataset]
    with torch.no_grad():
        wanted = sum(float(module.training_step(item, 0)) for item in items) / len(items)
    trainer(tmp_path, lora, guard, max_epochs=1).fit(module, boxes())
    assert guard.history_[0].held_out == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_a_batch_without_items_tells_nothing(init):
    found = []
    for batches in ([X], [X[:0], X]):
        model = net()
        inject(model, rank=2, init=init, target_modules="all", trainable=[], seed=0, data=batches)
        found.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*found)
