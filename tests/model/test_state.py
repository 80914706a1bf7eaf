"""Many adapters on one model: each equals its file, and none costs more than the first."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import random
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.optim.swa_utils import AveragedModel
from torchvision.models.feature_extraction import create_feature_extractor

from lora_lightning import (
    adapters,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_active,
    unmerge,
)
from lora_lightning.errors import AdapterError, TargetError
from tests.helpers.training import randomise

FEW, MANY = 4, 20
X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers to adapt, a head to train in full, and statistics that training moves."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.blocks(x)).relu())


def base() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def name_of(i: int) -> str:
    return f"speaker-{i}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file a speaker, with a head and statistics of its own; two kinds of configuration."""
    folder, paths = tmp_path_factory.mktemp("speakers"), []
    for i in range(MANY):
        model = base()
        whole = ["head"] if i % 3 else []
        inject(model, rank=2, target_modules=["blocks.*"], trainable=whole, seed=i)
        randomise(model, 0.5, seed=i)
        with torch.no_grad():
            model.head.weight.add_(i if whole else 0)
            model.norm.running_mean.add_(0.1 * i)
        paths.append(save_adapter(model, folder / f"{i}.safetensors"))
    return paths


def loaded(paths) -> nn.Module:
    return copy.deepcopy(_loaded(tuple(paths)))


@functools.cache
def _loaded(paths) -> nn.Module:
    model = base()
    for i, path in enumerate(paths):
        load_adapter(model, path, name_of(i))
    return model


def alone(path) -> torch.Tensor:
    model = base()
    load_adapter(model, path)
    return model(X)


def test_each_is_what_its_file_says_in_any_order(files):
    model = loaded(files)
    expected = [alone(path) for path in files]
    assert len({tuple(e.flatten().tolist()) for e in expected}) == MANY
    for i in random.Random(0).choices(range(MANY), k=3 * MANY):
        set_active(model, name_of(i))
        assert torch.equal(model(X), expected[i])
    set_active(model, None)
    assert torch.equal(model(X), base()(X))


def test_a_copy_switches_by_itself(files):
    model = loaded(files[:FEW])
    twin = copy.deepcopy(model)
    set_active(twin, name_of(1))
    set_active(model, name_of(2))
    assert torch.equal(twin(X), alone(files[1]))
    assert torch.equal(model(X), alone(files[2]))


def test_saving_one_of_many_gives_the_same_file(files, tmp_path):
    model = loaded(files)
    for i in (1, 3, MANY - 1):
        again = save_adapter(model, tmp_path / "again.safetensors", name_of(i))
        assert torch.equal(alone(again), alone(files[i]))


def test_removing_most_leaves_the_others_whole(files):
    model = loaded(files)
    for i in range(1, MANY):
        remove(model, name_of(i))
    set_active(model, name_of(0))
    assert torch.equal(model(X), alone(files[0]))
    remove(model)
    assert torch.equal(model(X), base()(X))
    assert model.state_dict().keys() == base().state_dict().keys()


def test_only_the_active_one_requires_a_gradient(files):
    model = loaded(files)
    for i in (3, 7, 4):
        set_active(model, name_of(i))
        on = {n for n, p in model.named_parameters() if p.requires_grad}
        factors = {n for n in model.state_dict() if f".lora.{name_of(i)}." in n}
        assert on == factors | ({"head.weight", "head.bias"} if i % 3 else set())


def test_unmerging_freezes_every_other_one_again(files):
    model = loaded(files[:FEW])
    model.requires_grad_(True)
    merge(model)
    unmerge(model)
    on = {n for n, p in model.named_parameters() if p.requires_grad}
    assert on == {n for n in model.state_dict() if f".lora.{name_of(FEW - 1)}." in n}


def test_a_replaced_head_is_found(files):
    """What `trainable` names is remembered only as long as the model stays as it is."""
    model = base()
    inject(model, rank=2, target_modules=["blocks.*"], trainable=["head"], name="one")
    set_active(model, "one")
    model.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    set_active(model, "one")
    on = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert on == {"head.1.weight", "head.1.bias"}


