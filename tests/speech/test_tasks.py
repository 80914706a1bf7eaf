"""Transducer, classification, regression and synthesis: losses, padding, training adapters."""

import json
import math

import pytest
import torch
from torch import nn

from lora_lightning import LoRACallback, disabled, inject, remove
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.speech.data.speech_data import SpeechData
from lora_lightning.speech.data.utterances import AudioBatch, Utterance
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.synthesis import Tacotron2Synthesis
from lora_lightning.speech.tasks.transducer import RNNTMel, TransducerRecognition
from lora_lightning.speech.tasks.utterance_tasks import AudioClassification, AudioRegression, Pooled
from tests.helpers import audio_zoo
from tests.helpers.speech import batch_of, conformer, sounds, written
from tests.helpers.training import randomise, trainer

LETTERS = Labels([*" abcdefg", "<blank>"], blank=8)
SYMBOLS = Labels(["_", " ", *"abcdefg"])


@pytest.fixture
def recordings(tmp_path):
    return written(
        tmp_path,
        sounds(0.5, 0.8, 0.6, 1.1),
        text=lambda i: ("beg", "ab cad")[i % 2],
        target=lambda i: ("yes", "no")[i % 2],
    )


def numbered(recordings):
    return [Utterance(u.path, target=float(i)) for i, u in enumerate(recordings)]


def whole(recordings):
    data = SpeechData(test=recordings, batch_seconds=60)
    data.setup()
    return next(iter(data.test_dataloader()))


def transducer(**settings):
    model, _ = audio_zoo.build("RNN-T")
    return TransducerRecognition(model, LETTERS, RNNTMel(n_mels=8), **settings)


def classification():
    model = Pooled(conformer(), 29, 2)
    return AudioClassification(model, ["yes", "no"], 2e-2, schedule="constant")


def regression():
    return AudioRegression(Pooled(conformer(), 29, 1), 2e-2, schedule="constant")


def synthesis(**settings):
    model, _ = audio_zoo.build("Tacotron2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return Tacotron2Synthesis(
        model, SYMBOLS, 16000, 400, 200, 2e-2, schedule="constant", **settings
    )


def loss_of(task, batch):
    task.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # Tacotron2's prenet drops out in eval as well
        if isinstance(task, (AudioClassification, AudioRegression)):
            output = task(batch.waveforms, batch.lengths)
            return task.loss(output, task.targets(batch.items)).item()
        return task.loss(batch).item()


@pytest.mark.parametrize("make", [transducer, classification, regression, synthesis])
def test_an_adapter_learns_through_the_trainer(make, recordings, tmp_path):
    if make is regression:
        recordings = numbered(recordings)
    task = make()
    batch = whole(recordings)
    source = {k: v.clone() for k, v in task.model.state_dict().items()}
    before = loss_of(task, batch)
    callback = LoRACallback(rank=2, target_modules="auto", clamp_rank=True)
    task.train()
    trainer(tmp_path, callback, max_epochs=4).fit(task, SpeechData(train=recordings))
    assert loss_of(task, batch) < before
    with disabled(task.model):
        assert loss_of(task, batch) == pytest.approx(before, rel=1e-5)
    remove(task.model)
    for name, value in task.model.state_dict().items():
        if name in source:
            assert torch.equal(value, source[name]), name


# Transducer


def test_the_transducer_loss_does_not_depend_on_the_batch():
    task = transducer().eval()
    waveforms, texts = sounds(0.5, 0.9), ["ab", "cafe"]
    items = [Utterance(f"{i}.wav", t) for i, t in enumerate(texts)]
    both = task.loss(AudioBatch.of(waveforms, items))
    alone = [task.loss(AudioBatch.of([w], [i])) for w, i in zip(waveforms, items, strict=True)]
    # The last window looks into reflected sound alone, and into zeros in a batch.
    torch.testing.assert_close(both, torch.stack(alone).mean(), rtol=2e-2, atol=0)


def test_the_transducer_writes_what_torchaudios_search_finds(recordings, tmp_path):
    task = transducer().eval()
    recordings = recordings[:2]
    texts = task.transcribe(whole(recordings))
    assert len(texts) == 2
    assert all(set(text) <= set(" abcdefg") for text in texts)
    (found,) = trainer(tmp_path).test(task, SpeechData(test=recordings), verbose=False)
    assert found["test_cer"] >= 0
    assert set(found) == {"test_wer", "test_cer"}


def test_mel_of_the_pipeline(tmp_path):
    path = tmp_path / "stats.json"
    path.write_text(json.dumps({"mean": [1.0] * 8, "invstddev": [2.0] * 8}))
    waveforms, lengths = sounds(0.5)[0][None], torch.tensor([8000])
    plain, frames = RNNTMel(n_mels=8)(waveforms, lengths)
    normalised, _ = RNNTMel(n_mels=8, statistics=path)(waveforms, lengths)
    assert frames.item() == plain.shape[2]
    torch.testing.assert_close(normalised, (plain - 1) * 2)
    with pytest.raises(ConfigError, match="has 8 bands, expected 9"):
        RNNTMel(n_mels=9, statistics=path)
    with pytest.raises(ConfigError, match="no JSON file with the lists"):
        RNNTMel(statistics=tmp_path / "none.json")


