"""Transducer: mismatched models, labels and features; half precision."""

import pytest
import torch

from lora_lightning.errors import ConfigError
from lora_lightning.speech.data.utterances import AudioBatch, Utterance
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.transducer import RNNTMel, TransducerRecognition
from tests.helpers import audio_zoo
from tests.helpers.speech import sounds
from tests.speech.test_tasks import LETTERS


def test_labels_of_another_model_are_told():
    model, _ = audio_zoo.build("RNN-T")
    with pytest.raises(ConfigError, match="RNNT has 9 classes, the labels are 29"):
        TransducerRecognition(model, Labels.english(), RNNTMel(n_mels=8))


def test_features_of_another_model_are_told():
    model, _ = audio_zoo.build("RNN-T")
    task = TransducerRecognition(model, LETTERS)
    with pytest.raises(ConfigError, match="have 80 bands, which the model's first layer, of 8"):
        task.transcribe(AudioBatch.of(sounds(0.3), [Utterance("a.wav")]))


def test_half_precision_does_not_overflow_in_the_mel():
    waveforms, lengths = sounds(0.5)[0][None], torch.tensor([8000])
    expected, _ = RNNTMel()(waveforms, lengths)
    with torch.autocast("cpu", torch.float16):
        found, _ = RNNTMel()(waveforms, lengths)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
