"""`PrefixCache` through the real Trainer: the same losses, fewer passes, no wrong numbers."""

from __future__ import annotations

import copy
import io
import resource
from contextlib import contextmanager

import pytest
import timm
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lora_lightning import LoRACallback, PrefixCache, TransductiveTask
from lora_lightning.errors import ConfigError
from lora_lightning.model.calling import call
from lora_lightning.training.prefix_cache.store import Store
from tests.helpers.training import Losses, trainer

ITEMS, BATCH = 12, 4


class Counted(nn.Identity):
    """Counts the items that pass, as part of the prefix."""

    items = 0

    def forward(self, x):
        type(self).items += len(x)
        return x


def small_vit(depth: int = 3, **options) -> nn.Module:
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "depth": depth, "num_classes": 4, **options}
    model = timm.create_model("test_vit", **settings)
    model.norm_pre = Counted()
    Counted.items = 0
    return model


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # a trained network has no norms at their zero start
    return model


def items(number: int = ITEMS) -> TensorDataset:
    x = torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, torch.arange(number) % 4)


def loader(data: Dataset | None = None) -> DataLoader:
    return DataLoader(items() if data is None else data, batch_size=BATCH, shuffle=True)


def fit(tmp_path, *callbacks, model=None, data=None, val=None, blocks=(-1,), lora=None, **options):
    """The module after a fit with these callbacks besides LoRACallback."""
    module = Losses(small_vit() if model is None else model)
    adapter = LoRACallback(
        **{"rank": 2, "seed": 0, "blocks": list(blocks), "dropout": 0.1, **(lora or {})}
    )
    torch.manual_seed(2)
    one = trainer(tmp_path, adapter, *callbacks, **{"max_epochs": 3, **options})
    one.fit(module, loader(data), val)
    return module


