"""Classification: mismatched encoders and heads."""

import pytest
import torch
from torch import nn

from lora_lightning.errors import ConfigError
from lora_lightning.speech.tasks.utterance_tasks import AudioClassification, Pooled


class Fixed(nn.Module):
    """Returns a fixed output."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, waveforms, lengths):
        return self.output


def test_an_encoder_of_the_whole_recording_is_not_averaged():
    torch.manual_seed(0)
    features = torch.randn(3, 5)
    model = Pooled(Fixed(features), 5, 2)
    torch.testing.assert_close(model(torch.zeros(3, 9)), model.head(features), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5)])
def test_another_width_is_told(shape):
    model = Pooled(Fixed(torch.zeros(shape)), 7, 2)
    with pytest.raises(ConfigError, match="Fixed gives 5 features, the head takes 7; give dim=5"):
        model(torch.zeros(3, 9))


@pytest.mark.parametrize("outputs", [2, 4])
def test_another_number_of_classes_is_told(outputs):
    task = AudioClassification(Fixed(torch.zeros(3, outputs)), ["a", "b", "c"])
    with pytest.raises(ConfigError, match=f"gives {outputs} numbers.*each of the 3 classes"):
        task(torch.zeros(3, 9))
