"""`shift`: zero between a set and itself, increasing with the shift, and its texts."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import timm
import torch
from torch import nn

from lora_lightning import LoRAConfig, SourceStatistics, inject, merge, shift
from lora_lightning.adaptation.shift.batch_norm_agreement import second_opinion
from lora_lightning.adaptation.shift.expected import expected_interval
from lora_lightning.adaptation.shift.features import features_of
from lora_lightning.adaptation.shift.measure import compare, proxy_a_distance
from lora_lightning.adaptation.shift.verdicts import FAR, NEAR, verdict
from lora_lightning.adaptation.validators import thresholded_confidence
from lora_lightning.errors import ConfigError, DataError
from tests.helpers.training import randomise, tiny_vit


def pictures(labels: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Class 0 is dark at the top, 1 bright, and so on; noise on it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 3, 32, 32, generator=generator)
    x[:, :, :16] += (labels.float() - 1.5)[:, None, None, None]
    return x


LABELS = torch.arange(120) % 4


@functools.cache
def trained() -> tuple[nn.Module, SourceStatistics]:
    """A network that knows the classes, and the statistics of its source."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(20):
        loss = nn.functional.cross_entropy(model(pictures(LABELS[:48], 100 + step)), LABELS[:48])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return model, SourceStatistics.of(model, pictures(LABELS), LABELS)


def measured(target: torch.Tensor, **settings):
    return shift(*trained(), target, **{"repeats": 10, **settings})


def test_the_source_itself_is_near():
    found = measured(pictures(LABELS))
    assert found.verdict == "near"
    assert found.expected_accuracy == pytest.approx(found.source_accuracy, abs=0.01)
    assert found.source_accuracy > 0.7
    assert found.frechet.value < 0.05
    assert max(found.layers.values()) < 0.05
    assert found.mmd.value < 0.01
    assert found.proxy_a.value < 0.5
    assert found.items == (60, 120)


def test_other_pictures_of_the_source_are_near_as_well():
    found = measured(pictures(LABELS, seed=9))
    assert (found.verdict, found.frechet.low) == ("near", 0)
    assert found.proxy_a.low < 0.2


def test_a_stronger_shift_gives_larger_distances_and_a_worse_verdict():
    found = [measured(k * pictures(LABELS, seed=9) + 3 * (1 - k)) for k in (1, 0.5, 0.1)]
    for name in ("frechet", "mmd", "proxy_a"):
        values = [getattr(f, name).value for f in found]
        assert values == sorted(values), name
        assert values[0] < values[-1]
    assert found[-1].verdict == "too far"
    assert found[-1].proxy_a.value > 1.9


def test_a_model_that_is_sure_of_something_else_does_not_pass_for_near():
    target = 0.1 * pictures(LABELS, seed=9) + 2.7
    model, statistics = trained()
    found, said = features_of(model, target, 64)
    sure = compare(statistics, found, said.probabilities, repeats=2)
    assert sure.expected_drop < NEAR  # all are of one class, and it is sure of that
    assert measured(target).expected_drop > 0.2  # but it does not stay with it
    assert measured(target).verdict == sure.verdict == "too far"
    assert sure.expected_accuracy is sure.expected_interval is None  # and not "100 %"
    assert "No accuracy can be told for it" in sure.sentence()
    near = dataclasses.replace(statistics, layers={})
    assert expected_interval(near, said.probabilities)[0] == 0  # one answer for every item


def test_intervals_hold_the_value_and_the_seed_decides():
    target = pictures(LABELS, seed=9) * 0.7
    found = measured(target)
    for name in ("proxy_a", "mmd", "coral", "frechet"):
        value, low, high = getattr(found, name)
        assert 0 <= low <= value <= high, name
    low, high = found.expected_interval
    assert 0 <= low < found.expected_accuracy < high <= 1
    few_low, few_high = measured(target[:8]).expected_interval
    assert few_high - few_low > high - low
    more, text = 100 * low, found.sentence()
    assert f"{100 * found.expected_accuracy:.0f} % ({more:.0f} to {100 * high:.0f})" in text
    assert measured(target) == found
    assert measured(target, seed=1).frechet != found.frechet


