"""Adaptation without labels, streams and measures of shift on the device."""

from __future__ import annotations

import copy

import pytest
import torch

from lora_lightning import SourceStatistics, TransductiveTask, disabled, inject, shift
from lora_lightning.adaptation.stream import StreamAdapter
from lora_lightning.speech.episodic import SingleUtterance
from lora_lightning.speech.tasks.ctc import CTCRecognition
from tests.adaptation.test_measure import LABELS, pictures, trained
from tests.adaptation.test_stream import sounds
from tests.adaptation.test_transductive_task import (  # noqa: F401 - fixtures
    accuracy,
    adapter,
    points,
    source,
    target,
)
from tests.helpers.cuda import Recurrent, apart, set_precision, stir
from tests.helpers.training import tiny_vit, trainer
from tests.speech.test_self_training import recogniser

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous"),
]


def transduced(tmp_path, base, x, device, precision="32-true", **settings):
    """The task after a fit on the device, and its model on the CPU."""
    torch.manual_seed(0)
    task = TransductiveTask(copy.deepcopy(base), x, **{"learning_rate": 5e-3, **settings})
    options = {"accelerator": device.type, "devices": 1, "precision": precision}
    trainer(tmp_path, adapter(), max_epochs=6, **options).fit(task)
    return task, task.model.cpu()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_model_gets_better_without_labels(tmp_path, source, target, precision, device):  # noqa: F811
    before = accuracy(source, target)
    task, model = transduced(tmp_path, source, target[0], device, precision)
    assert accuracy(model, target) > before + 0.5 * (1 - before)
    with torch.no_grad(), disabled(model):
        assert accuracy(model, target) == before
    with torch.no_grad():
        again = model.eval()(target[0]).softmax(1)
    found = task.probabilities_.cpu()
    limit = 1e-4 if precision == "32-true" else 3e-2
    torch.testing.assert_close(found.float(), again, rtol=0, atol=limit)


def test_at_an_alarm_the_source_comes_back(tmp_path, source, target, device):  # noqa: F811
    bad, model = transduced(
        tmp_path, source, target[0], device, learning_rate=10.0, objective="entropy",
        batch_norm="source", pseudo_label_weight=0.0,
    )  # fmt: skip
    assert bad.rounds_.accepted_ == 0
    with torch.no_grad():
        assert torch.equal(model.eval()(target[0]), source(target[0]))


@pytest.fixture
def model(source):  # noqa: F811
    found = copy.deepcopy(source)
    inject(found, rank=4, target_modules=["body.0"], trainable=[])
    return found.train()


def test_a_stream_says_what_it_says_on_the_cpu(model, device):
    x, y = points(256, 3, shift=1.5)
    here, there = copy.deepcopy(model), model.to(device)
    with torch.no_grad():
        untouched = copy.deepcopy(there).eval()(x.to(device))
    found = []
    for network, data in ((here, x), (there, x.to(device))):
        stream = StreamAdapter(network, memory=32, learning_rate=2e-3)
        found.append(torch.cat([stream(batch) for batch in data.split(16)]))
    assert apart([found[1]], [found[0]]) < 1e-2
    late = found[1].cpu()[128:].argmax(1) == y[128:]
    with disabled(here):
        assert float(late.double().mean()) > accuracy(here, (x[128:], y[128:]))
    assert not stream.resets_
    stream.reset()
    with torch.no_grad():
        assert torch.equal(there.eval()(x.to(device)), untouched)


def test_an_alarm_resets_a_stream(model, device):
    x, _ = points(64, 3, shift=1.5)
    model.to(device)
    stream = StreamAdapter(model, memory=16, learning_rate=5.0)
    for batch in x.to(device).split(16):
        assert bool(stream(batch).isfinite().all())
    assert stream.resets_


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_a_stream_through_recurrent_layers(kind, device):
    """In eval mode, in which cuDNN has no backward pass of its own."""
    torch.manual_seed(0)
    model = Recurrent(kind)
    inject(model, rank=2, target_modules=["body"], trainable=[])
    stir(model).to(device)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    stream = StreamAdapter(model, memory=8, learning_rate=1e-2, limits=None, diversity=0)
    for batch in torch.randn(24, 5, 6, device=device).split(8):
        assert bool(stream(batch).isfinite().all())
    after = [p for p in model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_single_utterance_leaves_no_trace(device):
    torch.manual_seed(0)
    module = CTCRecognition(recogniser()).to(device)
    before = copy.deepcopy(module.state_dict())
    batch = sounds()
    batch = type(batch)(batch.waveforms.to(device), batch.lengths.to(device), batch.items)
    assert len(SingleUtterance(module, steps=3, learning_rate=1e-2)(batch)) == 3
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("setting", ["ieee", "high"])
def test_shift_is_what_it_is_on_the_cpu(setting, device):
    model, statistics = trained()
    x = 0.5 * pictures(LABELS, seed=9) + 1.5
    expected = shift(model, statistics, x, repeats=20)
    there = copy.deepcopy(model).to(device)
    set_precision(setting)
    limit = 1e-3 if setting == "ieee" else 3e-2
    for data in (x, x.to(device)):
        found = shift(there, statistics, data, repeats=20)
        assert found.verdict == expected.verdict
        assert found.frechet.value == pytest.approx(expected.frechet.value, rel=limit)
        assert found.expected_accuracy == pytest.approx(expected.expected_accuracy, abs=0.02)
    own = SourceStatistics.of(there, pictures(LABELS), LABELS)
    assert own.accuracy == pytest.approx(statistics.accuracy, abs=0.01)
    name = next(iter(statistics.layers))
    ours, theirs = own.layers[name].mean, statistics.layers[name].mean
    assert apart([ours], [theirs]) < 10 * limit


def test_shift_of_an_adapted_model(device):
    torch.manual_seed(0)
    model = tiny_vit().to(device)
    inject(model, rank=2, trainable=[])
    stir(model)
    found = shift(model, pictures(LABELS[:40]), pictures(LABELS[:40], 5) + 1, repeats=5)
    assert found.agreement is not None
