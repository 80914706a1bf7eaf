"""Adaptation without labels through the real Trainer: task, callback, guard, teacher."""

from __future__ import annotations

import copy
import math
from itertools import count

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from lora_lightning import LoRACallback, PseudoLabelCallback, TransductiveTask, disabled
from lora_lightning.adaptation.guard import Guard, Limits
from lora_lightning.adaptation.teacher import Snapshot, Teacher, trained
from lora_lightning.adaptation.transductive_rounds import trained_in_full
from lora_lightning.errors import ConfigError, DataError
from tests.helpers.training import trainer

CLASSES, SIZE = 4, 16


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


class IndexedStream(Stream):
    """Read by index as well, as litdata's `StreamingDataset` is."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Net(nn.Module):
    """Two layers, BatchNorm, and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(SIZE, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x):
        return self.head(self.body(x))


def points(count, seed, shift=0.0):
    """Groups around the axes; `shift` moves all of them alike, as another light would."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    x = 3 * torch.eye(SIZE)[labels] + 0.6 * torch.randn(count, SIZE, generator=generator)
    towards = torch.zeros(SIZE)
    towards[0], towards[1:CLASSES] = 1.0, -0.4
    return x + shift * towards, labels


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    return learnt(Net())


def learnt(model):
    x, y = points(400, 0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def target():
    return points(128, 1, shift=1.5)


def accuracy(model, data):
    model.eval()
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).double().mean())


def adapter(**settings):
    return LoRACallback(rank=4, target_modules=["body.0"], trainable=[], verify=False, **settings)


def adapted(tmp_path, source, data, epochs=6, callbacks=(), **settings):
    torch.manual_seed(0)
    task = TransductiveTask(copy.deepcopy(source), data, **{"learning_rate": 5e-3, **settings})
    trainer(tmp_path, adapter(), *callbacks, max_epochs=epochs).fit(task)
    return task


def test_it_gets_better_without_labels(tmp_path, source, target):
    before = accuracy(source, target)
    task = adapted(tmp_path, source, target[0])
    after = accuracy(task.model, target)
    assert before < 0.9
    assert after > before + 0.5 * (1 - before)
    assert task.rounds_.termination_condition_ == "all rounds done"
    # What it says of the items is what the model that it leaves says of them.
    with torch.no_grad():
        again = task.model.eval()(target[0]).softmax(1)
    torch.testing.assert_close(task.probabilities_, again)
    changed = task.probabilities_.argmax(1) != task.rounds_.source.argmax(1)
    assert torch.equal(task.rounds_.changed_in_ > 0, changed)
    with disabled(task.model):
        assert accuracy(task.model, target) == before


def test_labels_that_come_with_the_target_are_not_looked_at(tmp_path, source, target):
    wrong = TensorDataset(target[0], (target[1] + 1) % CLASSES)
    stream = IndexedStream(wrong)
    found = [adapted(tmp_path, source, x, epochs=2) for x in (target[0], wrong, stream)]
    for other in found[1:]:
        torch.testing.assert_close(found[0].probabilities_, other.probabilities_)


def test_at_an_alarm_the_source_comes_back(tmp_path, source, target):
    bad = adapted(
        tmp_path, source, target[0], learning_rate=10.0, objective="entropy", batch_norm="source",
        pseudo_label_weight=0.0,
    )  # fmt: skip
    rounds = bad.rounds_
    assert rounds.accepted_ == 0
    # None of the rounds ended it: the learning rate falls, and the last one might have been good.
    assert len(rounds.history_) == 7
    assert "the last one with an alarm" in rounds.termination_condition_
    assert "keep the source's label" in rounds.termination_condition_
    assert accuracy(bad.model, target) == accuracy(source, target)
    with torch.no_grad():
        assert torch.equal(bad.model.eval()(target[0]), source(target[0]))


def test_without_the_guard_the_same_run_ends_badly(tmp_path, source, target):
    bad = adapted(
        tmp_path, source, target[0], learning_rate=10.0, objective="entropy", limits=None,
        batch_norm="source", pseudo_label_weight=0.0,
    )  # fmt: skip
    assert accuracy(bad.model, target) < accuracy(source, target) - 0.1


def test_one_item_leaves_the_source(tmp_path, source, target):
    task = adapted(tmp_path, source, target[0][:1])
    assert "one item" in task.rounds_.termination_condition_
    assert accuracy(task.model, target) == accuracy(source, target)


@pytest.mark.parametrize(
    ("target_of", "settings", "error", "message"),
    [
        (lambda x: x[:0], {}, DataError, "target is empty"),
        (lambda x: iter(x), {}, ConfigError, "known length"),
        (lambda x: Stream(), {}, ConfigError, "known length that is read by index"),
        (lambda x: [{"x": 1}], {}, ConfigError, "must be a tensor"),
        (lambda x: x * math.nan, {}, DataError, "NaN or infinite for 128 of 128"),
        (lambda x: x, {"objective": "magic"}, ConfigError, "objective must be one of"),
        (lambda x: x, {"batch_norm": "x"}, ConfigError, "batch_norm must be one of"),
        (lambda x: x, {"diversity": -1}, ConfigError, "diversity must be"),
        (lambda x: x, {"batch_size": 1}, ConfigError, "batch_size"),
        (lambda x: x, {"training": torch.zeros(3, SIZE)}, ConfigError, "same items"),
    ],
)
def test_mistakes_are_told(tmp_path, source, target, target_of, settings, error, message):
    with pytest.raises(error, match=message):
        adapted(tmp_path, source, target_of(target[0]), epochs=1, **settings)


def test_a_trained_head_is_warned_of(tmp_path, source, target):
    task = TransductiveTask(copy.deepcopy(source), target[0])
    lora = LoRACallback(rank=2, target_modules=["body.0"], verify=False)
    with pytest.warns(UserWarning, match="the classifier is trained too"):
        trainer(tmp_path, lora, max_epochs=1).fit(task)


# The callback: the user's own training step


def module(source):
    from tests.helpers.training import Module

    return Module(copy.deepcopy(source).train(), lr=5e-3)


@pytest.mark.parametrize(
    "labels", ["threshold", "class-balanced", "centroid", "vote", "reciprocal"]
)
def test_the_users_own_step_learns_from_pseudo_labels(tmp_path, source, target, labels):
    own = module(source)
    pseudo = PseudoLabelCallback(target[0], labels)
    trainer(tmp_path, adapter(), pseudo, max_epochs=3).fit(own, pseudo.train_dataloader())
    assert accuracy(own.model, target) >= accuracy(source, target) - 0.01
    assert len(pseudo.rounds_.history_) >= 2
    assert pseudo.termination_condition_
    assert pseudo.pseudo_labels_.accepted.any()


def test_source_items_come_with_their_own_labels(tmp_path, source, target):
    seen = []
    own = module(source)
    step = own.training_step

    def watched(batch, index=0):
        seen.append((batch[0].clone(), batch[1].clone()))
        return step(batch, index)

    own.training_step = watched
    x, y = points(64, 2)
    pseudo = PseudoLabelCallback(
        target[0], source=TensorDataset(x, y), source_ratio=0.5, limits=None, teacher_decay=0.9,
        every_n_steps=4,
    )  # fmt: skip
    trainer(tmp_path, adapter(), pseudo, max_epochs=1).fit(own, pseudo.train_dataloader())
    items, labels = torch.cat([a for a, _ in seen]), torch.cat([b for _, b in seen])
    assert len(items) == 128 + 64
    for item, label in zip(x, y, strict=True):
        here = (items == item).all(dim=1)
        assert labels[here].tolist() == [int(label)]
    assert int(labels.min()) >= 0
    assert len(pseudo.rounds_.history_) == 2  # the source, and one round of four steps


def test_a_gradient_of_labels_that_are_not_there_is_refused(tmp_path, source, target):
    pseudo = PseudoLabelCallback(target[0])
    with pytest.raises(ConfigError, match="init='lora-ga' would start from batches without labels"):
        trainer(tmp_path, adapter(init="lora-ga"), pseudo).fit(
            module(source), pseudo.train_dataloader()
        )


def test_another_loader_is_refused(tmp_path, source, target):
    pseudo = PseudoLabelCallback(target[0])
    with pytest.raises(ConfigError, match="given another loader"):
        trainer(tmp_path, adapter(), pseudo, max_epochs=1).fit(
            module(source), torch.utils.data.DataLoader(TensorDataset(*target), 32)
        )


def test_labels_that_nobody_gets_are_told(tmp_path, source, target):
    from lora_lightning.adaptation.pseudo_labels import threshold

    pseudo = PseudoLabelCallback(target[0], lambda features, p: threshold(0 * p + 0.25, 0.9))
    with pytest.raises(DataError, match=r"none of the 128 items.*confidence 0.25 below 0.90"):
        trainer(tmp_path, adapter(), pseudo, max_epochs=1).fit(
            module(source), pseudo.train_dataloader()
        )


@pytest.mark.parametrize(
    "settings", [{"labels": "magic"}, {"every_n_epochs": 0}, {"source_ratio": -1}]
)
def test_settings_of_the_callback_are_checked(target, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        PseudoLabelCallback(target[0], **settings)


# Teacher and snapshot


def test_the_teacher_is_the_moving_average_and_gives_the_student_back():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    teacher = Teacher(model, decay=0.5)
    for value in (1.0, 2.0):
        model.weight.data.fill_(value)
        teacher.update(model)
    first = 1 - 2 / 11  # the decay rises from (1 + t) / (10 + t)
    expected = first + (2 - first) * (1 - 3 / 12)
    with teacher.applied(model):
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 2.0
    assert teacher.nbytes == 4


def test_the_teacher_refuses_what_it_cannot_follow():
    with pytest.raises(ConfigError, match="decay"):
        Teacher(nn.Linear(1, 1), 1.0)
    with pytest.raises(ConfigError, match="nothing of the model is trained"):
        Teacher(nn.Linear(1, 1).requires_grad_(False))


def test_a_snapshot_brings_statistics_back_as_well(source):
    model = copy.deepcopy(source)
    kept = Snapshot(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()(torch.randn(8, SIZE))
    for parameter in trained(model).values():
        parameter.data.add_(1)
    kept.restore(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_order_of_the_items_does_not_matter_to_batchnorm(tmp_path, source, target):
    """Folders give one class after the other: their statistics are taken from mixed batches."""
    order = target[1].argsort()
    found = [
        adapted(tmp_path, source, x, epochs=1, batch_norm="target", learning_rate=1e-9)
        for x in (target[0], target[0][order])
    ]
    first, second = (t.model.body[1].running_var for t in found)
    torch.testing.assert_close(first, second, rtol=0.1, atol=0.05)


def test_a_collapse_ends_it(tmp_path, source, target):
    """Of all into one class: no falling learning rate mends that."""
    bad = adapted(tmp_path, source, target[0], objective=lambda logits: -logits[:, 0].mean(),
                  learning_rate=1.0, pseudo_label_weight=0.0, batch_norm="source")  # fmt: skip
    assert bad.rounds_.termination_condition_.startswith("alarm in round 1: the predictions coll")
    assert len(bad.rounds_.history_) == 2
    assert accuracy(bad.model, target) == accuracy(source, target)


@pytest.mark.parametrize(("rise", "accepted"), [(0.05, 0), (-0.01, 6)])
def test_where_batchnorm_brings_nothing_it_trains_on_the_sources_statistics(
    tmp_path, source, rise, accepted
):
    """And keeps the result only if neighbours agree more."""
    near = points(128, 5)  # the source's own domain, where nothing helps
    near = near[0] + torch.randn(near[0].shape, generator=torch.Generator().manual_seed(3)), near[1]
    task = adapted(tmp_path, source, near[0], limits=Limits(rise=rise), learning_rate=1e-3)
    assert len(task.rounds_.history_) == 7  # none of them for the statistics
    assert task.rounds_.accepted_ == accepted
    assert accepted or accuracy(task.model, near) == accuracy(source, near)
    kept = dict(source.named_buffers())
    for name, buffer in task.model.named_buffers():
        assert torch.equal(buffer, kept[name.replace("0.base_layer", "0")])


@pytest.mark.parametrize(
    ("classes", "items", "why"), [(1, 60, "over too few classes"), (4, 40, "40 items are too few")]
)
def test_where_nothing_can_be_learnt_the_source_stays(tmp_path, source, classes, items, why):
    data, labels = points(240, 5)
    one = data[labels < classes][:items]
    task = adapted(tmp_path, source, one)
    assert why in task.rounds_.termination_condition_
    with torch.no_grad():
        assert torch.equal(task.model.eval()(one), source(one))
    # On request it trains all the same.
    assert len(adapted(tmp_path, source, one, batch_norm="source").rounds_.history_) > 1


def test_without_batchnorm_class_centroids_answer_where_training_is_refused(tmp_path, target):
    torch.manual_seed(0)
    plain = Net()
    plain.body[1] = nn.Identity()
    plain = learnt(plain)
    assert trained_in_full(plain)
    assert not trained_in_full(Net())  # with BatchNorm
    task = adapted(tmp_path, plain, target[0], epochs=2, limits=Limits(rise=1.0))
    rounds = task.rounds_
    assert rounds.accepted_ == 0
    assert "class centroids answer" in rounds.termination_condition_
    before, now = rounds.source.argmax(1), task.probabilities_.argmax(1)
    assert (now == target[1]).sum() > (before == target[1]).sum()
    assert torch.equal(rounds.changed_in_, 2 * (before != now))
    assert accuracy(task.model, target) == accuracy(plain, target)  # for other items
    plainly = adapted(tmp_path, plain, target[0], epochs=1, batch_norm="source")
    assert len(plainly.rounds_.history_) == 2


@pytest.mark.parametrize(
    ("schedule", "rounds", "end"),
    [("one-cycle", 6, "all rounds done"), ("constant", 2, "alarm in round 2: at the peak")],
)
def test_an_alarm_ends_the_rounds_of_a_constant_learning_rate_alone(
    tmp_path, source, target, monkeypatch, schedule, rounds, end
):
    """One that falls is judged by its end."""
    looks = count()
    peak = lambda self, found: iter(["at the peak"] if next(looks) == 2 else [])  # noqa: E731
    monkeypatch.setattr(Guard, "_alarms", peak)
    found = adapted(tmp_path, source, target[0], schedule=schedule, batch_norm="source").rounds_
    assert len(found.history_) == 1 + rounds
    assert found.termination_condition_ == end
    assert found.accepted_ == (6 if rounds == 6 else 1)


def test_a_canary_stops_what_does_harm(tmp_path, source, target):
    few = TensorDataset(target[0][:16], target[1][:16])
    kept = adapted(tmp_path, source, target[0], canary=few)
    assert kept.rounds_.accepted_ > 0
    assert kept.rounds_.history_[-1].scores["canary"] >= kept.rounds_.history_[0].scores["canary"]
    # Labels that say the opposite of what adapting brings.
    with torch.no_grad():
        lies = source(target[0]).argmax(1)
    changed = lies != kept.probabilities_.argmax(1)
    wrong = TensorDataset(target[0][changed], lies[changed])
    png = tmp_path / "rounds.png"
    stopped = adapted(tmp_path, source, target[0], canary=wrong, batch_norm="target", plot=png)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert stopped.rounds_.accepted_ == 0
    assert "the canary's accuracy falls" in stopped.rounds_.termination_condition_
    with pytest.raises(ConfigError, match="no class"):
        TransductiveTask(copy.deepcopy(source), target[0], canary=target[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "neighbour-consistency"},
        {"objective": "minimum-class-confusion"},
        {"source_weight": 0.1},
        {"pull": 0.01},
    ],
    ids=str,
)
def test_other_losses_adapt_as_well(tmp_path, source, target, settings):
    task = adapted(tmp_path, source, target[0], **settings)
    assert accuracy(task.model, target) > accuracy(source, target)
    assert task.rounds_.accepted_ > 0


def test_holding_to_the_source_holds(tmp_path, source, target):
    free, held = (
        adapted(tmp_path, source, target[0], batch_norm="source", epochs=3, source_weight=v)
        for v in (0.0, 100.0)
    )
    moved = [float((t.probabilities_ - t.rounds_.source).abs().mean()) for t in (free, held)]
    assert moved[1] < 0.5 * moved[0]


def test_labels_can_spread_over_the_graph(tmp_path, source, target):
    torch.manual_seed(0)
    pseudo = PseudoLabelCallback(target[0], "propagation", canary=TensorDataset(*target))
    own = module(source)
    trainer(tmp_path, adapter(), pseudo, max_epochs=3).fit(own, pseudo.train_dataloader())
    assert "canary" in pseudo.rounds_.history_[-1].scores
    assert accuracy(own.model, target) >= accuracy(source, target)


def test_each_item_keeps_its_label_whatever_process_it_comes_from(tmp_path, source, target):
    """The user's own loader shuffles, in two worker processes."""
    items = TensorDataset(target[0])
    loader = torch.utils.data.DataLoader(items, 8, shuffle=True, num_workers=2)
    task = adapted(tmp_path, source, loader, epochs=1)
    with torch.no_grad():
        torch.testing.assert_close(task.probabilities_, task.model.eval()(target[0]).softmax(1))
    own, seen = module(source), {}
    step = own.training_step

    def watched(batch, *rest):
        seen.update(zip(map(tuple, batch[0].tolist()), batch[1].tolist(), strict=True))
        return step(batch, *rest)

    own.training_step = watched
    pseudo = PseudoLabelCallback(loader, limits=None, every_n_epochs=9)
    trainer(tmp_path, adapter(), pseudo, max_epochs=1).fit(own, pseudo.train_dataloader())
    labels = pseudo.pseudo_labels_.labels.tolist()
    assert seen == dict(zip(map(tuple, target[0].tolist()), labels, strict=True))


@pytest.mark.parametrize("batch_norm", ["auto", "source", "target"])
def test_a_source_that_knows_one_class_only(tmp_path, source, target, batch_norm):
    blind = copy.deepcopy(source)
    with torch.no_grad():
        blind.head.bias[2] += 100
    task = adapted(tmp_path, blind, target[0], epochs=2, batch_norm=batch_norm)
    assert task.probabilities_.isfinite().all()
    assert task.rounds_.termination_condition_
    assert accuracy(task.model, target) >= accuracy(blind, target)