def test_a_file_or_data_in_place_of_statistics(tmp_path):
    model, statistics = trained()
    target = pictures(LABELS[:40], seed=9)
    want = measured(target)
    assert shift(model, statistics.save(tmp_path / "s"), target, repeats=10) == want
    assert shift(model, pictures(LABELS), target, labels=LABELS, repeats=10) == want
    loader = torch.utils.data.DataLoader([(x, 0) for x in target], batch_size=7)
    assert shift(model, statistics, loader, repeats=10) == want
    found, said = features_of(model, target, 64)
    second = second_opinion(model, target, model)
    assert compare(statistics, found, said.probabilities, second, repeats=10) == want


def test_without_labels_of_the_source_the_verdict_is_by_confidence():
    model, statistics = trained()
    found = shift(model, pictures(LABELS), pictures(LABELS) * 0.1, repeats=2)
    assert found.expected_accuracy is None
    now = second_opinion(model, pictures(LABELS) * 0.1, model)
    with torch.no_grad():
        want = statistics.agreement - now.agreement(model(pictures(LABELS) * 0.1).softmax(1))
    assert found.expected_drop == pytest.approx(want)
    assert found.verdict == verdict(want, found.frechet.value)
    assert "points less steady or sure" in found.sentence()


def test_a_model_without_batch_norm_is_judged_by_its_confidence():
    model, source, target = tiny_vit(), pictures(LABELS), 0.1 * pictures(LABELS)
    with torch.no_grad():
        before, after = (model(x).softmax(1) for x in (source, target))
    labels = before.argmax(1)
    labels[::3] += 1
    found = shift(model, source, target, labels=labels, repeats=2)
    sure, source_sure = after.amax(1)[:, None], before.amax(1)
    surer = float((sure > source_sure).double().mean() + (sure == source_sure).double().mean() / 2)
    assert found.expected_accuracy == pytest.approx(2 / 3 * min(1, 2 * surer))
    low, high = found.expected_interval
    assert 0 <= low < found.expected_accuracy < high < 2 / 3
    assert found.expected_drop == pytest.approx(2 / 3 - found.expected_accuracy)
    assert "by how sure the model is, a weak sign: it can be wrong" in found.caveat
    found = shift(model, source, target, repeats=2)
    want = float(before.amax(1).mean() - after.amax(1).mean())
    assert found.expected_drop == pytest.approx(want, abs=1e-5)


def test_a_model_with_an_adapter_is_looked_at_with_and_without_it():
    model = timm.create_model("test_efficientnet", num_classes=4)
    model.load_state_dict(trained()[0].state_dict())
    target = pictures(LABELS[:40], seed=9)
    want = measured(target)
    inject(model, LoRAConfig(rank=2))
    same = shift(model, trained()[1], target, repeats=10)
    assert (same.agreement, same.frechet) == (1.0, want.frechet)
    randomise(model, std=3.0)
    found = shift(model, trained()[1], target, repeats=10)
    assert (found.frechet, found.layers) == (want.frechet, want.layers)
    model.eval()
    with torch.no_grad():
        said = model(target).argmax(1)
        source = trained()[0](target).argmax(1)
    assert found.agreement == float((said == source).double().mean()) < 1
    merge(model)
    assert shift(model, trained()[1], target, repeats=10).agreement == found.agreement
    assert "adapter keeps" in found.sentence()
    second = second_opinion(trained()[0], target, trained()[0])
    with torch.no_grad():
        parts = (second.agreement(m(target)) for m in (model.eval(), trained()[0]))
    ratio = trained()[1].accuracy / trained()[1].agreement
    assert found.expected_adapted == pytest.approx(ratio * sum(parts) / 2)


