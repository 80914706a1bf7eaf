"""Lightning: YAML, two processes, a real backbone's checkpoint size."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from lora_lightning import LoRACallback
from tests.helpers.training import Module, loader, saved, trainer

ROOT = Path(__file__).parents[2]


class CliModule(Module):
    """For the YAML: no arguments that jsonargparse would have to guess."""

    def __init__(self):
        super().__init__()

    def train_dataloader(self):
        return loader()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("style", ["fields", "config"])
def test_lightning_cli_yaml(tmp_path, monkeypatch, style):
    fields = "rank: 3\n              target_modules: [qkv]"
    arguments = {
        "fields": "dict_kwargs:\n              " + fields,
        "config": "init_args:\n              config:\n                rank: 3\n"
        "                target_modules: [qkv]",
    }[style]
    config = tmp_path / "config.yaml"
    config.write_text(
        textwrap.dedent(f"""
        trainer:
          max_epochs: 1
          accelerator: cpu
          logger: false
          enable_progress_bar: false
          enable_model_summary: false
          enable_checkpointing: false
          default_root_dir: {tmp_path}
          callbacks:
          - class_path: lora_lightning.LoRACallback
            {arguments}
        """)
    )
    monkeypatch.setattr(sys, "argv", ["main.py"])
    cli = LightningCLI(
        CliModule,
        args=["fit", "--config", str(config)],
        save_config_callback=None,
        seed_everything_default=0,
    )
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, LoRACallback))
    assert callback.config.rank == 3
    assert [row.module for row in callback.report_.rows] == [
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
    ]


DDP = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger
from lora_lightning import LoRACallback
from lora_lightning.errors import VerificationError
from lora_lightning.model.state import named_factors
from tests.helpers.training import Module, loader, trainer

seed_everything(0, verbose=False)
out = sys.argv[1]
module = Module()
# Each process sees other batches, and must have the same ranks and factors all the same.
adapter = LoRACallback(rank="auto", rank_energy=0.9, max_rank=6, init="eva", prune_to=1.5)
t = trainer(out, adapter, accelerator="cpu", devices=2, strategy="ddp", max_epochs=2,
            logger=CSVLogger(out))
t.fit(module, loader())
t.save_checkpoint(f"{out}/last.ckpt")
factors = named_factors(module.model, "default")
parameters = [p for f in factors.values() for p in f.parameters()]
assert sum(f.spec.rank for f in factors.values()) == 12  # eight tensors
digest = sum(p.detach().double().abs().sum().item() for p in parameters)
# A file for each process: two that print at once can end up on one line.
open(f"{out}/rank{t.global_rank}.txt", "w").write(f"{digest:.12f}")


class DeadOnOne(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.gated = torch.nn.Linear(3 * 32 * 32, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        x = self.used(x.flatten(1))
        return x + self.gated(x) * (1 - t.global_rank)


adapter = LoRACallback(rank=2, target_modules="all", trainable=[], output_dir=out)
try:
    trainer(out, adapter, accelerator="cpu", devices=2, strategy="ddp").fit(
        Module(DeadOnOne()), loader())
except VerificationError as error:  # on both, or the other would wait forever
    open(f"{out}/error{t.global_rank}.txt", "w").write(str(error))
"""


def test_ddp_on_two_cpu_processes(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(DDP)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    digests = [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    said = [(tmp_path / f"error{rank}.txt").read_text() for rank in (0, 1)]
    assert "of another process" in said[0]
    assert "gated.weight: in training: the gradient of lora_" in said[1]
    assert len(set(digests)) == 1, "the processes disagree about the factors"
    assert float(digests[0]) > 0
    files = [p.name for p in tmp_path.rglob("*.safetensors")]
    assert files == ["default.safetensors"]
    keys = saved(torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert all(".lora." in k or ".head." in k for k in keys)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("vit_tiny_patch16_224", 1),
        pytest.param("vit_base_patch16_224", 8, marks=pytest.mark.slow),
    ],
)
def test_vit_checkpoint_is_under_two_percent(tmp_path, name, rank):
    """Measured against the checkpoint of full fine-tuning, optimizer states in both."""
    sizes = {}
    for kind in ("lora", "full"):
        model = timm.create_model(name, img_size=32, num_classes=10)
        saver = ModelCheckpoint(tmp_path / kind)
        callbacks = [saver] if kind == "full" else [LoRACallback(rank=rank, verify=False), saver]
        t = trainer(tmp_path, *callbacks, enable_checkpointing=True, max_steps=1, max_epochs=1)
        t.fit(Module(model), loader(2, batch=2))
        sizes[kind] = Path(saver.best_model_path).stat().st_size
    assert sizes["lora"] < 0.02 * sizes["full"]
