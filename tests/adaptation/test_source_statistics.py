"""`SourceStatistics`: projections, files, and the check that they are of this model."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lora_lightning import LoRAConfig, SourceStatistics, disabled, inject
from lora_lightning.adaptation.shift.batch_norm_agreement import second_opinion
from lora_lightning.adaptation.shift.features import HEAD, features_of
from lora_lightning.adaptation.shift.source_statistics import LayerStatistics
from lora_lightning.adaptation.transductive_rounds import SOURCE_ITEMS
from lora_lightning.errors import AdapterFileError, ConfigError, DataError, DataNotFoundError
from lora_lightning.model.batch_norm import reestimated
from tests.helpers.files import rewrite
from tests.helpers.training import randomise, tiny_vit


def pictures(n: int = 40, seed: int = 1, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def equal(a: SourceStatistics, b: SourceStatistics) -> bool:
    assert list(a.layers) == list(b.layers)
    for name, layer in a.layers.items():
        for field, value in vars(layer).items():
            assert torch.equal(value, getattr(b.layers[name], field)), (name, field)
    rest = ("accuracy", "agreement", "model")
    return torch.equal(a.confidence, b.confidence) and all(
        getattr(a, name) == getattr(b, name) for name in rest
    )


def test_projecting_keeps_lengths():
    x = torch.randn(64, 20) @ torch.randn(20, 20)
    layer = LayerStatistics.of(x, directions=5)
    found = layer.project(x)
    assert found.shape == (64, 6)
    want = (x - layer.mean).norm(dim=1) / layer.scale
    assert torch.allclose(found.norm(dim=1), want, rtol=1e-4)
    assert torch.allclose(layer.basis @ layer.basis.T, torch.eye(5), atol=1e-5)


def test_the_unit_is_the_source_whole_deviation():
    x = 7 * torch.randn(4000, 10) + 3
    found = LayerStatistics.of(x)
    assert float(found.scale) == pytest.approx(7 * 10**0.5, rel=0.05)
    bigger = LayerStatistics.of(100 * x)
    assert torch.allclose(bigger.project(100 * x), found.project(x), atol=1e-4)


def test_the_sample_is_of_other_items_than_the_directions():
    # In 400 dimensions every item lies in the span of its own set, and off that of others.
    found = LayerStatistics.of(torch.randn(40, 400), directions=400)
    assert len(found.sample) == 20
    assert float(found.sample[:, -1].min()) > 0.5


def test_constant_features_give_finite_numbers():
    found = LayerStatistics.of(torch.ones(20, 4))
    assert bool(found.sample.isfinite().all())
    assert float(found.sample.abs().max()) == 0


@pytest.mark.parametrize(
    ("name", "size", "settings", "widths"),
    [
        ("test_vit", 32, {"img_size": 32, "patch_size": 8}, {64}),
        ("test_resnet", 32, {}, {32, 48, 192, 96}),
        ("test_convnext", 64, {}, {24, 32, 48, 64}),
        ("test_efficientnet", 32, {}, {16, 24, 32, 48, 64}),
        ("swin_tiny_patch4_window7_224", 56, {"img_size": 56}, {96, 192, 384, 768}),
    ],
)
def test_features_are_pooled_to_the_channels(name, size, settings, widths):
    model = timm.create_model(name, num_classes=3, **settings)
    found, said = features_of(model, pictures(4, size=size), batch_size=3)
    assert {x.shape[1] for n, x in found.items() if n != HEAD} == widths
    assert all(len(x) == 4 for x in found.values())
    assert list(found)[-1] == HEAD
    model.eval()
    with torch.no_grad():
        want = model.forward_head(model.forward_features(pictures(4, size=size)), pre_logits=True)
        logits = model(pictures(4, size=size))
    # Each picture by itself, whatever the batches were.
    assert torch.allclose(found[HEAD], want, atol=1e-4)
    assert torch.allclose(said.probabilities, logits.softmax(1), atol=1e-5)


def test_it_looks_in_eval_mode_and_leaves_the_model_as_it_was():
    model = timm.create_model("test_resnet", num_classes=4).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    SourceStatistics.of(model, pictures())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_accuracy_and_confidence_are_those_of_the_answers():
    model = tiny_vit()
    x = pictures()
    with torch.no_grad():
        p = model(x).softmax(1)
    labels = p.argmax(1)
    labels[:10] = (labels[:10] + 1) % 4
    found = SourceStatistics.of(model, x, labels, batch_size=7)
    assert found.accuracy == pytest.approx(0.75)
    assert torch.allclose(found.confidence, p.amax(1), atol=1e-5)
    assert SourceStatistics.of(model, x).accuracy is None


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_file_gives_the_same_back(name, tmp_path):
    model = tiny_vit() if name == "test_vit" else timm.create_model(name, num_classes=4)
    found = SourceStatistics.of(model, pictures(), torch.zeros(40, dtype=torch.int64))
    assert (found.agreement is None) == (name == "test_vit")  # it has no BatchNorm
    path = found.save(tmp_path / "new" / "source_statistics.safetensors")
    assert equal(SourceStatistics.load(path), found)
    assert equal(SourceStatistics.load(str(path)), found)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"nowhere.*SourceStatistics\.of"):
        SourceStatistics.load(tmp_path / "nowhere")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(AdapterFileError, match="no statistics of a source"):
        SourceStatistics.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(AdapterFileError, match="damaged, or no safetensors"):
        SourceStatistics.load(tmp_path / "text")


@pytest.mark.parametrize(
    ("change", "sign", "message"),
    [
        (lambda t, h: h.update(accuracy="x"), True, "accuracy"),
        (lambda t, h: h.update(layers=["nothing"]), True, "not whole"),
        (lambda t, h: h.update(model=[]), True, "model"),
        (lambda t, h: t["confidence"].fill_(torch.nan), True, "NaN"),
        (lambda t, h: t.update({"head/mean": torch.ones(1)}), True, "sizes of head's"),
        (lambda t, h: t["confidence"].mul_(0.5), False, "checksum"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path, change, sign, message):
    found = SourceStatistics.of(tiny_vit(), pictures())
    path = found.save(tmp_path / "statistics.safetensors")
    rewrite(path, change, sign, key="statistics")
    with pytest.raises(AdapterFileError, match=message):
        SourceStatistics.load(path)


def test_a_second_opinion_is_by_the_items_own_statistics():
    model = timm.create_model("test_resnet", num_classes=4)
    x = 5 * pictures(70) + 1
    found = second_opinion(model, [(p, 0) for p in x], model)
    assert found.items.tolist() == list(range(70))
    fresh = copy.deepcopy(model)
    reestimated(fresh, fresh, x.split(70), SOURCE_ITEMS)
    with torch.no_grad():
        want = fresh.eval()(x).softmax(1)
    # Two batches in place of one: the variance within them is a little smaller.
    assert torch.allclose(found.probabilities, want, atol=0.05)
    assert found.agreement(found.probabilities) == 1
    assert second_opinion(tiny_vit(), x, model) is None


def test_a_second_opinion_of_many_items_asks_some(monkeypatch):
    monkeypatch.setattr("lora_lightning.adaptation.shift.batch_norm_agreement.MOST", 10)
    model = timm.create_model("test_resnet", num_classes=4)
    x = pictures(30)
    found = second_opinion(model, x, model)
    assert len(found.items) == len(found.probabilities) == 10
    assert found.items.tolist() == sorted(set(found.items.tolist()))
    again = second_opinion(model, x[found.items], model)
    assert torch.allclose(again.probabilities, found.probabilities, atol=1e-5)


def test_statistics_know_their_model():
    model = tiny_vit()
    found = SourceStatistics.of(model, pictures())
    found.check(model)
    with pytest.raises(ConfigError, match=r"of test_vit, this is test_resnet"):
        found.check(timm.create_model("test_resnet", num_classes=4))
    with pytest.raises(ConfigError, match="test_vit with other weights"):
        found.check(tiny_vit())
    with pytest.raises(ConfigError, match="another head"):
        found.check(tiny_vit(classes=5))
    inject(model, LoRAConfig(rank=2))
    randomise(model)
    with disabled(model):
        found.check(model)


def test_bad_input_says_what_to_do():
    model = tiny_vit()
    with pytest.raises(DataError, match="8 items or more, got 5"):
        SourceStatistics.of(model, pictures(5))
    with pytest.raises(DataError, match=r"40 items and labels of shape \(3,\)"):
        SourceStatistics.of(model, pictures(), torch.zeros(3))
    with pytest.raises(ConfigError, match=r"shape \(40, 1\).*forward=.*regression"):
        SourceStatistics.of(tiny_vit(classes=1), pictures())
    with pytest.raises(ConfigError, match=r"tuple.*forward=lambda x: model\(x\)\[0\]"):
        SourceStatistics.of(Pair(model), pictures())
    frames = lambda x: model(x)[:, None].expand(-1, 5, -1)  # noqa: E731
    with pytest.raises(ConfigError, match=r"\(40, 5, 4\).*model\(x\)\.mean\(1\)"):
        SourceStatistics.of(model, pictures(), forward=frames)
    with pytest.raises(DataError, match="NaN or infinite for 1 of 40"):
        SourceStatistics.of(model, pictures().index_fill(0, torch.tensor([3]), torch.nan))


class Pair(nn.Module):
    """Returns more than logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x), x


def test_forward_says_how_a_model_is_called():
    model = Pair(tiny_vit())
    found = SourceStatistics.of(model, pictures(), forward=lambda x: model(x)[0])
    assert torch.equal(found.confidence, SourceStatistics.of(model.model, pictures()).confidence)
