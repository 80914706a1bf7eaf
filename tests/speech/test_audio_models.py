"""torchaudio's bundles and factories by name, with local weights in place of a download."""

import dataclasses
import urllib.error

import pytest
import torch
import torchaudio.models as ta
from torchaudio import pipelines

from lora_lightning.errors import ConfigError
from lora_lightning.runner.weights import save_weights
from lora_lightning.speech.tasks.audio_models import load_audio_model
from lora_lightning.speech.tasks.named_recogniser import named_recogniser
from tests.helpers import audio_zoo

BUNDLES = [n for n in pipelines.__all__ if not isinstance(getattr(pipelines, n), type)]


@pytest.fixture
def tiny(monkeypatch):
    """`WAV2VEC2_ASR_LARGE_LV60K_960H` at a tiny size: with normalised waveforms."""
    bundle = pipelines.WAV2VEC2_ASR_LARGE_LV60K_960H
    params = {**audio_zoo._WAV2VEC2, **audio_zoo._LARGE, "aux_num_out": 29}
    small = dataclasses.replace(bundle, _params=params)
    monkeypatch.setattr(pipelines, "WAV2VEC2_ASR_LARGE_LV60K_960H", small)
    torch.manual_seed(0)
    return ta.wav2vec2_model(**params).eval()


def test_a_bundle_with_local_weights(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "w.pth")
    found = load_audio_model("WAV2VEC2_ASR_LARGE_LV60K_960H", tmp_path / "w.pth")
    assert (found.kind, found.sample_rate, len(found.labels)) == ("ctc", 16000, 29)
    waveform = 3 + torch.randn(1, 2400)
    normalised = torch.nn.functional.layer_norm(waveform, waveform.shape)
    assert torch.equal(found.model(waveform)[0], tiny(normalised)[0])


def test_the_weights_of_the_wrapper_that_normalises(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "w.pth")
    found = load_audio_model("WAV2VEC2_ASR_LARGE_LV60K_960H", tmp_path / "w.pth")
    torch.save(found.model.state_dict(), tmp_path / "wrapped.pth")
    again = load_audio_model("WAV2VEC2_ASR_LARGE_LV60K_960H", tmp_path / "wrapped.pth")
    assert torch.equal(again.model.model.aux.weight, tiny.aux.weight)


def test_the_aligners_star_is_no_class(monkeypatch, tmp_path):
    params = {**audio_zoo._WAV2VEC2, **audio_zoo._LARGE, "aux_num_out": 28}
    small = dataclasses.replace(pipelines.MMS_FA, _params=params)
    monkeypatch.setattr(pipelines, "MMS_FA", small)
    torch.save(ta.wav2vec2_model(**params).state_dict(), tmp_path / "w.pth")
    found = load_audio_model("MMS_FA", tmp_path / "w.pth")
    assert found.model(torch.randn(1, 2400))[0].shape[2] == len(found.labels) == 28


def test_classes_that_torchaudio_leaves_out(tiny, tmp_path):
    weights = tiny.state_dict()
    for key in ("aux.weight", "aux.bias"):  # 3 unused ones after the blank, as fairseq has them
        unused = torch.full((3, *weights[key].shape[1:]), 9.0)
        weights[key] = torch.cat([weights[key][:1], unused, weights[key][1:]])
    torch.save(weights, tmp_path / "w.pth")
    found = load_audio_model("WAV2VEC2_ASR_LARGE_LV60K_960H", tmp_path / "w.pth")
    assert torch.equal(found.model.model.aux.weight, tiny.aux.weight)


def test_a_bundle_is_a_named_recogniser(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "w.pth")
    found = named_recogniser("WAV2VEC2_ASR_LARGE_LV60K_960H", tmp_path / "w.pth")
    assert found.labels.separator == "|"
    assert found.labels.normalise("it's me") == "IT'S ME"
    with pytest.raises(ConfigError, match="does not write text"):
        named_recogniser("conv_tasnet_base")
    # A file of its weights says the labels that they were trained with.
    found.tell({"labels": {**found.labels.spelt(), "separator": "E"}, "sample_rate": 8000})
    save_weights(found.model, tmp_path / "own.safetensors")
    again = named_recogniser("WAV2VEC2_ASR_LARGE_LV60K_960H", tmp_path / "own.safetensors")
    assert (again.labels.separator, again.sample_rate) == ("E", 8000)


@pytest.mark.parametrize("name", BUNDLES)
def test_a_download_that_fails_says_what_to_do(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    bundle = getattr(pipelines, name)
    for loader in ("_get_state_dict", "_get_model", "get_tacotron2", "get_model"):
        if hasattr(type(bundle), loader):
            monkeypatch.setattr(type(bundle), loader, refuse)
    with pytest.raises(ConfigError, match=rf"{name} could not be fetched .*no network") as error:
        load_audio_model(name)
    text = str(error.value)
    assert "https://" in text
    assert "checkpoint=" in text


def test_weights_that_do_not_fit_are_named(tiny, tmp_path):
    weights = tiny.state_dict()
    del weights["aux.bias"]
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"aux\.bias is missing"):
        load_audio_model("WAV2VEC2_ASR_LARGE_LV60K_960H", tmp_path / "w.pth")


def test_factories(tmp_path):
    settings = {"num_sources": 2, "enc_kernel_size": 8, "enc_num_feats": 12, "msk_num_feats": 8,
                "msk_num_hidden_feats": 12, "msk_num_layers": 2, "msk_num_stacks": 2}  # fmt: skip
    found = load_audio_model("ConvTasNet", **settings)
    torch.save(found.model.state_dict(), tmp_path / "w.pth")
    again = load_audio_model("ConvTasNet", tmp_path / "w.pth", **settings)
    assert torch.equal(again.model(torch.ones(1, 1, 80)), found.model(torch.ones(1, 1, 80)))
    assert found.kind == "factory"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("WAV2VEC2_ASR_BASE_960", {}, "did you mean 'WAV2VEC2_ASR_BASE_960H'"),
        ("Conformr", {}, "did you mean 'Conformer'"),
        ("Conformer", {"width": 3}, "width"),
        ("WAVLM_BASE", {"width": 3}, "is a bundle and takes no settings"),
    ],
)
def test_what_is_not_there(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_audio_model(name, **settings)
