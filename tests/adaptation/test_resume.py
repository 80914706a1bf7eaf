"""Resumed trainings without labels end like uninterrupted ones."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from lora_lightning import LoRACallback, PseudoLabelCallback, TransductiveTask
from lora_lightning.speech.data.utterances import Utterance
from lora_lightning.speech.self_training import PseudoTranscriptCallback
from lora_lightning.speech.tasks.ctc import CTCRecognition
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.lexicon import Lexicon
from lora_lightning.speech.tasks.recognisers import ConformerCTC
from lora_lightning.text.self_training import PseudoTranslationCallback
from lora_lightning.text.subwords import Subwords
from lora_lightning.text.translation import Translation
from lora_lightning.text.translators import Translator
from lora_lightning.vision.pose_self_training import TransductivePose
from tests.helpers.networks import Sides
from tests.helpers.training import Module, trainer

STEPS, ROUNDS = 12, 3  # two epochs of two batches make a round, or one of four


class Net(nn.Module):
    """Two layers and BatchNorm, with dropout: a resumed run must draw the same random numbers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x))


def points():
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.eye(8)[torch.arange(32) % 3] + torch.randn(32, 8, generator=generator) + 0.5


def task(tmp_path, **settings):
    torch.manual_seed(0)
    found = TransductiveTask(
        Net(), points(), batch_size=8, limits=None, batch_norm="target", learning_rate=1e-2,
        **settings,
    )  # fmt: skip
    return found, None, found, lambda: found.rounds_


def neighbours(tmp_path):
    return task(tmp_path, objective="neighbour-consistency", source_weight=0.1)


def reloaded(tmp_path):
    return task(tmp_path)


def reloaded_at_times(tmp_path):
    return task(tmp_path)


def limited(tmp_path):
    return task(tmp_path)


def pose(tmp_path):
    torch.manual_seed(0)
    halves = torch.rand(43, 2) + 0.2
    pictures = halves.repeat_interleave(4, dim=1)[:, None, None].expand(43, 3, 8, 8).clone()
    found = TransductivePose(Sides(skew=0.3), pictures, batch_size=8, learning_rate=0.02)
    return found, None, found, lambda: found


def labels(tmp_path, **settings):
    torch.manual_seed(0)
    module = Module(Net().train(), lr=1e-2)
    own = PseudoLabelCallback(points(), batch_size=8, limits=None, teacher_decay=0.9, **settings)
    return module, own.train_dataloader(), own, lambda: own.rounds_


def labels_by_epochs(tmp_path):
    return labels(tmp_path, every_n_epochs=2)


def labels_by_steps(tmp_path):
    return labels(tmp_path, every_n_steps=3, labels="class-balanced")


def transcripts(tmp_path, lexicon=True):
    rng, recordings = np.random.default_rng(0), []
    for i in range(4):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(8000 + 800 * i), 16000)
        recordings.append(Utterance(path))
    torch.manual_seed(1)
    letters = Labels(["-", " ", "a", "b"])
    model = ConformerCTC(letters, dim=16, num_layers=1, num_heads=2, ffn_dim=16, kernel_size=3)
    model.head.bias.data = torch.tensor([-2.0, 0.2, 0.3, 0.3])
    own = PseudoTranscriptCallback(
        recordings, Lexicon(["ab", "ba"]) if lexicon else None, keep=[1.0] * ROUNDS, limits=None,
        max_batch=2, teacher_decay=0.9,
    )  # fmt: skip
    return (
        CTCRecognition(model.train(), learning_rate=3e-2, weight_decay=0.0),
        own.data,
        own,
        lambda: own,
    )


def transcripts_by_dropout(tmp_path):
    return transcripts(tmp_path, lexicon=False)


def translations(tmp_path):
    subwords = Subwords.learn(["ab ba ab", "xy yx"], merges=4)
    torch.manual_seed(0)
    model = Translator(subwords, dim=8, num_layers=2, num_heads=2, ffn_dim=12)
    own = PseudoTranslationCallback(
        ["ab", "ba ab", "ab ab", "ba"], subwords, keep=[1.0] * ROUNDS, limits=None, batch_size=2,
        dropped=0.3,
    )  # fmt: skip
    return Translation(model.train(), 3e-2, 0.0), own.data, own, lambda: own


TEXTS = (transcripts, transcripts_by_dropout, translations)
MIDDLE = [task, neighbours, pose, labels, *TEXTS]  # in mid-epoch all are equal, too
OPTIONS = {
    reloaded: {"reload_dataloaders_every_n_epochs": 1},
    reloaded_at_times: {"reload_dataloaders_every_n_epochs": 2},
    limited: {"limit_train_batches": 2, "max_epochs": 6},
}
LAST = [*MIDDLE, *OPTIONS]
END = [*LAST, labels_by_steps]