def calls(work: Callable[[], object]) -> int:
    """Python and C functions called by `work`; not by the collector of other tests' garbage."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


WORK = {
    "set_active": lambda model, path: set_active(model, name_of(1)),
    "load_adapter": lambda model, path: load_adapter(model, path, "one-more"),
    "forward": lambda model, path: model(X),
}


@pytest.mark.parametrize("work", WORK)
def test_the_number_of_adapters_costs_nothing(work, files):
    counts = {}
    for number in (FEW, MANY):
        model = loaded(files[:number])
        set_active(model, name_of(2))
        set_active(model, name_of(1))
        set_active(model, name_of(2))
        other = loaded(files[:FEW])
        calls(lambda other=other: WORK[work](other, files[0]))  # fills every cache
        counts[number] = calls(lambda model=model: WORK[work](model, files[0]))
    assert counts[FEW] > 50
    assert counts[MANY] == counts[FEW]


def test_counting_calls_can_fail(files):
    counts = [calls(lambda n=n: list(loaded(files[:n]).named_parameters())) for n in (FEW, MANY)]
    assert counts[1] > 1.5 * counts[0]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def saved_whole(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


KINDS = {
    "plain": lambda: base(),
    "compiled in place": lambda: compiled_in_place(base()),
    "traced": lambda: symbolic_trace(base()),
    "extractor": lambda: create_feature_extractor(base(), {"head": "out"}).eval(),
}
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
    "average": lambda model: AveragedModel(model).module,
}


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    y = model(X)
    return y["out"] if isinstance(y, dict) else y


@pytest.mark.filterwarnings("ignore:.*fx.Graph.*")
@pytest.mark.parametrize(
    ("kind", "how"),  # torchvision's extractors cannot be pickled
    [(k, h) for k in KINDS for h in COPIES if k != "extractor" or h in ("deepcopy", "average")],
)
def test_a_copy_has_the_adapters_and_is_independent(tmp_path, kind, how):
    model = KINDS[kind]()
    source = output(model)
    inject(model, rank=2, target_modules=["blocks.*"])
    randomise(model, 0.5)
    learnt, twin = output(model), COPIES[how](model).eval()
    assert adapters(twin) == ["default"]
    assert torch.equal(output(twin), learnt)
    inject(twin, rank=2, target_modules=["blocks.*"], name="second")
    assert torch.equal(output(twin), source)
    assert (adapters(twin), adapters(model)) == (["default", "second"], ["default"])
    set_active(twin, "default")
    save_adapter(twin, tmp_path / "file")
    load_adapter(other := base(), tmp_path / "file")
    assert torch.equal(other(X), learnt)
    remove(twin)
    assert torch.equal(output(twin), source)
    assert torch.equal(output(model), learnt)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"xs": True}, {"init": "pissa"}], ids=str)
def test_a_copy_of_a_merged_model_unmerges_exactly(how, options):
    model = base()
    source = output(model)
    inject(model, rank=2, target_modules=["blocks.*"], trainable=[], **options)
    randomise(model, 0.5)
    before, learnt = {n: p.clone() for n, p in model.named_parameters()}, output(model)
    merge(model)
    merged, twin = output(model), COPIES[how](COPIES[how](model)).eval()
    assert torch.equal(output(twin), merged)
    unmerge(twin)
    assert torch.equal(output(twin), learnt)
    assert all(torch.equal(p, before[n]) for n, p in twin.named_parameters())
    remove(twin)
    assert torch.equal(output(twin), source)
    with torch.no_grad():
        model.blocks[1].weight.neg_()  # whose sum of magnitudes is the same
    twin = COPIES[how](model)
    for written in (model, twin, COPIES[how](twin)):
        with pytest.raises(AdapterError, match="changed since merge"):
            unmerge(written)
    unmerge(twin, discard_changes=True)
    assert torch.equal(output(twin.eval()), learnt)


def test_a_shallow_copy_shares_its_adapters():
    for kind in ("plain", "traced"):
        model = KINDS[kind]()
        inject(model, rank=2, target_modules=["blocks.*"])
        twin = copy.copy(model)
        inject(twin, rank=2, target_modules=["blocks.*"], name="second")
        assert adapters(twin) == adapters(model) == ["default", "second"]


def test_layers_of_an_adapted_model_are_no_model_of_their_own():
    inject(model := base(), rank=2, target_modules=["blocks.*"])
    for part in (model.blocks, nn.Sequential(*model.children())):
        for change in (lambda m: inject(m, rank=2), merge, remove):
            with pytest.raises(AdapterError, match="put on a larger model, or on the one from"):
                change(part)
    assert adapters(model) == ["default"]


def test_tensors_of_a_traced_graph_itself_take_no_adapter():
    class Positions(nn.Linear):
        def __init__(self):
            super().__init__(6, 6)
            self.positions = nn.Parameter(torch.zeros(6, 6))

        def forward(self, x):
            return super().forward(x + x @ self.positions)

    with pytest.raises(TargetError, match="traced graph, whose class cannot change"):
        inject(symbolic_trace(Positions()), rank=2, target_modules=["positions"])
