"""Self-training of a recogniser, through the real Trainer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_lightning import LoRACallback
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.speech.self_training import PseudoTranscriptCallback
from lora_lightning.speech.tasks.ctc import CTCRecognition
from lora_lightning.speech.tasks.lexicon import Lexicon
from lora_lightning.speech.tasks.recognisers import ConformerCTC
from lora_lightning.speech.transcript_guard import SpeechGuard, SpeechLimits, Understood
from tests.helpers.speech import AB, sounds, written
from tests.helpers.training import trainer


@pytest.fixture
def recordings(tmp_path):
    waveforms = sounds(*(0.5 + 0.05 * i for i in range(6)))
    return written(tmp_path, waveforms, text=lambda i: "a text that must not be learnt")


def recogniser():
    torch.manual_seed(1)
    model = ConformerCTC(AB, dim=16, num_layers=1, num_heads=2, ffn_dim=16, kernel_size=3)
    model.head.bias.data = torch.tensor([0.0, 0.2, 0.3, 0.3])  # it should say something
    return model.train()


def run(tmp_path, pseudo, model=None, learning_rate=1e-3, **settings):
    task = CTCRecognition(model or recogniser(), learning_rate=learning_rate, weight_decay=0.0)
    adapter = LoRACallback(
        rank=1, target_modules="all", trainable=[], output_dir=tmp_path, verify=False
    )
    given = {"max_steps": 6, "max_epochs": -1, "reload_dataloaders_every_n_epochs": 1}
    trainer(tmp_path, adapter, pseudo, **{**given, **settings}).fit(task, datamodule=pseudo.data)
    return task


def test_each_round_learns_more_sentences_of_the_lexicon(tmp_path, recordings):
    pseudo = PseudoTranscriptCallback(
        recordings, Lexicon(["ab", "ba"]), keep=[0.5, 1.0], limits=None, max_batch=2,
        teacher_decay=0.9,
    )  # fmt: skip
    run(tmp_path, pseudo)
    assert [r.index for r in pseudo.history_] == [0, 1, 2]
    assert [r.labelled for r in pseudo.history_[1:]] == [3, 6]
    words = {w for text in pseudo.pseudo_labels_.values() for w in text.split()}
    assert words <= {"ab", "ba"}
    assert pseudo.accepted_ == 2
    assert pseudo.termination_condition_ == "all rounds done"
    assert set(pseudo.transcripts_) == {str(u.path) for u in recordings}


def test_without_a_lexicon_what_is_stable_is_learnt(tmp_path, recordings):
    pseudo = PseudoTranscriptCallback(recordings, keep=[0.5], limits=None, max_batch=2)
    run(tmp_path, pseudo)
    source = pseudo.source_
    distances = [source[path].distance for path in pseudo.pseudo_labels_]
    assert len(pseudo.history_) == 2
    assert max(u.distance for u in source.values()) > 0
    assert all(d <= 1 for d in distances)


def test_at_an_alarm_the_source_comes_back(tmp_path, recordings):
    model = recogniser()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pseudo = PseudoTranscriptCallback(
        recordings, Lexicon(["ab"]), keep=[0.5, 1.0], limits=SpeechLimits(agreement=1.0),
        max_batch=2,
    )  # fmt: skip
    task = run(tmp_path, pseudo, model, learning_rate=1.0)
    assert pseudo.accepted_ == 0
    assert pseudo.termination_condition_.startswith("all rounds done, the last one with an alarm")
    assert pseudo.termination_condition_.endswith("(limits=None adapts all the same)")
    assert len(pseudo.history_) == 3  # the end of the schedule decides, not the first alarm
    assert not list(tmp_path.glob("*.safetensors"))
    assert pseudo.transcripts_ == pseudo.source_
    live = task.model.state_dict()
    assert all(torch.equal(live[k], v) for k, v in before.items())
    assert all(float(v.abs().sum()) == 0 for k, v in live.items() if k.endswith("lora_B"))


def test_the_guard_looks_at_the_decoding_with_the_lexicon():
    """Greedy transcripts may change as they like; the lexicon's sentences are compared."""
    lexicon = Lexicon(texts=["ab ba", "ba ab"])
    heard = {str(i): Understood("a", text, 0.5, 0.5) for i, text in enumerate(["ab ba", "ba ab"])}
    guard = SpeechGuard(heard, SpeechLimits(), lexicon, "--no-guard")

    def alarms(**change):
        return guard.check({k: replace(u, **change) for k, u in heard.items()}).alarms

    assert not alarms(written="bbbbbbb")
    [worse] = alarms(distance=0.6)
    assert "fit worse: 0.60 nats a frame" in worse
    assert "--no-guard" in worse
    [collapsed] = alarms(label="ab ab")
    assert "words are used less as in the lexicon" in collapsed
    assert (
        not SpeechGuard(heard, SpeechLimits(), Lexicon(["ab", "ba"]))
        .check({k: replace(u, label="ab ab") for k, u in heard.items()})
        .alarms
    )  # a bare list of words says nothing of how often each occurs


def test_a_recogniser_that_understands_nothing_is_told(tmp_path, recordings):
    model = recogniser()
    model.head.bias.data[0] = 100.0
    with pytest.raises(DataError, match="nothing is understood"):
        run(tmp_path, PseudoTranscriptCallback(recordings), model)


def test_mistakes_are_told(tmp_path, recordings):
    with pytest.raises(DataError, match="empty"):
        PseudoTranscriptCallback([])
    with pytest.raises(ConfigError, match="keep"):
        PseudoTranscriptCallback(recordings, keep=[0.0])
    with pytest.raises(ConfigError, match="reload_dataloaders_every_n_epochs"):
        run(tmp_path, PseudoTranscriptCallback(recordings), reload_dataloaders_every_n_epochs=0)