def test_the_mel_equals_torchaudios_own():
    from torchaudio.pipelines import rnnt_pipeline

    waveform = sounds(0.4)[0]
    mel = RNNTMel()
    # torchaudio's function writes into its argument.
    expected = rnnt_pipeline._piecewise_linear_log(mel.mel(waveform) * rnnt_pipeline._gain)
    found, _ = mel(waveform[None], torch.tensor([len(waveform)]))
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


# Classification and regression


def test_padding_does_not_enter_the_mean():
    model = Pooled(conformer().eval(), 29, 3)
    waveforms = sounds(0.4, 1.0)
    batch = AudioBatch.of(waveforms, [])
    together = model(batch.waveforms, batch.lengths)
    alone = model(waveforms[0][None], torch.tensor([len(waveforms[0])]))
    torch.testing.assert_close(together[0], alone[0], rtol=1e-4, atol=1e-5)


def test_an_encoder_without_lengths():
    class Frames(nn.Module):
        def forward(self, waveforms, lengths):
            return waveforms[:, :60].reshape(-1, 20, 3)

    model = Pooled(Frames(), 3, 2)
    assert model(torch.randn(2, 80)).shape == (2, 2)


def test_metrics_of_both(recordings, tmp_path):
    (found,) = trainer(tmp_path).test(classification(), SpeechData(test=recordings), verbose=False)
    assert found["test_accuracy"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    task = regression()
    data = SpeechData(test=numbered(recordings))
    (found,) = trainer(tmp_path).test(task, data, verbose=False)
    predicted = torch.cat(trainer(tmp_path).predict(task, data))
    error = (predicted - torch.arange(4.0)).abs().mean()
    assert found["test_mae"] == pytest.approx(error.item(), rel=1e-4)
    assert -1 <= found["test_correlation"] <= 1


def test_bad_targets_are_named(recordings):
    with pytest.raises(DataError, match="did you mean 'yes'"):
        classification().targets([Utterance("a.wav", target="yess")])
    with pytest.raises(DataError, match=r"a\.wav: no class"):
        classification().targets([Utterance("a.wav")])
    for bad in ("old", None, math.nan):
        with pytest.raises(DataError, match="target must be a finite number"):
            regression().targets([Utterance("a.wav", target=bad)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AudioClassification(nn.Identity(), ["a"]), "two or more different names"),
        (lambda: AudioClassification(nn.Identity(), ["a", "b"], label_smoothing=1.0), r"\[0, 1\)"),
        (lambda: AudioRegression(nn.Identity(), error="cubic"), "'absolute'; got 'cubic'"),
        (lambda: transducer(beam_size=0), "beam_size must be a whole number of at least 1"),
        (
            lambda: Tacotron2Synthesis(
                audio_zoo.build("Tacotron2")[0], Labels([" ", *"abcdefghijk"], blank=1)
            ),
            "labels has 12 symbols, the model 9",
        ),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# Synthesis


def test_the_mel_loss_does_not_see_the_padding():
    task = synthesis().eval()
    task.model.decoder.prenet.layers = nn.ModuleList()  # its dropout cannot be switched off
    task.model.decoder.prenet.forward = lambda x: x.new_zeros(*x.shape[:-1], 8)
    waveforms, texts = sounds(0.3, 0.3), ["ab", "abcd"]
    batch = batch_of(waveforms, texts)
    longer = AudioBatch(nn.functional.pad(batch.waveforms, (0, 2000)), batch.lengths, batch.items)
    # torchaudio's postnet looks a few frames into it; counted, it would be half of the loss.
    assert longer.waveforms.shape[1] > 1.3 * batch.waveforms.shape[1]
    assert task.loss(longer).item() == pytest.approx(task.loss(batch).item(), rel=2e-2)


def test_an_adapter_changes_the_voice_and_its_removal_gives_it_back():
    task = synthesis().eval()
    task.model.decoder.decoder_max_step, task.model.decoder.gate_threshold = 12, 1.0

    def spoken():
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="Reached max decoder steps"):
            return task.model.infer(torch.tensor([[2, 3, 4]]), torch.tensor([3]))[0]

    source = spoken()
    inject(task.model, rank=2, target_modules="auto", clamp_rank=True)
    randomise(task.model)
    assert not torch.allclose(spoken(), source, atol=1e-3)
    remove(task.model)
    assert torch.equal(spoken(), source)


def test_synthesis_gives_sound():
    task = synthesis().eval()
    task.model.decoder.decoder_max_step, task.model.decoder.gate_threshold = 12, 1.0
    with pytest.warns(UserWarning, match="Reached max decoder steps"):
        waveform = task.synthesise("a bad cab")
    assert waveform.dim() == 1
    assert waveform.isfinite().all()
    with pytest.raises(DataError, match="'xyz' has no symbol"):
        task.synthesise("xyz")
