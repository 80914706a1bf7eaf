"""`verify` where arithmetic is not that of a CPU in float32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from lora_lightning import LoRACallback, inject, verify
from lora_lightning.errors import VerificationError
from lora_lightning.model.state import named_factors
from tests.helpers.detectors import Detection, boxes, faster_rcnn, retinanet
from tests.helpers.gpu import TF32, cudnn_rnn, high_precision_matmul  # noqa: F401 - fixtures
from tests.helpers.training import tiny_vit, trainer


@pytest.mark.usefixtures("high_precision_matmul")
@pytest.mark.parametrize("name", ["test_efficientnet", "tiny_vit"])
def test_verify_is_in_ieee_arithmetic_where_training_is_not(name):
    """With TF32 merged and unmerged outputs differ by 1e-3, of which no layer is the cause."""
    model = tiny_vit() if name == "tiny_vit" else timm.create_model(name)
    inject(model, rank=2)
    x = torch.randn(2, 3, 32, 32)
    with TF32():
        plain = model.eval()(x)
        assert verify(model, x)[0].merge_error < 2e-6
        assert torch.equal(model(x), plain)
    assert not torch.equal(model(x), plain)


def test_verify_compiles_nothing():
    """Neither for its modes nor for a batch of another size, nor does it undo what is compiled."""
    compiled = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
    inject(model, rank=2, target_modules="all", trainable=[])
    model.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    model(torch.randn(8, 4))
    assert len(compiled) == 1
    verify(model, torch.randn(2, 4))
    model(torch.randn(8, 4))
    assert len(compiled) == 1


@pytest.mark.usefixtures("cudnn_rnn")
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_verify_needs_no_backward_pass_of_cudnns_in_eval(layer):
    model = layer(4, 3)
    inject(model, rank=2, target_modules="all", trainable=[])
    x = torch.randn(5, 2, 4)
    verify(model, x)
    with pytest.raises(RuntimeError, match="only be called in training"):
        model.eval()(x)[0].sum().backward()


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]
)
def test_verify_accepts_what_rounding_to_16_bits_explains(dtype, autocast):
    """Also where outputs are in float32."""

    class Float(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to(self[0].bias.dtype)).float()

    model = Float(*(nn.Linear(64, 64) for _ in range(6))).to(dtype)
    inject(model, rank=2, target_modules="all", trainable=[])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = verify(model, torch.randn(3, 64))[0]
    assert 1e-4 < found.merge_error < 2e-2


class Decides(nn.Module):
    """Gives something else in eval mode than logits."""

    def __init__(self, decide):
        super().__init__()
        self.layer, self.head, self.decide = nn.Linear(6, 5), nn.Linear(5, 3), decide

    def forward(self, x):
        found = self.head(self.layer(x).relu())
        return found if self.training else self.decide(self, x, found)


def texts(model, x, found):
    return [f"class {k}" for k in found.argmax(1).tolist()]


def raw(model, x, found):
    """By the weight of the base, whatever the adapter is."""
    return nn.functional.linear(x, model.layer._parameters["weight"], model.layer.bias).detach()


def kept(model, x, found):
    """Those above a threshold."""
    return {"scores": found[found > 0.3], "labels": found.argmax(1)}


class Slotted:
    """Has no table of attributes."""

    __slots__ = "logits"

    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize("give", [Slotted, lambda y: iter([y])])
def test_outputs_of_slots_and_iterators_are_seen(give):
    model = nn.Sequential(nn.Linear(4, 3))
    inject(model, rank=2, target_modules="all", trainable=[])
    (found,) = verify(model, torch.randn(5, 4), forward=lambda m, x: give(m(x)))
    assert found.effect > 0


LEARNT, CHANGES = (
    "every factor learns was checked in training mode",
    "the adapter changes decisions",
)
TOLD = {  # what eval gives, and what is said of it
    "classes": (lambda m, x, y: y.argmax(1), f"{LEARNT}.*{CHANGES}.*merging was not"),
    "classes as floats": (lambda m, x, y: y.argmax(1).float(), LEARNT),
    "texts": (texts, f"{LEARNT}.*{CHANGES}"),
    "as many as there are": (kept, f"{LEARNT}.*{CHANGES}"),
    "nothing": (lambda m, x, y: [], f"{LEARNT}.*no decision changed"),
    "without a gradient": (lambda m, x, y: y.detach(), f"{LEARNT} only"),
}


def decides(decide):
    torch.manual_seed(0)
    model = Decides(decide)
    inject(model, rank=1, target_modules=["layer"], trainable=[])
    return model, torch.randn(8, 6)


@pytest.mark.parametrize("kind", TOLD)
def test_what_a_decision_cannot_tell_is_said(kind):
    decide, said = TOLD[kind]
    with pytest.warns(UserWarning, match=said):
        found = verify(*decides(decide))[0]
    assert not found.failures
    assert found.untold


def test_what_an_eval_output_can_tell_is_checked():
    """Also where it is of another form than in training, or has no gradient."""
    soft = decides(lambda m, x, y: {"p": y.softmax(1), "class": y.argmax(1)})
    assert not verify(*soft)[0].untold
    assert not verify(*decides(lambda m, x, y: SimpleNamespace(logits=y)))[0].untold
    for dead in (raw, lambda m, x, y: {"p": raw(m, x, y), "class": y.argmax(1) * 0}):
        with pytest.raises(VerificationError, match="in eval: no effect on the output"):
            verify(*decides(dead))
    with pytest.raises(VerificationError, match="no floating-point tensor; give forward="):
        verify(*decides(None)[:1], torch.randn(8, 6), forward=lambda m, x: m.train()(x).argmax(1))


@pytest.mark.parametrize("make", [retinanet, faster_rcnn])
def test_detectors_train_under_the_callback(make, tmp_path):
    module = Detection(make())
    lora = LoRACallback(rank=1, target_modules="all", trainable=[])
    with pytest.warns(UserWarning, match=LEARNT):
        trainer(tmp_path, lora, max_epochs=1).fit(module, boxes())
    assert all(f.lora_B.any() for f in named_factors(module.model, "default").values())


def test_verify_says_what_it_needs_within_inference_mode():
    model = nn.Sequential(nn.Linear(4, 3))
    inject(model, rank=1, target_modules="all", trainable=[])
    with torch.inference_mode(), pytest.raises(VerificationError, match="call it outside"):
        verify(model, torch.randn(2, 4))


def test_a_zero_initialised_norm_weight_is_named_as_the_cause():
    model = timm.create_model("resnet10t", num_classes=4)
    inject(model, rank=1)
    with pytest.raises(VerificationError, match="a zero-initialised gate or norm weight"):
        verify(model, torch.randn(2, 3, 32, 32))
