"""Synthesis: inference after training, unsupported models, half precision, padding."""

import pytest
import torch
from torch import nn

from lora_lightning.errors import ConfigError
from lora_lightning.speech.data.utterances import AudioBatch, Utterance
from lora_lightning.speech.tasks.synthesis import Tacotron2Synthesis
from tests.helpers import audio_zoo
from tests.helpers.speech import batch_of, sounds
from tests.speech.test_tasks import SYMBOLS, synthesis


def test_a_model_in_training_mode_speaks_in_eval_mode():
    task = synthesis()
    task.model.decoder.decoder_max_step, task.model.decoder.gate_threshold = 12, 1.0
    task.model.train()
    frozen = next(m for m in task.model.modules() if isinstance(m, nn.BatchNorm1d)).eval()
    modes = [m.training for m in task.model.modules()]
    state = {k: v.clone() for k, v in task.model.state_dict().items()}
    spoken = []
    for mode in (None, task.model.eval):
        if mode is not None:
            mode()
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="Reached max decoder steps"):
            spoken.append(task.synthesise("a bad cab", vocoder=nn.Identity()))
        if mode is None:
            assert [m.training for m in task.model.modules()] == modes
    assert torch.equal(*spoken)
    assert not frozen.training
    assert all(torch.equal(v, state[k]) for k, v in task.model.state_dict().items())


def test_masks_in_place_are_told():
    model, _ = audio_zoo.build("Tacotron2")
    model.mask_padding = True
    with pytest.raises(ConfigError, match=r"set model\.mask_padding = False"):
        Tacotron2Synthesis(model, SYMBOLS)


def test_half_precision_keeps_the_features():
    task, batch = synthesis(), batch_of(sounds(0.3), ["ab"])
    expected, _ = task.features(batch.waveforms, batch.lengths)
    with torch.autocast("cpu", torch.float16):
        found, _ = task.features(batch.waveforms, batch.lengths)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("texts", "tolerance"),
    # torchaudio's encoder looks a few symbols into the padding of a text.
    [(["ab", "cd", "ef"], 1e-5), (["ab", "abcd", "a"], 1e-2)],
)
def test_a_batch_is_the_mean_over_frames_of_its_recordings(texts, tolerance):
    task = synthesis().eval()
    # The prenet's dropout cannot be switched off, and the postnet looks into the padding.
    task.model.decoder.prenet.forward = lambda x: x.new_zeros(*x.shape[:-1], 8)
    task.model.postnet.forward = torch.zeros_like
    waveforms = sounds(0.5, 0.3, 0.8)
    items = [Utterance(f"{i}.wav", t) for i, t in enumerate(texts)]
    alone = [AudioBatch.of([w], [i]) for w, i in zip(waveforms, items, strict=True)]
    # Silence at the end: a recording's last window would be reflected, and zeros in a batch.
    for batch in alone:
        batch.waveforms[:, -400:] = 0.0
    together = AudioBatch.of([b.waveforms[0] for b in alone], items)
    frames = torch.tensor([float(b.lengths // task.hop + 1) for b in alone])
    losses = torch.stack([task.loss(b) for b in alone])
    mean = (losses * frames).sum() / frames.sum()
    torch.testing.assert_close(task.loss(together), mean, rtol=tolerance, atol=0)
