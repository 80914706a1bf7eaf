"""CTC: labels, decoding against brute force, loss, padding, error rates, training."""

import itertools
import math

import pytest
import torch
from torch import nn

from lora_lightning import LoRACallback
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.speech.data.speech_data import SpeechData
from lora_lightning.speech.data.utterances import AudioBatch, Utterance
from lora_lightning.speech.tasks.ctc import CTCRecognition, spec_augment
from lora_lightning.speech.tasks.decoding import add, beam_search, greedy, prefixes
from lora_lightning.speech.tasks.labels import Labels
from tests.helpers.speech import AB, batch_of, conformer, sounds, wav2vec2, written
from tests.helpers.training import trainer

# Labels


def test_labels_there_and_back():
    labels = Labels.english()
    assert len(labels) == 29
    assert labels.decode(labels.encode("It's  FIVE o'clock,\n now!")) == "it's five o'clock now"


def test_labels_of_a_bundle():
    labels = Labels(["-", "|", "E", "T", "A"], separator="|")
    assert labels.normalise("tea  a é ж") == "TEA A E"
    assert labels.encode("tea a") == [3, 2, 4, 1, 4]
    assert labels.decode([1, 3, 2, 4, 1, 1, 4]) == "TEA A"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"symbols": ["-", " ", "a", "a"]}, "these occur again"),
        ({"symbols": ["-", "a"]}, "none of the symbols"),
        ({"symbols": ["-", " "], "blank": 2}, "blank must be a class of 0 to 1, got 2"),
    ],
)
def test_labels_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        Labels(**settings)


# Decoding


def collapse(path, blank=0):
    return tuple(c for c, _ in itertools.groupby(path) if c != blank)


def by_enumeration(frames):
    sums = {}
    for path in itertools.product(range(len(frames[0])), repeat=len(frames)):
        value = sum(frame[c] for frame, c in zip(frames, path, strict=True))
        key = collapse(path)
        sums[key] = add(sums.get(key, -math.inf), value)
    return sums


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_sums_every_alignment(seed):
    torch.manual_seed(seed)
    frames = (2 * torch.randn(5, 3)).log_softmax(1).double().tolist()
    exact = by_enumeration(frames)
    found = dict(prefixes(frames, blank=0, beam_size=10_000))
    assert found.keys() == exact.keys()
    for prefix, value in exact.items():
        assert found[prefix] == pytest.approx(value, abs=1e-9)
    assert next(iter(found)) == max(exact, key=exact.__getitem__)


def test_the_best_text_may_not_be_the_best_path():
    # Each frame's best is the blank, but both alignments of "a" together are likelier.
    log_probs = torch.tensor([[[0.5, 0.0, 0.4, 0.1]] * 2]).clamp_min(1e-9).log()
    lengths = torch.tensor([2])
    assert greedy(log_probs, lengths, AB) == [""]
    assert beam_search(log_probs, lengths, AB) == ["a"]


def test_decoding_stops_at_the_length():
    log_probs = torch.full((1, 4, 4), -9.0)
    for frame, c in enumerate((2, 2, 0, 3)):
        log_probs[0, frame, c] = 0.0
    for decode in (greedy, beam_search):
        assert decode(log_probs.log_softmax(2), torch.tensor([4]), AB) == ["ab"]
        assert decode(log_probs.log_softmax(2), torch.tensor([2]), AB) == ["a"]


def test_the_beam_must_have_a_size():
    with pytest.raises(ConfigError, match="beam_size must be a whole number of at least 1, got 0"):
        beam_search(torch.zeros(1, 1, 4), torch.tensor([1]), AB, beam_size=0)


@pytest.mark.parametrize("decode", [greedy, beam_search])
def test_nan_is_told_of_unless_it_is_padding(decode):
    log_probs = torch.zeros(2, 3, 4).log_softmax(2)
    log_probs[1, 2] = math.nan
    assert len(decode(log_probs, torch.tensor([3, 2]), AB)) == 2
    with pytest.raises(ConfigError, match="output for recording 1 of the batch is NaN"):
        decode(log_probs, torch.tensor([3, 3]), AB)


@pytest.mark.parametrize("decode", [greedy, beam_search])
def test_a_recording_without_frames_says_nothing(decode):
    assert decode(torch.zeros(1, 3, 4).log_softmax(2), torch.tensor([0]), AB) == [""]


# The task


def batch(*texts):
    return batch_of(sounds(0.6, 0.9, 0.4)[: len(texts)], texts)


MODELS = pytest.mark.parametrize("make", [conformer, wav2vec2])


