"""`SpeechData`: batches, order, checks, caching, and files that become unreadable."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.speech.data.audio import checked, read_audio
from lora_lightning.speech.data.batches import DataWarning
from lora_lightning.speech.data.speech_data import SpeechData
from lora_lightning.speech.data.utterances import Utterance
from tests.helpers.training import trainer


def speech(folder, count=6, rate=8000, start=0):
    """Different recordings of 0.2 s, 0.3 s, …, not yet checked."""
    folder.mkdir(exist_ok=True)
    found = []
    for i in range(start, start + count):
        noise = np.random.default_rng(i).normal(0, 0.1, int(rate * (0.2 + 0.1 * i)))
        soundfile.write(folder / f"{i}.flac", noise, rate)
        found.append(Utterance(folder / f"{i}.flac", f"text {i}", f"speaker {i % 3}"))
    return found


def data(**options):
    return SpeechData(**{"sample_rate": 8000, "batch_seconds": 1.0, **options})


def names(batches):
    return [[item.path.stem for item in batch.items] for batch in batches]


def flat(lists):
    return [entry for part in lists for entry in part]


class Listener(pl.LightningModule):
    """Records the items of its batches."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.heard, self.validated, self.tested, self.epochs_validated = [], [], [], 0

    def training_step(self, batch, batch_idx):
        self.heard += [item.path.stem for item in batch.items]
        loss = (self.gain * batch.waveforms).square().mean()
        self.log("loss", loss, batch_size=len(batch))
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated += [item.path.stem for item in batch.items]

    def on_validation_epoch_end(self):
        self.epochs_validated += not self.trainer.sanity_checking

    def test_step(self, batch, batch_idx):
        self.tested += [item.path.stem for item in batch.items]

    def predict_step(self, batch, batch_idx):
        return [item.path.stem for item in batch.items]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_what_the_files_do(tmp_path, workers):
    items = speech(tmp_path)
    d = data(train=items, num_workers=workers)
    d.setup()
    batches = list(d.train_dataloader())
    assert sorted(flat(names(batches))) == ["0", "1", "2", "3", "4", "5"]
    for batch in batches:
        assert batch.waveforms.numel() <= 8000 or len(batch) == 1
        for waveform, length, item in zip(batch.waveforms, batch.lengths, batch.items, strict=True):
            assert torch.equal(waveform[:length], read_audio(item.path, 8000))
            assert not waveform[length:].any()
            assert length == item.seconds * 8000