def crossed(kind, checkpoint, *fast):
    return pytest.param(kind, checkpoint, marks=[] if kind in fast else pytest.mark.slow)


class Saves(Checkpoint):
    """Saves in mid-epoch and at an epoch's end, after all other callbacks, as ModelCheckpoint."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7:
            trainer.save_checkpoint(self.folder / "middle.ckpt")
        if trainer.global_step == 8:  # the last of an epoch, whose round has not ended yet
            trainer.save_checkpoint(self.folder / "last.ckpt")

    def on_train_epoch_end(self, trainer, *_):
        path = self.folder / "end.ckpt"
        if trainer.global_step >= 5 and not path.exists():
            trainer.save_checkpoint(path)


def fit(tmp_path, kind, seed, ckpt_path=None, **options):
    module, data, own, course = kind(tmp_path)
    targets = ["body.0"] if isinstance(module.model, Net) else "all"
    callbacks = [
        LoRACallback(
            rank=2, target_modules=targets, trainable=[], verify=False, output_dir=tmp_path
        ),
        *([own] if own is not module else []),
        *([Saves(tmp_path)] if ckpt_path is None else []),
    ]
    steps = {"max_steps": STEPS, "max_epochs": -1, "reload_dataloaders_every_n_epochs": 1}
    torch.manual_seed(seed)
    length = steps if kind in TEXTS else {"max_epochs": ROUNDS, **OPTIONS.get(kind, {})}
    saving = {"enable_checkpointing": ckpt_path is None}
    run = trainer(tmp_path, *callbacks, **length, **saving, **options)
    run.fit(module, data, ckpt_path=ckpt_path)
    return module.state_dict(), course()


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """Kind → folder of its checkpoints, weights and course of a run that never stopped."""

    @functools.cache
    def run(kind):
        folder = tmp_path_factory.mktemp(kind.__name__)
        return folder, *fit(folder, kind, seed=2)

    return run


@pytest.mark.parametrize(
    ("kind", "checkpoint"),
    [
        *((k, "middle.ckpt") for k in MIDDLE),
        *(crossed(k, "last.ckpt", task, labels, transcripts, reloaded_at_times) for k in LAST),
        *(crossed(k, "end.ckpt", pose, labels_by_steps, translations, limited) for k in END),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(through, kind, checkpoint):
    folder, weights, course = through(kind)
    assert_ended_alike(*fit(folder, kind, seed=99, ckpt_path=folder / checkpoint), weights, course)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [task, pose, labels_by_steps, transcripts, translations])
def test_a_run_in_a_process_that_the_trainer_starts_equals_one_in_its_own(
    through, kind, start, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else Lightning gives the process more threads
    folder, weights, course = through(kind)
    options = {"strategy": f"ddp_{start}", "devices": 1, "use_distributed_sampler": False}
    assert_ended_alike(*fit(folder, kind, seed=2, **options), weights, course)


def assert_ended_alike(again, resumed, weights, course):
    assert resumed.history_ == course.history_
    assert len(resumed.history_) >= ROUNDS
    assert resumed.accepted_ == course.accepted_ > 0
    assert resumed.termination_condition_ == course.termination_condition_
    said = ("transcripts_", "translations_", "probabilities_")
    for name in ("changed_in_", "source", "source_", *said):
        assert_same(getattr(resumed, name, None), getattr(course, name, None))
    torch.testing.assert_close(again, weights, rtol=0, atol=0)


def test_a_round_of_two_epochs_ends_once_where_it_is_resumed_at_its_last_batch(through):
    folder, weights, course = through(labels_by_epochs)
    again, resumed = fit(folder, labels_by_epochs, seed=99, ckpt_path=folder / "last.ckpt")
    assert resumed.history_ == course.history_
    assert len(resumed.history_) == 2
    torch.testing.assert_close(again, weights, rtol=0, atol=0)


def test_a_teacher_can_begin_when_a_run_is_resumed(tmp_path):
    module, data, own, _ = labels(tmp_path)
    own.teacher_decay = None
    run = trainer(tmp_path, own, max_epochs=1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "without.ckpt")
    module, data, own, _ = labels(tmp_path)
    trainer(tmp_path, own, max_epochs=2).fit(module, data, ckpt_path=tmp_path / "without.ckpt")
    assert [r.index for r in own.history_] == [0, 1, 2]


def test_rounds_by_steps_end_once_where_batches_are_accumulated(tmp_path):
    module, data, own, _ = labels(tmp_path, every_n_steps=2)
    trainer(tmp_path, own, max_steps=4, max_epochs=-1, accumulate_grad_batches=2).fit(module, data)
    assert [r.index for r in own.history_] == [0, 1, 2]


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    elif hasattr(one, "plain"):
        assert torch.equal(one.plain, other.plain)
    else:
        assert one == other
