"""Lightning: YAML, two processes, a real backbone's checkpoint size."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from lora_lightning import LoRACallback, LoRAConfig
from lora_lightning.errors import VerificationError
from lora_lightning.model.state import named_factors
from tests.helpers.training import Module, fitted, loader, saved, trainer


class CliModule(Module):
    """For the YAML: no arguments that jsonargparse would have to guess."""

    def __init__(self):
        super().__init__()

    def train_dataloader(self):
        return loader()


TRAINER = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
  - class_path: lora_lightning.LoRACallback
    ARGUMENTS
"""
STYLES = {
    "init_args": "init_args: {rank: 3, config: {rank: 5, target_modules: [qkv]}}",
    "dict_kwargs": "dict_kwargs: {rank: 3, target_modules: [qkv]}",
    "config": "init_args: {config: {rank: 3, target_modules: [qkv], prune_to: null}}",
}


def run_cli(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    options = {"save_config_callback": None, "seed_everything_default": 0}
    return LightningCLI(CliModule, args=["fit", *arguments], **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("style", STYLES)
def test_lightning_cli_yaml(tmp_path, monkeypatch, capsys, style):
    """Fits; what --print_config prints is printed again from itself, and gives the same adapter."""
    config, printed = tmp_path / "config.yaml", tmp_path / "printed.yaml"
    config.write_text(TRAINER.replace("ARGUMENTS", STYLES[style]))
    for given, to in ((config, printed), (printed, None)):
        with pytest.raises(SystemExit, match="0"):
            run_cli(monkeypatch, "--config", str(given), "--print_config")
        text = capsys.readouterr().out
        assert to is not None or text == printed.read_text()
        printed.write_text(text)
    place = f"--trainer.default_root_dir={tmp_path}"
    cli = run_cli(monkeypatch, "--config", str(printed), place)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, LoRACallback))
    assert callback.config == LoRAConfig(rank=3, target_modules=["qkv"])
    assert [row.module for row in callback.report_.rows] == [
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_lightning_cli_refuses_an_unknown_field(tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(TRAINER.replace("ARGUMENTS", "init_args: {rnk: 3}"))
    with pytest.raises(SystemExit, match="2"):
        run_cli(monkeypatch, "--config", str(config))
    assert "rnk" in capsys.readouterr().err


class Told(LoRACallback):
    """A file for each process: what its factors are in the end, or what its error said."""

    def on_fit_end(self, trainer, pl_module):
        super().on_fit_end(trainer, pl_module)
        factors = named_factors(pl_module.model, "default").values()
        assert sum(f.spec.rank for f in factors) == 12  # eight tensors
        digest = sum(p.double().abs().sum().item() for f in factors for p in f.parameters())
        out = Path(trainer.default_root_dir)
        (out / f"rank{trainer.global_rank}.txt").write_text(f"{digest:.12f}")
        trainer.save_checkpoint(out / "last.ckpt")  # and an adapter file beside it

    def on_after_backward(self, trainer, pl_module):
        try:
            super().on_after_backward(trainer, pl_module)
        except VerificationError as error:
            out, until = Path(trainer.default_root_dir), time.monotonic() + 30
            (out / f"error{trainer.global_rank}.txt").write_text(str(error))
            while len(list(out.glob("error*.txt"))) < 2 and time.monotonic() < until:
                time.sleep(0.01)  # whoever fails first has the other one ended
            raise


class DeadOnOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.gated = nn.Linear(3 * 32 * 32, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.used(x.flatten(1))
        return x + self.gated(x) * (1 - torch.distributed.get_rank())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_ddp_on_two_cpu_processes(tmp_path):
    """Each process sees other batches, and must have the same ranks and factors all the same."""
    started = {"devices": 2, "strategy": "ddp_fork"}
    adapter = Told(rank="explained-variance", rank_energy=0.9, max_rank=6, init="eva", prune_to=1.5)
    saver = ModelCheckpoint(tmp_path / "c", monitor="epoch", mode="max")  # removes the first
    options = {"logger": CSVLogger(tmp_path), "enable_checkpointing": True, **started}
    fitted(tmp_path, Module(), adapter, saver, **options)
    adapter = Told(rank=2, target_modules="all", trainable=[], output_dir=tmp_path)
    # On both, or the other would wait forever.
    with pytest.raises(ProcessRaisedException, match="VerificationError"):
        fitted(tmp_path, Module(DeadOnOne()), adapter, **started)
    digests = [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    said = [(tmp_path / f"error{rank}.txt").read_text() for rank in (0, 1)]
    assert "of another process" in said[0]
    assert "gated.weight: in training: the gradient of lora_" in said[1]
    assert len(set(digests)) == 1, "the processes disagree about the factors"
    assert float(digests[0]) > 0
    files = sorted(p.name for p in tmp_path.rglob("*.safetensors"))
    names = [f"default-epoch={epoch}-step=2.safetensors" for epoch in (1, 2)]
    assert files == [*names, "default.safetensors"]
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
