"""FSDP2 in two processes, by Lightning's `ModelParallelStrategy`: equal to DDP, or refused."""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace

import pytest
import timm
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes

from lora_lightning import FitGuard, LoRACallback, inject, load_adapter, merge
from lora_lightning.errors import ConfigError
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.sharding import whole
from lora_lightning.training.sharded import check_sharded, check_strategy
from tests.helpers.training import Module, loader, saved, tiny_vit, trainer

FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def network(kind="vit"):
    torch.manual_seed(0)
    if kind == "vit":
        return tiny_vit()
    return timm.create_model(kind, num_classes=4, zero_init_last=False)


class Sharded(Module):
    parts = "blocks"

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        layers = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        for part in layers if self.parts == "layers" else getattr(self.model, "blocks", []):
            fully_shard(part, mesh=mesh)
        if self.parts != "only blocks":
            fully_shard(self.model, mesh=mesh)


class Late(Sharded):
    """Builds the network where it shards it, with the callback's own configuration."""

    def configure_model(self):
        if self.model is None:
            self.model = network()
            inject(self.model, rank=3, seed=0)
            super().configure_model()


TRAINERS = {"precision", "accumulate_grad_batches", "gradient_clip_val", "use_distributed_sampler"}
CASES = {
    "layers": {"parts": "layers"},
    "late": {"late": True},
    "dora": {"dora": True},
    "xs": {"xs": True},
    "pissa": {"init": "pissa"},
    "rank 1, all": {"rank": 1, "target_modules": "all"},
    "norms": {"trainable": ["head", "norms", "biases"]},
    "resnet": {"kind": "resnet10t", "batch_norm": "adapt", "target_modules": "all",
               "trainable": []},
    "clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "dropout": {"dropout": 0.1},
    "frozen A": {"freeze_a": True},
    "factors alone": {"trainable": []},
    "chosen": {"blocks": [1], "rank_pattern": {"qkv": 1}, "alpha": 5},
}  # fmt: skip


def run(
    out, name, strategy, epochs=2, ckpt=None, kind="vit", parts="blocks", late=False, **options
):
    """A fit of this process and the other; its checkpoint, and this process's tensors."""
    seed_everything(0, verbose=False)
    module = (Module if strategy == "ddp" else Late if late else Sharded)(network(kind))
    module.parts, folder = parts, strategy == "folder"
    if name.startswith(("file", "folder")):
        module.stem = module.model.patch_embed  # under a second name
    if late and strategy != "ddp":
        module.model = None
    if strategy != "ddp":
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=folder)
    trainers = {k: options.pop(k) for k in TRAINERS & options.keys()}
    adapter = LoRACallback(**{"rank": 3, "seed": 0, "output_dir": out / name, **options})
    own = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "max_epochs": epochs}
    t = trainer(out, adapter, **own, **trainers)
    t.fit(module, loader(), loader(), ckpt_path=ckpt)
    t.save_checkpoint(out / f"{name}.ckpt")
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    kept = {k: whole(v.detach()).clone() for k, v in tensors.items() if v.requires_grad
            or "running" in k}  # fmt: skip
    torch.save(kept, out / f"{name}-{t.global_rank}.pt")


def process(rank, out, cases):
    os.environ["LOCAL_RANK"] = str(rank)  # Lightning's sign that processes are started by others
    warnings.simplefilter("ignore")
    for case in cases:
        if case == "quick":
            run(out, "quick-ddp", "ddp", epochs=1)
            run(out, case, "file", epochs=1)
            with pytest.raises(ValueError, match="is not sharded over all 2 processes"):
                run(out, "only blocks", "file", parts="only blocks")
        elif case in ("file", "folder"):
            run(out, f"{case}-ddp", "ddp")
            run(out, case, case)
            run(out, f"{case}-first", case, epochs=1)
            run(out, f"{case}-resumed", case, ckpt=out / f"{case}-first.ckpt")
        else:
            plain = {k: v for k, v in CASES[case].items() if k != "parts"}
            run(out, f"{case}-ddp", "ddp", **plain)
            run(out, case, "file", **CASES[case])


