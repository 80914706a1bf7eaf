"""Adapter files beside checkpoints: which stay, which is the best, what a resumed fit removes."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning import cross_fit, load_adapter
from lora_lightning.training import cross_fitting
from lora_lightning.training.gain_test import Choice
from tests.helpers.training import Module, fitted, loader, lora, same, saved, trainer


class Scored(Module):
    """Logs a score of each epoch, given beforehand."""

    def __init__(self, *scores):
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(48, 8), nn.Linear(8, 4)]
        super().__init__(nn.Sequential(*layers))
        self.scores = scores

    def training_step(self, batch, batch_idx):
        score = float(self.scores[min(self.current_epoch, len(self.scores) - 1)])
        self.log("score", score, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


BEST = {"monitor": "score", "mode": "max"}
FILES = [f"default-epoch={i}-step={2 * i + 2}.safetensors" for i in range(3)]


def small(tmp_path):
    return lora(output_dir=tmp_path / "a", target_modules=["1"], trainable=[], verify=False)


def scored(tmp_path, scores, *savers, ckpt=None, **options):
    """The callback, after a fit of as many epochs, and its files."""
    callback = small(tmp_path)
    savers = [ModelCheckpoint(tmp_path / f"c{i}", "{epoch}", **s) for i, s in enumerate(savers)]
    options = {"enable_checkpointing": True, "max_epochs": len(scores), **options}
    data = loader(size=4)
    fitted(tmp_path, Scored(*scores), callback, *savers, data=data, ckpt=ckpt, **options)
    return callback, sorted(p.name for p in (tmp_path / "a").iterdir())


@pytest.mark.parametrize(
    ("scores", "savers", "kept", "best"),
    [
        ([1, 3, 2], [BEST], [1], 1),
        ([1, 3, 2], [{**BEST, "save_weights_only": True}], [1], 1),
        ([1, 3, 2], [{**BEST, "save_top_k": -1}], [0, 1, 2], 1),
        ([1, 3, 2], [{**BEST, "save_top_k": 2, "mode": "min"}], [0, 2], 0),
        ([3, 2, 1], [{**BEST, "save_last": True}], [0], 0),
        ([1, 3, 2], [{**BEST, "save_top_k": 0}], [], None),
        ([1, 3, 2], [{}], [2], None),  # nothing is monitored: Lightning keeps the last
        ([1, 3, 2], [{}, BEST], [1, 2], 1),
        ([1, 3, 2], [{"save_top_k": -1}, BEST], [0, 1, 2], 1),
    ],
    ids=str,
)
def test_files_go_with_their_checkpoints_and_the_best_is_known(
    tmp_path, scores, savers, kept, best
):
    callback, files = scored(tmp_path, scores, *savers)
    assert files == [*(FILES[i] for i in kept), "default.safetensors"]
    assert callback.adapter_path_.name == ("default.safetensors" if best is None else FILES[best])
    if best is not None:
        held = saved(torch.load(next(tmp_path.glob(f"c*/epoch={best}.ckpt")), weights_only=True))
        module = Scored(0)
        load_adapter(module.model, callback.adapter_path_)
        own = {k: v for k, v in module.state_dict().items() if ".lora." in k}
        assert len(own) == 2
        assert all(torch.equal(v, held[k]) for k, v in own.items())


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("score", "touched", "stays", "best"), [(4, 0, False, 2), (4, 1, True, 2), (2, 0, True, 1)]
)
def test_a_resumed_fit_goes_on_with_the_files_there_are(tmp_path, score, touched, stays, best):
    """It removes what the fit before it wrote, unless somebody has written there since."""
    _, files = scored(tmp_path, [1, 3], saver := {**BEST, "save_last": True})
    assert files == [FILES[1], "default.safetensors"]
    (tmp_path / "a/default-epoch=9-step=9.safetensors").touch()  # of somebody else
    if touched:
        os.utime(tmp_path / "a" / FILES[1], (1, 1))
    callback, files = scored(tmp_path, [1, 3, score], saver, ckpt=tmp_path / "c0/last.ckpt")
    assert (FILES[1] in files) == stays
    assert {"default.safetensors", "default-epoch=9-step=9.safetensors"} <= {*files}
    assert callback.adapter_path_.name == FILES[best]
    assert callback.adapter_path_.exists()


def test_callbacks_that_choose_themselves_leave_the_file_of_the_end(tmp_path):
    saver = ModelCheckpoint(tmp_path / "c", **BEST)
    average = EMAWeightAveraging()
    callback = small(tmp_path)
    options = {"data": loader(size=4), "enable_checkpointing": True}
    fitted(tmp_path, Scored(3, 1), callback, average, saver, **options)
    assert callback.adapter_path_ == tmp_path / "a/default.safetensors"


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.filterwarnings("ignore:cross_fit")
def test_cross_fit_writes_what_it_chose_whichever_checkpoint_was_best(tmp_path, share, monkeypatch):
    """The best checkpoint's file stays what it was."""
    monkeypatch.setattr(cross_fitting, "choose", lambda *_: Choice(share, "", 0.0, torch.ones(8)))
    callbacks = []

    def fit(module, items):
        callbacks.append(small(tmp_path))
        saver = ModelCheckpoint(tmp_path / f"c{len(callbacks)}", **BEST)
        t = trainer(tmp_path, callbacks[-1], saver, enable_checkpointing=True)
        t.fit(module, DataLoader(items, 4))

    cross_fit(module := Scored(3, 1), loader(size=4).dataset, fit, folds=2)
    callback, end = callbacks[-1], tmp_path / "a/default.safetensors"
    assert callback.adapter_path_ == (end if share else None)
    assert end.exists() == bool(share)
    assert (tmp_path / "a" / FILES[0]).exists()
    if share:
        load_adapter(other := Scored(0).model, end)
        assert same(other.state_dict(), module.model.state_dict())


def test_a_callback_can_be_copied_after_its_fit(tmp_path):
    callback, _ = scored(tmp_path, [1], BEST)
    assert copy.deepcopy(callback).adapter_path_ == callback.adapter_path_
