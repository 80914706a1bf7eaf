"""`ConformerCTC`: independence of the batch, files, adapters."""

import math

import pytest
import torch
from torch import nn

from lora_lightning import LoRAConfig, inject, merge, remove, verify
from lora_lightning.errors import ConfigError
from lora_lightning.speech.data.utterances import AudioBatch
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.named_recogniser import named_recogniser
from lora_lightning.speech.tasks.recognisers import ConformerCTC, load_recogniser, save_recogniser
from tests.helpers.files import rewrite
from tests.helpers.speech import TINY, conformer, sounds
from tests.helpers.training import randomise


@pytest.fixture
def model():
    return conformer().eval()


@pytest.mark.parametrize("adapted", [False, True])
def test_padding_changes_nothing(model, adapted):
    if adapted:
        inject(model, LoRAConfig(rank=2, target_modules="all"))
        randomise(model)
    waveforms = sounds(0.61, 1.4, 0.33)
    batch = AudioBatch.of(waveforms, [])
    together, frames = model(batch.waveforms, batch.lengths)
    for row, waveform, count in zip(together, waveforms, frames, strict=True):
        alone, own = model(waveform[None], torch.tensor([len(waveform)]))
        assert own.item() == count.item() == alone.shape[1]
        torch.testing.assert_close(row[:count], alone[0], rtol=1e-4, atol=1e-5)


def test_without_the_mask_padding_would_matter(model):
    """The check above can fail: torchaudio's Conformer alone looks into the padding."""
    for layer in model.encoder.conformer_layers:
        layer.conv_module.sequential[1] = nn.GLU(dim=1)
    waveforms = sounds(0.61, 1.4)
    batch = AudioBatch.of(waveforms, [])
    together, frames = model(batch.waveforms, batch.lengths)
    alone, _ = model(waveforms[0][None], torch.tensor([len(waveforms[0])]))
    assert not torch.allclose(together[0, : frames[0]], alone[0], rtol=1e-4, atol=1e-5)


def test_lengths_may_be_left_out(model):
    waveform = sounds(0.5)[0][None]
    given, frames = model(waveform, torch.tensor([waveform.shape[1]]))
    assumed, same = model(waveform)
    assert torch.equal(given, assumed)
    assert torch.equal(frames, same)


def test_silence_and_a_single_sample_are_no_trouble(model):
    logits, _ = model(torch.zeros(2, 4000), torch.tensor([4000, 1]))
    assert logits.isfinite().all()


@pytest.mark.parametrize("targets", ["auto", "all"])
def test_adapters_are_alive_and_merge(model, targets):
    batch = AudioBatch.of(sounds(0.5, 0.7), [])
    before, _ = model(batch.waveforms, batch.lengths)
    report = inject(model, LoRAConfig(rank=2, target_modules=targets))
    assert not any(row.module == "head" for row in report.rows)
    verify(model, (batch.waveforms, batch.lengths))
    randomise(model)
    adapted, _ = model(batch.waveforms, batch.lengths)
    assert not torch.allclose(before, adapted)
    merge(model)
    merged, _ = model(batch.waveforms, batch.lengths)
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)
    remove(model)
    assert torch.equal(model(batch.waveforms, batch.lengths)[0], before)


def test_the_augmentation_is_for_training_only(model):
    class Mute(nn.Module):
        def forward(self, x):
            return x * 0

    waveform = sounds(0.5)[0][None]
    plain, _ = model(waveform)
    model.augment = Mute()
    assert torch.equal(model(waveform)[0], plain)
    model.train()
    assert not torch.allclose(model(waveform)[0], plain)


def test_a_file_tells_how_the_model_is_built(model, tmp_path):
    model = ConformerCTC(Labels(["_", " ", "b", "a"]), sample_rate=8000, **TINY).half().float()
    path = tmp_path / "deep" / "model.safetensors"
    save_recogniser(model, path)
    again = load_recogniser(path)
    assert again.labels == model.labels
    assert again.sample_rate == 8000
    assert not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def settings(**values):
    return lambda tensors, header: header["settings"].update(values)