def test_epochs_differ_and_come_again_by_seed(tmp_path):
    items = speech(tmp_path)

    def epochs(seed):
        loader = data(train=items, seed=seed, batch_seconds=0.9).train_dataloader()
        return [loader.sampler.set_epoch(e) or names(loader) for e in range(3)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert first == again != other
    assert first[0] != first[1]
    assert {len(batches) for batches in first} == {len(data(train=items).train_dataloader())}


def test_order_of_the_other_loaders(tmp_path):
    items = speech(tmp_path, 4)[::-1]
    d = data(train=items, validation=items, test=items)
    assert flat(names(d.val_dataloader())) == ["0", "1", "2", "3"]
    assert flat(names(d.test_dataloader())) == ["3", "2", "1", "0"]
    assert flat(names(d.predict_dataloader())) == ["3", "2", "1", "0"]
    module = Listener()
    assert flat(trainer(tmp_path).predict(module, d)) == ["3", "2", "1", "0"]
    trainer(tmp_path).test(module, d, verbose=False)
    assert module.tested == ["3", "2", "1", "0"]


def test_setup_checks_once_and_lists_what_it_leaves_out(tmp_path, monkeypatch):
    items = speech(tmp_path, 3)
    items[1].path.write_bytes(b"")
    known = checked(items[2:])[0]
    d = data(train=[items[0], items[1], *known])
    with pytest.warns(UserWarning, match=r"1 recordings are left out: 1 × empty, such as .*1\."):
        d.setup("fit")
    assert d.skipped == [(str(items[1].path), "empty: 0 bytes")]
    assert [i.path for i in d.items["train"]] == [items[0].path, items[2].path]
    monkeypatch.setattr(
        "lora_lightning.speech.data.audio.check_audio", lambda *_: pytest.fail("again")
    )
    d.setup("test")
    assert len(d.skipped) == 1


def test_limits_of_length(tmp_path):
    items = speech(tmp_path, 3)
    d = data(train=items, min_seconds=0.25, max_seconds=0.35)
    with pytest.warns(UserWarning, match="1 × too short, .*1 × too long"):
        d.setup()
    assert [i.path for i in d.items["train"]] == [items[1].path]
    with pytest.raises(DataError, match=r"none of the 2 recordings for train .*0.flac: too short"):
        data(train=items[:2], min_seconds=0.35).setup()


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_go_bad_while_training(tmp_path, workers):
    items = speech(tmp_path / "a", 8)
    fresh = speech(tmp_path / "b", 3)
    d = data(train=items, validation=fresh, num_workers=workers, cache_mb=0)
    d.setup()
    whole = items[3].path.read_bytes()
    items[3].path.write_bytes(whole[: len(whole) // 2])
    items[7].path.unlink()  # alone in its batch
    fresh[2].path.write_text("no sound")
    module = Listener()
    with pytest.warns(DataWarning) as warned:
        trainer(tmp_path, max_epochs=3).fit(module, datamodule=d)
    said = [str(w.message) for w in warned if w.category is DataWarning]
    assert len(said) == 3  # one for each, in three epochs
    for item in (items[3], items[7], fresh[2]):
        assert sum(str(item.path) in line for line in said) == 1
    assert not any("\n" in line for line in said)
    assert set(d.lost) == {str(i.path) for i in (items[3], items[7], fresh[2])}
    assert set(module.heard) == {"0", "1", "2", "4", "5", "6"}
    assert all(module.heard.count(name) >= 3 for name in "012456")
    assert module.epochs_validated == 3
    assert set(module.validated) == {"0", "1"}


def test_a_warning_is_one_line(tmp_path):
    items = speech(tmp_path, 2)
    d = data(train=items)
    d.setup()
    items[0].path.unlink()
    with pytest.warns(DataWarning) as warned:
        list(d.train_dataloader())
    list(d.train_dataloader())  # an error, were it to warn again
    (w,) = warned
    line = f"SpeechData:0: DataWarning: left out: {items[0].path}: there is no such file\n"
    assert warnings.formatwarning(w.message, w.category, w.filename, w.lineno) == line


@pytest.mark.filterwarnings("ignore::lora_lightning.speech.data.batches.DataWarning")
def test_a_lost_batch_ends_no_epoch_of_measuring(tmp_path):
    items = speech(tmp_path, 5)
    d = data(test=items, max_batch=1)
    d.setup()
    items[0].path.unlink()
    items[2].path.unlink()
    module = Listener()
    assert trainer(tmp_path).predict(module, d) == [["1"], ["3"], ["4"]]
    trainer(tmp_path).test(module, d, verbose=False)
    assert module.tested == ["1", "3", "4"]


@pytest.mark.filterwarnings("ignore::lora_lightning.speech.data.batches.DataWarning")
def test_nothing_left_to_train_on(tmp_path):
    items = speech(tmp_path, 3)
    d = data(train=items)
    d.setup()
    for item in items:
        item.path.unlink()
    with pytest.raises(DataError, match=r"none of the 3 training recordings .* is the disk still"):
        trainer(tmp_path).fit(Listener(), datamodule=d)


def test_transform_and_augment(tmp_path):
    items = speech(tmp_path, 3)

    def environment(waveform, item):
        return 2 * waveform if item.text == "text 1" else waveform

    d = data(train=items, test=items, transform=environment, augment=lambda w, _: w[:800].add_(1))
    plain = {i.path.stem: read_audio(i.path, 8000) for i in items}
    plain["1"] = 2 * plain["1"]
    for _ in range(2):  # in memory the second time, where augment must not have changed it
        for batch in d.train_dataloader():
            for row, item in zip(batch.waveforms, batch.items, strict=True):
                assert torch.equal(row, plain[item.path.stem][:800] + 1)
        for batch in d.test_dataloader():
            for row, n, item in zip(batch.waveforms, batch.lengths, batch.items, strict=True):
                assert torch.equal(row[:n], plain[item.path.stem])


@pytest.mark.parametrize("wrong", [None, 1.0, torch.ones(2, 5), torch.ones(0), torch.ones(5).int()])
def test_a_transform_that_gives_no_waveform(tmp_path, wrong):
    d = data(train=speech(tmp_path, 1), transform=lambda w, _: wrong)
    with pytest.raises(ConfigError, match=r"must return a waveform \(T,\) of floats for 0.flac"):
        list(d.train_dataloader())


def test_memory_is_kept_to(tmp_path, monkeypatch):
    items = speech(tmp_path, 6)
    d = data(test=items, cache_mb=0.02)
    d.setup()
    list(d.test_dataloader())
    held = d._cache.waveforms
    assert 0 < sum(w.nbytes for w in held.values()) <= 0.02 * 2**20
    read = []
    monkeypatch.setattr(
        "lora_lightning.speech.data.batches.read_audio",
        lambda path, rate: read.append(path) or read_audio(path, rate),
    )
    again = flat(names(d.test_dataloader()))
    assert again == ["0", "1", "2", "3", "4", "5"]
    assert read == [i.path for i in d.items["test"] if i not in held]


def test_overfitting_by_lightning(tmp_path):
    module, d = Listener(), data(train=speech(tmp_path, 4))
    with pytest.warns(UserWarning, match="overfit"):
        trainer(tmp_path, overfit_batches=2).fit(module, datamodule=d)
    assert module.heard == ["0", "1"] * 2


def test_mistakes_in_settings(tmp_path):
    with pytest.raises(ConfigError, match="train must be a list of Utterance"):
        SpeechData("recordings/")
    with pytest.raises(ConfigError, match="test must be a list of Utterance"):
        SpeechData(test=[tmp_path])
    for wrong in ({"max_batch": 0}, {"sample_rate": 16}, {"num_workers": -1}, {"cache_mb": -1}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be .*(least|0 or more)"):
            SpeechData(**wrong)
    for name in ("train", "test"):
        with pytest.raises(DataError, match=rf"no recordings .* SpeechData\({name}="):
            getattr(SpeechData(), f"{name}_dataloader")()
