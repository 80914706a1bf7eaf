"""FSDP2 in two processes, by Lightning's `ModelParallelStrategy`: equal to DDP, or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lora_lightning import FitGuard, LoRACallback, load_adapter, merge
from lora_lightning.errors import ConfigError
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.training.sharded import check_sharded, check_strategy
from tests.helpers.training import saved, tiny_vit

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, timm, torch, warnings
warnings.simplefilter("ignore")
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from lora_lightning import LoRACallback, inject
from lora_lightning.lora.sharding import whole
from tests.helpers.training import Module, loader, tiny_vit, trainer

out, which = sys.argv[1], sys.argv[2:]

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
    "Builds the network where it shards it, with the callback's own configuration."

    def configure_model(self):
        if self.model is None:
            self.model = network()
            inject(self.model, rank=3, seed=0)
            super().configure_model()

def run(name, strategy, epochs=2, ckpt=None, kind="vit", parts="blocks", late=False, **options):
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
    adapter = LoRACallback(**{"rank": 3, "seed": 0, "output_dir": f"{out}/{name}", **options})
    t = trainer(out, adapter, accelerator="cpu", devices=2, strategy=strategy, max_epochs=epochs,
                **trainers)
    t.fit(module, loader(), loader(), ckpt_path=ckpt)
    t.save_checkpoint(f"{out}/{name}.ckpt")
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    kept = {k: whole(v.detach()).clone() for k, v in tensors.items() if v.requires_grad
            or "running" in k}
    torch.save(kept, f"{out}/{name}-{t.global_rank}.pt")

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
}
for case in which:
    if case == "quick":
        run("quick-ddp", "ddp", epochs=1)
        run(case, "file", epochs=1)
        try:
            run("only blocks", "file", parts="only blocks")
        except ValueError as error:
            open(f"{out}/error.txt", "w").write(str(error))
    elif case in ("file", "folder"):
        run(f"{case}-ddp", "ddp")
        run(case, case)
        run(f"{case}-first", case, epochs=1)
        run(f"{case}-resumed", case, ckpt=f"{out}/{case}-first.ckpt")
    else:
        run(f"{case}-ddp", "ddp", **{k: v for k, v in CASES[case].items() if k != "parts"})
        run(case, "file", **CASES[case])
"""


def in_two_processes(tmp_path, *cases):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *cases],
        env=env, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


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


def test_two_processes_equal_ddp(tmp_path):
    in_two_processes(tmp_path, "quick")
    assert_alike(tmp_path, "quick", "quick-ddp")
    (own, merged), (wanted, _) = outputs(tmp_path, "quick"), outputs(tmp_path, "quick-ddp")
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged, own, rtol=0, atol=1e-5)
    keys = saved(torch.load(tmp_path / "quick.ckpt", weights_only=True))
    assert all(".lora." in k or ".head." in k for k in keys), "a base weight in a checkpoint"
    assert "is not sharded over all 2 processes" in (tmp_path / "error.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_resumed_fits_equal_those_that_never_stopped(tmp_path, kind):
    in_two_processes(tmp_path, kind)
    assert_alike(tmp_path, kind, f"{kind}-ddp")
    assert_alike(tmp_path, f"{kind}-resumed", kind)
    if kind == "file":
        keys = saved(torch.load(tmp_path / "file.ckpt", weights_only=True))
        assert all(".lora." in k or ".head." in k for k in keys), "a base weight in a checkpoint"
    parts = [p.stat().st_size for p in (tmp_path / "folder.ckpt").glob("*.distcp")]
    assert len(parts) == (2 if kind == "folder" else 0)
    assert sum(parts) < 4 * sum(p.numel() for p in tiny_vit().blocks.parameters())


SLOW = ["layers", "late", "dora", "xs", "pissa", "rank 1, all", "norms", "resnet", "clipped",
        "bf16-mixed", "bf16-true", "dropout", "frozen A", "factors alone", "chosen"]  # fmt: skip


@pytest.mark.slow
def test_every_kind_of_adapter_equals_ddp(tmp_path):
    in_two_processes(tmp_path, *SLOW)
    for case in SLOW:
        assert_alike(tmp_path, case, f"{case}-ddp")


@pytest.mark.parametrize(
    ("options", "others", "named"),
    [
        ({"rank": "auto"}, [], 'rank="auto"'),
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