def labels(**values):
    return lambda tensors, header: header["labels"].update(values)


BROKEN = {
    "as wide as 4,096": (settings(dim=4096), r"settings ask for \(4096, "),
    "as deep as 100": (settings(num_layers=100), "conformer_layers.99.* is missing"),
    "too deep": (settings(num_layers=10**6), r"settings\.num_layers \(expected a whole number"),
    "a wide filter": (settings(kernel_size=15), r"settings ask for \(16, 1, 15\)"),
    "another rate": (settings(sample_rate=96_000), r"settings ask for \(2400,\)"),
    "no rate": (settings(sample_rate=0), r"settings\.sample_rate"),
    "a text for a number": (settings(dim="16"), r"settings\.dim"),
    "heads that do not divide": (settings(num_heads=3), "num_heads must divide dim"),
    "dropout of NaN": (settings(dropout=math.nan), r"settings\.dropout"),
    "an unknown setting": (settings(depth=3), "no such setting"),
    "a missing setting": (lambda t, h: h["settings"].pop("dim"), r"settings\.dim \(missing\)"),
    "settings in a list": (lambda t, h: h.update(settings=[]), "settings"),
    "labels of numbers": (labels(symbols=[1, 2, 3]), r"labels\.symbols\[0\]"),
    "more labels": (labels(symbols=[" ", "a", "b", "c", "d"]), "settings ask for"),
    "a label twice": (lambda t, h: h["labels"]["symbols"].__setitem__(3, " "), "occur again"),
    "no separator": (labels(separator=None), r"labels\.separator"),
    "a blank that is none": (labels(blank=10**9), "blank must be a class"),
    "another format": (lambda t, h: h.update(format=True), "not written by save_recogniser"),
    "NaN": (lambda t, h: t["head.bias"].fill_(math.nan), r"head\.bias holds NaN"),
    "whole numbers": (lambda t, h: t.update({"head.bias": t["head.bias"].int()}), "torch.int32"),
    "a tensor less": (lambda t, h: t.pop("head.bias"), "no model that can be built"),
    "a tensor more": (lambda t, h: t.update(x=t["head.bias"] + 1), "no model that can be built"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_whose_values_cannot_be_is_refused(model, tmp_path, how):
    change, message = BROKEN[how]
    path = tmp_path / "model.safetensors"
    save_recogniser(model, path)
    rewrite(path, change, key="recogniser")
    with pytest.raises(ConfigError, match=message):
        load_recogniser(path)


def test_a_file_that_changed_since_it_was_written_is_refused(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_recogniser(model, path)
    for change in (settings(dropout=0.5), lambda t, h: t["head.bias"].add_(1)):
        rewrite(path, change, sign=False, key="recogniser")
        with pytest.raises(ConfigError, match="its checksum is not that of its contents"):
            load_recogniser(path)
    rewrite(path, lambda t, h: h.pop("checksum"), key="recogniser")
    load_recogniser(path)  # as one of before the checksum


def test_the_packaged_recogniser_is_found_by_its_name():
    found = named_recogniser("spoken")
    assert found.sample_rate == 16000
    assert len(found.labels) == 29
    assert found.model(torch.randn(1, 8000))[0].shape[2] == 29


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"no recogniser's file .*nowhere"):
        load_recogniser(tmp_path / "nowhere.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="damaged"):
        load_recogniser(tmp_path / "x.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ConfigError, match="not written by save_recogniser"):
        load_recogniser(tmp_path / "y.safetensors")
    with pytest.raises(ConfigError, match="a checkpoint is for a torchaudio bundle"):
        named_recogniser("spoken", tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide dim; got num_heads=3, dim=16"),
        ({"kernel_size": 8}, "kernel_size must be odd, got 8"),
    ],
)
def test_sizes_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        ConformerCTC(**{**TINY, **settings})
