"""Tasks that bring their own rounds, beside a user's own callbacks and modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning import TransductiveTask
from lora_lightning.vision.pose_self_training import TransductivePose
from tests.adaptation.test_resume import Net, points
from tests.helpers.networks import Sides
from tests.helpers.training import Module, trainer

pytestmark = pytest.mark.filterwarnings("ignore:the classifier is trained too")


class OwnTask(TransductiveTask):
    def configure_callbacks(self):
        return []


class OwnPose(TransductivePose):
    def configure_callbacks(self):
        return []


def task(kind=TransductiveTask):
    torch.manual_seed(0)
    objective = "neighbour-consistency"
    return kind(Net(), points(), objective, batch_size=8, limits=None, batch_norm="source")


def pose(kind=TransductivePose):
    return kind(Sides(skew=0.3), torch.rand(20, 3, 8, 8), batch_size=8)


@pytest.mark.parametrize("module", [task(OwnTask), pose(OwnPose)])
def test_callbacks_of_a_subclass_do_not_replace_the_rounds(tmp_path, module):
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
    run.fit(module)
    assert len(module.rounds_.history_) > 1
    assert run.callbacks.index(module._course) < run.callbacks.index(run.checkpoint_callback)


@pytest.mark.parametrize("module", [task(), pose()])
def test_a_trainer_can_go_on_with_another_module(tmp_path, module):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module)
    rounds = len(module.rounds_.history_)
    run.fit_loop.max_epochs = 2
    run.fit(Module(nn.Linear(8, 3)), DataLoader([(x, 0) for x in points()], batch_size=8))
    assert len(module.rounds_.history_) == rounds
