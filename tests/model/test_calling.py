"""One rule for how a batch becomes a call of a model, wherever a model is run on a batch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from lora_lightning import (
    AdapterBank,
    LoRACallback,
    SourceStatistics,
    inject,
    save_adapter,
    shift,
    verify,
)
from lora_lightning.errors import AdapterError, DataError
from lora_lightning.model.calling import call, call_of
from lora_lightning.model.probing import run
from tests.helpers.training import Module, loader, tiny_vit, trainer

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Net(nn.Module):
    """Notes what it is called with."""

    def __init__(self):
        super().__init__()
        self.layer, self.head, self.seen = nn.Linear(6, 5), nn.Linear(5, 3), []

    def note(self, *inputs):
        self.seen.append(inputs)
        return self.head(self.layer(inputs[0]))


class One(Net):
    def forward(self, x, mask=None):
        return self.note(x, mask)


class Two(Net):
    def forward(self, x, lengths, mask=None):
        return self.note(x, lengths, mask)


class Named(Net):
    def forward(self, *, x, mask=None):
        return self.note(x, mask)


class Whole(Net):
    def forward(self, batch):
        return self.note(batch["inputs"])


class Inputs(NamedTuple):
    x: torch.Tensor
    lengths: torch.Tensor
    label: torch.Tensor


class Star(Net):
    def forward(self, *args, **kwargs):
        return self.note(*args, *kwargs.values())


def last(model, batch):
    """A `forward` of the user's: the batch has the inputs at its end."""
    return model(batch[-1])


BATCHES = {
    "a tensor": (One, X, None, (X, None)),
    "inputs and targets": (One, [X, Y], None, (X, None)),
    "a tuple of them": (One, (X, Y, Y), None, (X, None)),
    "a mapping": (One, {"x": X, "mask": Y}, None, (X, Y)),
    "a mapping with targets": (One, {"x": X, "label": Y, "path": "a"}, None, (X, None)),
    "a mapping and targets": (One, ({"x": X}, Y), None, (X, None)),
    "a mapping as a whole": (Whole, {"inputs": X, "label": Y}, None, (X,)),
    "a mapping as a whole, and targets": (Whole, ({"inputs": X}, Y), None, (X,)),
    "two that are needed": (Two, (X, Y, Y), None, (X, Y, None)),
    "a mapping of them": (Two, {"lengths": Y, "x": X, "mask": Y}, None, (X, Y, Y)),
    "a named tuple": (Two, Inputs(X, Y, Y), None, (X, Y, None)),
    "inputs in a list, and targets": (Two, ([X, Y], Y), None, (X, Y, None)),
    "a tensor by its name": (Named, X, None, (X, None)),
    "inputs by their names": (Named, [X, Y], None, (X, None)),
    "any number": (Star, (X, Y), None, (X, Y)),
    "any keywords": (Star, {"x": X, "other": Y}, None, (X, Y)),
    "a function of the user's": (One, (Y, X), last, (X, None)),
}


def verifies(model, batch, forward, folder):
    inject(model, rank=1, target_modules="all", trainable=[])
    verify(model, batch, forward=forward)


def starts(model, batch, forward, folder):
    inject(model, rank=1, target_modules="all", trainable=[], init="eva", data=[batch],
           forward=forward)  # fmt: skip


def chooses(model, batch, forward, folder):
    inject(model, rank="explained-variance", max_rank=2, target_modules="all", trainable=[],
           data=[batch], forward=forward)  # fmt: skip


def bank_of(model, folder, **options):
    twin = type(model)()
    twin.load_state_dict(model.state_dict())
    inject(twin, rank=1, target_modules=["layer"], trainable=[])
    save_adapter(twin, folder / "a.safetensors")
    return AdapterBank(model.eval(), folder, **options)


def banks(model, batch, forward, folder):
    bank_of(model, folder, example=batch, forward=forward)


def probes(model, batch, forward, folder):
    bank_of(model, folder).probe(batch, forward=forward)


PATHS = [verifies, starts, chooses, banks, probes]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch", BATCHES)
def test_all_paths_call_a_model_alike(batch, path, tmp_path):
    make, given, forward, expected = BATCHES[batch]
    torch.manual_seed(0)
    model = make()
    path(model, given, forward, tmp_path)
    assert len(model.seen[0]) == len(expected)
    for found, wanted in zip(model.seen[0], expected, strict=True):
        assert found is wanted is None or torch.equal(found, wanted)


@pytest.mark.parametrize("forward", [lambda m, x: m(x)[0], lambda x: PAIR(x)[0]])
def test_a_shift_takes_both_forms_of_forward(forward):
    source = SourceStatistics.of(PAIR, [(x, int(y)) for x, y in zip(X, Y, strict=True)],
                                 forward=forward)  # fmt: skip
    found = shift(PAIR, source, X, forward=forward, repeats=2)
    assert found.expected_accuracy is None
    assert torch.equal(source.confidence, PAIR(X)[0].softmax(1).amax(1).detach())


class Pair(Net):
    def forward(self, x):
        return self.note(x), None


PAIR = Pair().eval()


def test_a_bank_checks_before_forward_runs_the_model(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    (tmp_path / "a.safetensors").touch()
    bank = AdapterBank(model, tmp_path)
    with pytest.raises(AdapterError, match="training mode"):
        bank.probe(X, forward=lambda model, batch: model(batch))
    assert model[1].num_batches_tracked == 0


def test_a_look_on_the_cpu_leaves_gpus_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    run(One(), X)
    assert not seeded


def test_the_callback_passes_forward_on(tmp_path):
    seen = []

    def forward(backbone, batch):
        seen.append(type(batch))
        return backbone(batch["pixels"])

    data = [{"pixels": x} for x, _ in loader()]
    options = {
        "rank": "explained-variance",
        "max_rank": 2,
        "init": "eva",
        "data": data,
        "forward": forward,
    }
    trainer(tmp_path, LoRACallback(**options)).fit(Module(tiny_vit()), loader())
    assert len(seen) > len(data)
    assert set(seen) == {dict}


def test_a_module_that_hands_its_arguments_on_is_given_what_the_network_takes(tmp_path):
    class HandsOn(Module):
        def forward(self, *args):
            assert len(args) == 1, "the labels are none of the network's arguments"
            return self.model(*args)

    trainer(tmp_path, LoRACallback(rank=2, init="eva")).fit(HandsOn(tiny_vit()), loader())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:FutureWarning")
def test_a_wrapped_model_is_called_as_the_model_within():
    scripted = torch.jit.trace(nn.Linear(6, 5), X)
    for wrapped in (torch.compile(One(), backend="eager"), nn.DataParallel(One()), scripted):
        args, kwargs = call_of(wrapped, (X, Y))
        assert len(args) == 1
        assert not kwargs
    assert call(scripted, {"input": X}).shape == (8, 5)


def test_what_is_no_call_says_so():
    for batch in ("text", (), [], 3):
        with pytest.raises(DataError, match=f"got {type(batch).__name__}.*forward="):
            call(One(), batch)
    with pytest.raises(DataError, match=r"keyword arguments, x, mask; this one has 'image'"):
        call(One(), {"image": X})
    with pytest.raises(DataError, match=r"requires x, lengths, of which this batch gives 1.*mapp"):
        call(Two(), X)
    with pytest.raises(DataError, match=r"'image'\), was given the whole.*KeyError.*forward="):
        call(Whole(), {"image": X})
    with pytest.raises(DataError, match="does not call the model"):
        call_of(One(), X, lambda model, batch: None)
