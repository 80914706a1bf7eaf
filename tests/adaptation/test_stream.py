"""Online adaptation: a stream of images, a single utterance."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_lightning import disabled, inject
from lora_lightning.adaptation.guard import Limits
from lora_lightning.adaptation.stream import StreamAdapter
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.speech.data.utterances import AudioBatch, Utterance
from lora_lightning.speech.episodic import SingleUtterance
from lora_lightning.speech.tasks.ctc import CTCRecognition
from lora_lightning.speech.transcript_guard import SpeechLimits
from tests.adaptation.test_transductive_task import accuracy, points, source  # noqa: F401 - a fixture
from tests.helpers.gpu import cudnn_rnn  # noqa: F401 - a fixture
from tests.speech.test_self_training import recogniser


@pytest.fixture
def model(source):  # noqa: F811
    found = copy.deepcopy(source)
    inject(found, rank=4, target_modules=["body.0"], trainable=[])
    return found.train()


def through(stream, x, size):
    return torch.cat([stream(batch) for batch in x.split(size)])


@pytest.mark.parametrize("size", [1, 16])
def test_a_stream_gets_better_as_it_goes(model, size):
    x, y = points(512, 3, shift=1.5)
    before = accuracy(copy.deepcopy(model), (x, y))
    model.train()
    stream = StreamAdapter(model, memory=32, learning_rate=2e-3)
    found = through(stream, x, size)
    late = float((found[256:].argmax(1) == y[256:]).double().mean())
    assert before < 0.9
    assert late > before + 0.02
    assert (stream.seen_, stream.resets_) == (512, [])
    assert len(stream._kept) == 32  # bounded
    assert model.training  # the modes are the user's


def test_reset_is_the_source_again_bit_for_bit(model):
    x, _ = points(64, 3, shift=1.5)
    with torch.no_grad():
        source_says = copy.deepcopy(model).eval()(x)
    stream = StreamAdapter(model, memory=16, learning_rate=1e-2)
    first = through(stream, x, 16)
    stream.reset()
    with torch.no_grad():
        assert torch.equal(model.eval()(x), source_says)
    assert stream.seen_ == 0
    torch.testing.assert_close(through(stream, x, 16), first)


def test_at_an_alarm_it_begins_anew(model):
    x, _ = points(64, 3, shift=1.5)
    stream = StreamAdapter(model, memory=16, learning_rate=5.0)
    through(stream, x, 16)
    assert stream.resets_
    assert stream.resets_[0][0] == 16
    with torch.no_grad(), disabled(model):
        untouched = model.eval()(x)
    assert torch.isfinite(untouched).all()
    free = StreamAdapter(copy.deepcopy(model), memory=16, learning_rate=5.0, limits=None)
    through(free, x, 16)
    assert not free.resets_


def test_one_item_alone_teaches_nothing(model):
    x, _ = points(1, 3)
    with torch.no_grad():
        before = copy.deepcopy(model).eval()(x).softmax(1)
    assert torch.equal(StreamAdapter(model)(x), before)


def test_what_a_stream_refuses(model, source):  # noqa: F811
    with pytest.raises(ConfigError, match="at least 2"):
        StreamAdapter(model, memory=1)
    with pytest.raises(ConfigError, match="learning_rate"):
        StreamAdapter(model, learning_rate=0)
    with pytest.raises(ConfigError, match="diversity"):
        StreamAdapter(model, diversity=1.5)
    frozen = copy.deepcopy(source)
    for p in frozen.parameters():
        p.requires_grad_(False)
    with pytest.raises(ConfigError, match="inject an adapter"):
        StreamAdapter(frozen)
    stream = StreamAdapter(model)
    with pytest.raises(DataError, match="NaN"):
        stream(torch.full((2, 16), torch.nan))
    assert stream.seen_ == 0


def sorted_by_class(count, length, shift=1.5, classes=4):
    """As `points`, with `length` of a class in a row."""
    x, y = points(count, 3, shift=shift)
    order = torch.argsort((torch.arange(count) // classes) // length * classes + y, stable=True)
    return x[order], y[order]


@pytest.mark.parametrize("length", [75, 150])
def test_classes_in_runs_do_no_harm(model, length):
    x, y = sorted_by_class(300, length, shift=1.0)
    before = accuracy(copy.deepcopy(model), (x, y))
    found = {}
    for diversity in (0.0, 0.95):
        stream = StreamAdapter(
            copy.deepcopy(model), memory=16, learning_rate=1e-2, diversity=diversity
        )
        found[diversity] = float((through(stream, x, 4).argmax(1) == y).double().mean())
        assert stream._kept.untyped_storage().nbytes() == 16 * 16 * 4
        assert stream._before.untyped_storage().nbytes() == 16 * 4 * 4
    assert found[0.95] >= before - 0.01
    assert found[0.0] < before - 0.01  # such a stream does do harm


def test_a_class_alone_leaves_the_source_as_it_is(model):
    x, y = points(256, 3, shift=1.5)
    with torch.no_grad():
        before = copy.deepcopy(model).eval()(x[y == 1]).softmax(1)
    torch.testing.assert_close(through(StreamAdapter(model, memory=16), x[y == 1], 8), before)


def test_after_three_alarms_a_stream_is_left_alone(model):
    x, _ = points(256, 3, shift=1.5)
    with torch.no_grad():
        before = copy.deepcopy(model).eval()(x).softmax(1)
    stream = StreamAdapter(model, memory=16, learning_rate=5.0)
    found = through(stream, x, 16)
    assert len(stream.resets_) == 3
    assert stream.stopped_
    torch.testing.assert_close(found[128:], before[128:])
    stream.reset()
    assert not stream.stopped_


@pytest.mark.parametrize(
    ("item", "error"),
    [
        (torch.full((1, 16), 3e38), DataError),
        (torch.full((1, 16), 1e300, dtype=torch.float64), DataError),
        (torch.zeros(1, 16, dtype=torch.int64), RuntimeError),
        (torch.zeros(1, 15), RuntimeError),
    ],
)
def test_an_item_that_fails_changes_nothing(model, item, error):
    x, _ = points(64, 3, shift=1.5)
    other = StreamAdapter(copy.deepcopy(model), memory=16, learning_rate=1e-2)
    stream = StreamAdapter(model, memory=16, learning_rate=1e-2)
    for batch in x.split(8):
        with pytest.raises(error):
            stream(item)
        assert torch.equal(stream(batch), other(batch))


def test_another_dtype_is_converted(model):
    x, _ = points(64, 3, shift=1.5)
    stream, other = (StreamAdapter(copy.deepcopy(model), memory=16) for _ in range(2))
    for number, batch in enumerate(x.split(8)):
        assert torch.equal(stream(batch.double() if number % 2 else batch), other(batch))


def test_a_base_in_half_precision_is_given_its_own_dtype(model):
    half = copy.deepcopy(model).bfloat16()
    x, _ = points(8, 3, shift=1.5)
    assert torch.isfinite(StreamAdapter(half, memory=16)(x)).all()


def test_a_gradient_that_overflows_is_not_taken(model):
    x, _ = points(32, 3, shift=1.5)
    stream = StreamAdapter(model, lambda z: z.sum() * 1e30, memory=16)
    with torch.no_grad():
        before = copy.deepcopy(model).eval()(x).softmax(1)
    torch.testing.assert_close(through(stream, x, 16), before)
    assert stream._kept is None


class Recurrent(nn.GRU):
    """As a block among others: one tensor in, one out."""

    def forward(self, x):
        return x + super().forward(x)[0]


@pytest.mark.usefixtures("cudnn_rnn")
def test_recurrent_layers_are_trained_in_eval_mode(model):
    x, _ = points(32, 3)
    model = nn.Sequential(Recurrent(x.shape[1], x.shape[1]), model)
    with torch.no_grad():
        before = model.eval()(x).softmax(1)
    assert not torch.equal(StreamAdapter(model, learning_rate=1e-2)(x), before)
    module = CTCRecognition(recogniser())
    module.model.head = nn.Sequential(Recurrent(16, 16), module.model.head)
    assert len(SingleUtterance(module, steps=2)(sounds(1))) == 1
    assert torch.backends.cudnn.enabled


# ---- one utterance ----------------------------------------------------------------------------


def sounds(count=3):
    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(6000 + 1000 * i, generator=generator) for i in range(count)]
    return AudioBatch.of(waves, [Utterance(f"{i}.wav") for i in range(count)])


def test_a_single_utterance_leaves_no_trace():
    module = CTCRecognition(recogniser())
    before = copy.deepcopy(module.state_dict())
    module.model.head.weight.requires_grad_(False)
    grads = [p.requires_grad for p in module.parameters()]
    batch = sounds()
    texts = SingleUtterance(module, steps=3, learning_rate=1e-2)(batch)
    assert len(texts) == 3
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert [p.requires_grad for p in module.parameters()] == grads
    assert module.training
    # What a recording becomes does not depend on those before it.
    alone = AudioBatch(batch.waveforms[2:], batch.lengths[2:], batch.items[2:])
    assert SingleUtterance(module, steps=3, learning_rate=1e-2)(alone) == texts[2:]


def test_its_loss_falls():
    from lora_lightning.speech import episodic

    seen, module, real = [], CTCRecognition(recogniser()), episodic.suta
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodic, "suta", lambda *a: seen.append(real(*a)) or seen[-1])
        SingleUtterance(module, steps=8, learning_rate=1e-2)(sounds(1))
    assert len(seen) == 8
    assert seen[-1] < seen[0]


def test_a_text_that_falls_silent_is_not_taken():
    module = CTCRecognition(recogniser())
    plain = SingleUtterance(module, steps=1, learning_rate=1e-9)(sounds())
    wild = SingleUtterance(module, steps=5, learning_rate=100.0)
    kept = wild(sounds())
    wild.limits = SpeechLimits(least_rate=2.0, most_rate=3.0)  # nothing can pass
    assert wild(sounds()) == plain
    wild.limits = None
    assert isinstance(kept, list)


def test_what_a_single_utterance_refuses():
    module = CTCRecognition(recogniser())
    with pytest.raises(ConfigError, match="steps must be a whole number"):
        SingleUtterance(module, steps=0)
    module.model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no norm"):
        SingleUtterance(module)


def test_limits_are_checked():
    with pytest.raises(ConfigError, match="steadiness"):
        Limits(steadiness=2)
