"""Classifiers of any form: several inputs, batches of any kind, outputs that hold the logits."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning import PseudoLabelCallback, SourceStatistics, TransductiveTask, inject, shift
from lora_lightning.adaptation import StreamAdapter
from lora_lightning.errors import ConfigError
from lora_lightning.model.calling import classifier
from tests.adaptation.test_transductive_task import CLASSES, adapter, points, source  # noqa: F401
from tests.helpers.training import trainer

X, Y = points(64, 1, shift=1.5)


class OneInput(nn.Module):
    """A classifier that gives its logits in this form."""

    def __init__(self, model, give):
        super().__init__()
        self.body, self.head, self.give = model.body, model.head, give

    def forward(self, x, scale=None):
        return self.give(self.head(self.body(x)))


class TwoInputs(OneInput):
    def forward(self, x, scale):
        return super().forward(x * scale[:, None])


def mappings():
    return [{"x": x, "scale": torch.tensor(1.0), "name": "a"} for x in X]


def collated(items):
    x, y = zip(*items, strict=True)
    return torch.stack(x), torch.ones(len(x)), y


FORMS = {  # network, what it gives, the target, forward=
    "a mapping": (OneInput, lambda z: {"loss": None, "logits": z}, lambda: X, None),
    "an object": (OneInput, lambda z: SimpleNamespace(logits=z), lambda: X, None),
    "a tuple": (OneInput, lambda z: (z, None), lambda: X, lambda model, x: model(x)[0]),
    "a mapping without": (OneInput, lambda z: {"out": z}, lambda: X, lambda m, x: m(x)["out"]),
    "items that are mappings": (TwoInputs, lambda z: z, mappings, None),
    "mappings with labels": (TwoInputs, lambda z: z, lambda: [(m, 0) for m in mappings()], None),
    "a loader with a collate function": (
        TwoInputs,
        lambda z: z,
        lambda: DataLoader(list(zip(X, Y, strict=True)), collate_fn=collated),
        None,
    ),
}


def transduces(tmp_path, model, target, forward):
    task = TransductiveTask(model, target, forward=forward, batch_size=16)
    trainer(tmp_path, adapter(), max_epochs=1).fit(task)
    return task.probabilities_


class Mine(LightningModule):
    """Has no forward."""

    def __init__(self, model, forward):
        super().__init__()
        self.model, self.own = model, forward

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(classifier(self.model, self.own)(inputs), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def labels(tmp_path, model, target, forward):
    pseudo = PseudoLabelCallback(target, forward=forward, batch_size=16)
    fit = trainer(tmp_path, adapter(init="eva"), pseudo, max_epochs=1)
    fit.fit(Mine(model.train(), forward), pseudo.train_dataloader())
    return pseudo.rounds_.probabilities_


def streams(tmp_path, model, target, forward):
    inject(model, rank=2, target_modules=["body.0"], trainable=[])
    stream = StreamAdapter(model, memory=32, diversity=0.0, forward=forward)
    given = {"x": X, "scale": torch.ones(len(X))}
    parts = [{k: v[i : i + 16] for k, v in given.items()} for i in range(0, len(X), 16)]
    whole = isinstance(model, TwoInputs)
    return torch.cat([stream(part if whole else part["x"]) for part in parts])


def shifts(tmp_path, model, target, forward):
    found = SourceStatistics.of(model, target, forward=forward)
    shift(model, found, target, forward=forward, repeats=2)
    return found.confidence


@pytest.fixture
def model(source):  # noqa: F811
    return copy.deepcopy(source)


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):  # noqa: F811
    """What each path gives of the classifier itself."""

    @functools.cache
    def wanted(path):
        torch.manual_seed(0)
        return path(tmp_path_factory.mktemp("plain"), copy.deepcopy(source), X, None)

    return wanted


@pytest.mark.parametrize("path", [transduces, labels, streams, shifts])
@pytest.mark.parametrize("form", FORMS)
def test_any_form_gives_what_the_plain_one_gives(tmp_path, model, form, path, plain):
    make, give, target, forward = FORMS[form]
    wanted = plain(path)
    torch.manual_seed(0)
    assert torch.equal(path(tmp_path, make(model, give), target(), forward), wanted)


UNCLEAR = {
    "a mapping": (lambda z: {"out": z}, r"dict of 'out'.*forward=lambda x: model\(x\)\['out'\]"),
    "a tuple": (lambda z: (z, z), r"tuple.*forward=lambda x: model\(x\)\[0\]"),
    "an object": (lambda z: SimpleNamespace(scores=z), r"SimpleNamespace.*forward=.*attributes"),
    "log-odds": (lambda z: z[:, 0], r"shape \(\d+,\).*forward=.*pad\(.*of two classes"),
    "maps": (lambda z: z[:, :, None, None], r"4, 1, 1\).*forward=.*mean\(\(2, 3\)\)"),
}


@pytest.mark.parametrize("path", [transduces, labels, streams, shifts])
@pytest.mark.parametrize("form", UNCLEAR)
def test_an_output_without_logits_says_how_to_give_them(tmp_path, model, form, path):
    give, message = UNCLEAR[form]
    with pytest.raises(ConfigError, match=message):
        path(tmp_path, OneInput(model, give), X, None)


def test_log_odds_become_two_classes_as_the_message_says(tmp_path, model):
    odds = OneInput(model, lambda z: z[:, 0]).eval()
    forward = lambda m, x: nn.functional.pad(m(x).view(-1, 1), (1, 0))  # noqa: E731
    found = SourceStatistics.of(odds, X, forward=forward).confidence
    p = torch.sigmoid(odds(X)).detach()
    torch.testing.assert_close(found, torch.maximum(p, 1 - p))


def test_a_step_that_gets_batches_without_labels_is_refused(tmp_path, model):
    class Iterates(Mine):
        def training_step(self, dataloader_iter):
            raise AssertionError

    pseudo = PseudoLabelCallback(X)
    with pytest.raises(ConfigError, match=r"training_step\(dataloader_iter\)"):
        trainer(tmp_path, adapter(), pseudo).fit(Iterates(model, None), pseudo.train_dataloader())


def test_a_canary_of_mappings(tmp_path, model):
    canary = [(item, int(y)) for item, y in zip(mappings()[:8], Y, strict=False)]
    task = TransductiveTask(TwoInputs(model, lambda z: z), mappings(), canary=canary)
    trainer(tmp_path, adapter(), max_epochs=1).fit(task)
    wanted = (task.rounds_.source[:8].argmax(1) == Y[:8]).double().mean()
    assert task.rounds_.history_[0].scores["canary"] == wanted


def test_a_stream_says_which_inputs_it_takes(model):
    inject(model, rank=2, target_modules=["body.0"], trainable=[])
    for given in ({"x": X, "name": ["a"] * 64}, {"x": X, "scale": torch.tensor(1.0)}, ["a"]):
        with pytest.raises(ConfigError, match=r"a row for each item.*Leave other entries out"):
            StreamAdapter(model)(given)