def test_the_losses_are_those_without_and_each_item_is_computed_once(tmp_path):
    class Counts(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            counts.append(Counted.items)

    plain = fit(tmp_path)
    cache, counts = PrefixCache(10), []
    cached = fit(tmp_path, cache, Counts())
    for key, value in plain.state_dict().items():
        assert torch.equal(cached.state_dict()[key], value)
    assert plain.losses == cached.losses
    assert (cache.items_, cache.hit_rate_) == (ITEMS, 1)
    assert cache.summary() == "features before blocks.2, 12 items in 0.1 MB, hit rate 100.0%"
    assert counts[2] == counts[1] == counts[0], "nothing is computed twice"


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_what_it_found_comes_back_from_a_process_that_the_trainer_starts(tmp_path):
    started = {"strategy": "ddp_fork", "devices": 1, "use_distributed_sampler": False}
    plain, cache = fit(tmp_path, **started), PrefixCache(10)
    cached = fit(tmp_path, cache, **started)
    for key, value in plain.state_dict().items():
        assert torch.equal(cached.state_dict()[key], value)
    assert cache.summary() == "features before blocks.2, 12 items in 0.1 MB, hit rate 100.0%"


def test_a_network_with_batchnorm_and_a_validation(tmp_path):
    val = DataLoader(items(5), batch_size=3)
    settings = {"val": val, "lora": {"target_modules": "all"}, "accumulate_grad_batches": 2}
    plain = fit(tmp_path, model=resnet(), **settings)
    folder = tmp_path / "features"
    cache = PrefixCache(10, folder)
    cached = fit(tmp_path, cache, model=resnet(), **settings)
    assert next(folder.iterdir(), None) is None
    assert (plain.losses, plain.val_losses) == (cached.losses, cached.val_losses)
    assert (cache.items_, cache.hit_rate_) == (ITEMS, 1)  # the validation's items are among them
    assert cache.boundary_.startswith("layer4")


@contextmanager
def disk_of(size: int):
    """No file can grow beyond `size` bytes: writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_ends_the_storing_not_the_process(tmp_path):
    plain = fit(tmp_path)
    cache = PrefixCache(10, tmp_path / "features")
    with disk_of(50_000), pytest.warns(UserWarning, match="PrefixCache stores no more: File too"):
        cached = fit(tmp_path, cache)
    assert plain.losses == cached.losses
    assert 0 < cache.items_ < ITEMS


@pytest.mark.parametrize("folder", [False, True])
def test_each_precision_comes_back_as_it_was_stored(tmp_path, folder):
    store = Store(10_000, tmp_path if folder else None)
    parts = [
        torch.randn(3, 2),
        torch.randn(5).bfloat16(),
        torch.tensor([True, False]),
        torch.tensor(3),
        torch.randn(4, 3).T,
        torch.empty(0, 7),
    ]
    store.put(b"a", parts)
    store.put(b"b", [torch.ones(100_000)])  # no room
    assert (len(store), b"a" in store, store.get(b"b")) == (1, True, None)
    for stored, part in zip(store.get(b"a"), parts, strict=True):
        assert torch.equal(stored, part)
        assert stored.dtype == part.dtype


def test_without_labels(tmp_path):
    x = items(16).tensors[0]

    def adapt(*callbacks):
        task = TransductiveTask(resnet(), x, batch_size=BATCH, limits=None, batch_norm="target")
        adapter = LoRACallback(
            rank=2, seed=0, blocks=[-1], target_modules="all", trainable=[], verify=False
        )
        torch.manual_seed(2)
        trainer(tmp_path, adapter, *callbacks, max_epochs=3).fit(task)
        return task.probabilities_

    cache = PrefixCache(10)
    torch.testing.assert_close(adapt(cache), adapt(), rtol=1e-4, atol=1e-5)
    assert cache.hit_rate_ == 1
    assert cache.items_ == 16, "the looks at the target are served from the same features"


def test_inputs_that_change_are_noticed(tmp_path):
    class Noisy(Dataset):
        def __len__(self):
            return ITEMS

        def __getitem__(self, index):
            return torch.randn(3, 32, 32), index % 4

    val = DataLoader(items(4), batch_size=4)  # which stays the same, and does not count
    plain = fit(tmp_path, data=Noisy(), val=val)
    cache = PrefixCache(10)
    with pytest.warns(UserWarning, match="PrefixCache is off: .* inputs change in every epoch"):
        cached = fit(tmp_path, cache, data=Noisy(), val=val)
    assert plain.losses == cached.losses
    assert cache.summary() == f"off, {cache.termination_condition_}"


def test_a_budget_that_holds_a_part(tmp_path):
    cache = PrefixCache(5.5 * 17 * 64 * 4 / 1e6)
    with pytest.warns(UserWarning, match="PrefixCache is off: .* budget_mb is too small"):
        cached = fit(tmp_path, cache)
    assert fit(tmp_path).losses == cached.losses
    assert cache.items_ == 5


@pytest.mark.parametrize(
    ("target", "message"),
    [("patch_embed.proj", "no layer comes before pat"), ("pos_embed", "trained has a say")],
)
def test_what_cannot_be_stored_is_said_before_the_first_step(tmp_path, target, message):
    model = small_vit()
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, PrefixCache(10), model=model, lora={"blocks": None, "target_modules": target})
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert not model._forward_pre_hooks


def test_a_budget_beyond_the_machine_or_below_zero(tmp_path):
    with pytest.raises(ConfigError, match="budget_mb must be above 0"):
        PrefixCache(0)
    model = small_vit()
    with pytest.raises(ConfigError, match="free: give another"):
        PrefixCache(1e12, tmp_path).attach(model)
    assert not model._forward_pre_hooks


def test_a_batch_becomes_a_call_as_without(tmp_path):
    model = small_vit().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    expected = call(model, items()[:2])
    with PrefixCache(10).attach(model):
        assert torch.equal(call(model, items()[:2]), expected)  # the labels left out


def test_copies_and_files_of_the_model_know_nothing_of_it():
    model = small_vit().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    x = items().tensors[0]
    with PrefixCache(10).attach(model) as cache:
        expected = model(x)
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        before = cache._lookups
        for other in (twin, loaded):
            with torch.no_grad():
                other.norm.bias.add_(1.0)
            assert not torch.allclose(other(x), expected)
        assert cache._lookups == before
        assert torch.allclose(model(x), expected)
    assert torch.allclose(model(x), expected)