def in_two_processes(tmp_path, monkeypatch, *cases):
    """Forked: what is imported need not be imported again."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(find_free_network_port()))
    start_processes(process, (tmp_path, cases), nprocs=2, start_method="fork")


def assert_alike(tmp_path, name, other):
    for rank in (0, 1):
        own = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
        wanted = torch.load(tmp_path / f"{other}-{rank}.pt", weights_only=True)
        assert own.keys() == wanted.keys()
        for key, value in own.items():
            if rank and "running" in key:
                continue  # DDP sends the first process's statistics to all, FSDP2 does not
            torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-6, msg=key)


def outputs(tmp_path, name):
    """Of a plain model with this run's file, and of the same one merged."""
    torch.manual_seed(0)
    model, x = tiny_vit(), torch.ones(2, 3, 32, 32)
    load_adapter(model, tmp_path / name / "default.safetensors")
    with torch.no_grad():
        plain = model(x)
        merge(model)
        return plain, model(x)


@FORKS
def test_two_processes_equal_ddp(tmp_path, monkeypatch):
    in_two_processes(tmp_path, monkeypatch, "quick")
    assert_alike(tmp_path, "quick", "quick-ddp")
    (own, merged), (wanted, _) = outputs(tmp_path, "quick"), outputs(tmp_path, "quick-ddp")
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged, own, rtol=0, atol=1e-5)
    keys = saved(torch.load(tmp_path / "quick.ckpt", weights_only=True))
    assert all(".lora." in k or ".head." in k for k in keys), "a base weight in a checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
@FORKS
def test_resumed_fits_equal_those_that_never_stopped(tmp_path, monkeypatch, kind):
    in_two_processes(tmp_path, monkeypatch, kind)
    assert_alike(tmp_path, kind, f"{kind}-ddp")
    assert_alike(tmp_path, f"{kind}-resumed", kind)
    if kind == "file":
        keys = saved(torch.load(tmp_path / "file.ckpt", weights_only=True))
        assert all(".lora." in k or ".head." in k for k in keys), "a base weight in a checkpoint"
    parts = [p.stat().st_size for p in (tmp_path / "folder.ckpt").glob("*.distcp")]
    assert len(parts) == (2 if kind == "folder" else 0)
    assert sum(parts) < 4 * sum(p.numel() for p in tiny_vit().blocks.parameters())


@pytest.mark.slow
@FORKS
def test_every_kind_of_adapter_equals_ddp(tmp_path, monkeypatch):
    in_two_processes(tmp_path, monkeypatch, *CASES)
    for case in CASES:
        assert_alike(tmp_path, case, f"{case}-ddp")


@pytest.mark.parametrize(
    ("options", "others", "named"),
    [
        ({"rank": "explained-variance"}, [], 'rank="explained-variance"'),
        ({"init": "eva"}, [], "init='eva'"),
        ({"rank": 4, "prune_to": 2}, [], "prune_to"),
        ({}, [WeightAveraging()], "WeightAveraging"),
    ],
)
def test_what_needs_whole_weights_in_the_fit_is_refused(options, others, named):
    trainer = SimpleNamespace(strategy=ModelParallelStrategy(), callbacks=others)
    with pytest.raises(ConfigError, match="ModelParallelStrategy shards") as raised:
        check_strategy(trainer, LoRAConfig(**options))
    assert str(raised.value).startswith(named)


def test_fsdp1_and_a_guard_are_refused():
    trainer = SimpleNamespace(strategy=FSDPStrategy(), callbacks=[])
    with pytest.raises(ConfigError, match="ModelParallelStrategy"):
        check_strategy(trainer, LoRAConfig())
    adapter, guard = LoRACallback(), FitGuard()
    trainer = SimpleNamespace(strategy=ModelParallelStrategy(), callbacks=[adapter, guard])
    with pytest.raises(ConfigError, match="FitGuard"):
        guard.setup(trainer, torch.nn.Linear(2, 2), "fit")


def test_a_parameter_on_another_device_than_its_mesh_is_refused(monkeypatch):
    module = torch.nn.Linear(2, 2)
    module.weight.device_mesh = SimpleNamespace(size=lambda: 2, device_type="cuda")
    monkeypatch.setattr("lora_lightning.training.sharded.is_sharded", lambda tensor: True)
    trainer = SimpleNamespace(strategy=ModelParallelStrategy(), world_size=2)
    with pytest.raises(ConfigError, match="weight is offloaded to the cpu"):
        check_sharded(trainer, module)