@MODELS
def test_the_loss_of_a_recording_does_not_depend_on_its_batch(make):
    task = CTCRecognition(make().eval(), Labels.english())
    texts = ["ab", "one two", "a"]
    together = task.loss(batch(*texts))
    alone = [
        task.loss(AudioBatch.of([w], [Utterance("x", t)]))
        for w, t in zip(sounds(0.6, 0.9, 0.4), texts, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_sum_over_alignments():
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 4)

    class Fixed(nn.Module):
        def forward(self, waveforms, lengths):
            return logits, torch.tensor([4])

    task = CTCRecognition(Fixed(), AB)
    exact = by_enumeration(logits[0].log_softmax(1).tolist())[tuple(AB.encode("ab"))]
    assert task.loss(batch("ab")).item() == pytest.approx(-exact / 2, abs=1e-4)


def test_a_text_too_long_for_its_frames_is_named_once():
    task = CTCRecognition(conformer())
    long = batch("a" * 40, "a")
    with pytest.warns(UserWarning, match=r"0\.wav is too short for its text: \d+ frames, 79"):
        loss = task.loss(long)
    assert loss.isfinite()
    task.loss(long)  # a second warning would be an error


def test_training_needs_texts():
    task = CTCRecognition(conformer())
    with pytest.raises(DataError, match=r"1\.wav has no text to learn from"):
        task.loss(batch("a", ""))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": "best"}, "decoder must be 'greedy' or 'beam', got 'best'"),
        ({"beam_size": 0}, "beam_size must be a whole number of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"schedule": "step"}, "schedule must be one of"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        CTCRecognition(conformer(), **settings)


def test_a_model_without_labels_needs_some():
    with pytest.raises(ConfigError, match="Wav2Vec2Model has no labels of its own"):
        CTCRecognition(wav2vec2())


@pytest.mark.parametrize("more", [-3, 9])
def test_labels_of_another_model_are_told(more):
    symbols = [*Labels.english().symbols, *"0123456789"][: 29 + more]
    task = CTCRecognition(wav2vec2(), Labels(symbols))
    with pytest.raises(ConfigError, match=f"has 29 classes, the labels are {29 + more}"):
        task.loss(batch("a"))


@pytest.fixture
def recordings(tmp_path):
    return written(
        tmp_path, sounds(0.5, 0.8, 0.6, 1.1), text=lambda i: "one two" if i % 2 else "three"
    )


def test_rates_are_errors_over_words_of_the_whole_epoch(recordings, monkeypatch, tmp_path):
    task = CTCRecognition(conformer())
    # Three words of six are wrong, in batches of one and three recordings.
    monkeypatch.setattr(
        task, "transcribe", lambda b: ["one one" if t == "one two" else "" for t in b.texts]
    )
    data = SpeechData(test=recordings, max_batch=3)
    (found,) = trainer(tmp_path).test(task, data, verbose=False)
    assert found["test_wer"] == pytest.approx(4 / 6)
    characters = 2 * len("three") + 2 * 3  # "two" against "one": t→o, w→n, o→e
    assert found["test_cer"] == pytest.approx(characters / (2 * len("three") + 2 * len("one two")))


def test_validation_before_a_fit(recordings, tmp_path):
    task = CTCRecognition(conformer())
    data = SpeechData(train=recordings, validation=recordings, batch_seconds=10)
    trainer(tmp_path).validate(task, data, verbose=False)
    run = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=2)
    run.fit(task, data)
    assert 0 < run.logged_metrics["val_cer"] <= 1


@MODELS
def test_an_adapter_learns_through_the_trainer(make, recordings, tmp_path):
    model = make()
    source = {k: v.clone() for k, v in model.state_dict().items()}
    task = CTCRecognition(model, Labels.english(), learning_rate=2e-2, schedule="constant")
    data = SpeechData(train=recordings, test=recordings, batch_seconds=10)
    data.setup()
    whole = next(iter(data.train_dataloader()))
    before = task.eval().loss(whole).item()
    task.train()
    fit = trainer(tmp_path, LoRACallback(rank=2, target_modules="all"), max_epochs=8)
    fit.fit(task, data)
    assert task.eval().loss(whole).item() < before
    for name, value in source.items():
        if not name.startswith(("aux", "head")):
            torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    predicted = trainer(tmp_path).predict(task, data)
    assert {t.path for b in predicted for t in b} == {str(u.path) for u in recordings}


def test_spec_augment_masks_bands_and_frames():
    torch.manual_seed(0)
    features = torch.ones(2, 40, 100)
    masked = spec_augment()(features)
    assert 0.2 < masked.mean() < 1
    assert torch.equal(features, torch.ones(2, 40, 100))  # the input is left as it was
    assert ((masked == 0) | (masked == 1)).all()