def test_the_entry_is_where_half_of_the_way_was_gone():
    found = measured(pictures(LABELS) * 0.2 + 2)
    most = max(found.layers.values())
    names = list(found.layers)
    before = names[: names.index(found.entry)]
    assert found.layers[found.entry] >= most / 2
    assert all(found.layers[n] < most / 2 for n in before)


def test_proxy_a_distance():
    a = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    b = torch.randn(130, 5, generator=torch.Generator().manual_seed(1))
    assert proxy_a_distance(a, b).value < 0.3
    assert proxy_a_distance(a, b + 20) == (2, 2, 2)
    between = proxy_a_distance(a, b + 0.5)
    assert 0.2 < between.low < between.value < between.high < 2
    with pytest.raises(DataError, match="two items of each domain, got 1"):
        proxy_a_distance(a, b[:1])


def test_thresholded_confidence_is_the_accuracy_on_the_source_itself():
    confidence = torch.rand(200, generator=torch.Generator().manual_seed(0))
    for accuracy in (0.0, 0.25, 0.8, 1.0):
        assert thresholded_confidence(confidence, confidence, accuracy) == pytest.approx(accuracy)
    assert thresholded_confidence(confidence / 2, confidence, 0.25) == 0
    assert thresholded_confidence(confidence + 1, confidence, 0.25) == 1
    with pytest.raises(DataError, match="accuracy in"):
        thresholded_confidence(confidence, confidence, 80)


def test_verdicts_by_their_thresholds():
    drops = [-0.1, NEAR - 1e-6, NEAR, FAR - 1e-6, FAR, 1.0]
    names = ["near", "near", "adaptable", "adaptable", "too far", "too far"]
    assert [verdict(x) for x in drops] == names
    assert (verdict(0.0, frechet=0.99), verdict(0.0, frechet=1.0)) == ("near", "too far")


def test_what_is_printed_fits_a_terminal_and_owns_up():
    for target in (pictures(LABELS), pictures(LABELS) * 0.1 + 2.7):
        text = str(measured(target, repeats=2))
        assert max(map(len, text.splitlines())) <= 80
        flat = " ".join(text.split())
        assert "and how steady the answers are: it can be wrong" in flat
        assert "proxy A-distance" in flat
    assert "shift: too far" in flat
    assert "enters at blocks." in flat


def test_the_profile_in_words():
    found = measured(pictures(LABELS) * 0.1 + 2.7, repeats=2)
    first, last = next(iter(found.layers)), list(found.layers)[-1]
    early = dataclasses.replace(found, layers={first: 2.0, last: 3.0})
    assert f"enters at {first}, the first block: adapt every layer" in early.sentence()
    late = dataclasses.replace(found, layers={first: 0.2, last: 3.0})
    assert f"enters at {last}, what is before it hardly moved" in late.sentence()
    assert dataclasses.replace(found, layers={}).entry is None


def test_plain_values_go_into_json():
    found = measured(pictures(LABELS[:10]), repeats=2)
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["verdict"] == found.verdict
    assert plain["frechet"]["value"] == found.frechet.value
    assert plain["entry"] == found.entry


def test_bad_input_says_what_is_wrong():
    model, statistics = trained()
    with pytest.raises(DataError, match="two items of the target or more, got 1"):
        measured(pictures(LABELS[:1]))
    with pytest.raises(ConfigError, match="of test_efficientnet, this is test_resnet"):
        shift(timm.create_model("test_resnet", num_classes=4), statistics, pictures(LABELS))
    found, said = features_of(model, pictures(LABELS[:10]), 64)
    found["blocks.1"] = found["blocks.1"][:, :3]
    with pytest.raises(ConfigError, match=r"at 'blocks\.1' they have 24 features, this model 3"):
        compare(statistics, found, said.probabilities)
    del found["blocks.1"]
    with pytest.raises(ConfigError, match="this model none"):
        compare(statistics, found, said.probabilities)
