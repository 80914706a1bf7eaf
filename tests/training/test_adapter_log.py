"""Logging of an adapter: hyperparameters beside the user's, few scalars, spectra."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from tests.helpers import stand_ins
from tests.helpers.training import Module, TwoBackbones, fitted, lora


class Kept(Module):
    """Keeps hyperparameters, one under a name of ours."""

    def __init__(self, width=3, lora=None):
        super().__init__()
        self.save_hyperparameters()


def logged(logger):
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    hparams = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    return rows, {k for k in rows[0] if k.startswith("lora/")}, hparams


def test_few_scalars_and_hyperparameters_beside_the_users(tmp_path):
    callback, logger = lora(alpha=3.0, target_modules=["qkv"]), CSVLogger(tmp_path)
    fitted(tmp_path, Kept(lora={"rank": "mine"}), callback, logger=logger)
    rows, names, hparams = logged(logger)
    assert names == {
        f"lora/{n}"
        for n in ("trainable_parameters", "factor_parameters", "delta_norm", "effective_rank")
    }
    assert float(rows[-1]["lora/delta_norm"]) > 0
    assert 1 <= float(rows[-1]["lora/effective_rank"]) <= 2
    assert hparams == {
        "width": 3,
        "lora": {"rank": "mine"},  # "lora/rank" in TensorBoard and MLflow
        "lora/adapter": "default",
        "lora/alpha": 3.0,
        "lora/target_modules": "['qkv']",
        "lora/targets": 2,
        "lora/trainable_parameters": callback.report_.trainable_parameters,
    }
    assert (Path(logger.log_dir) / "adapters" / "default.safetensors").exists()


def test_two_adapters_have_names_of_their_own(tmp_path):
    callbacks = [lora(prune_to=1.5), lora(backbone="second", name="b", rank=1)]
    fitted(tmp_path, TwoBackbones(), *callbacks, logger=(logger := CSVLogger(tmp_path)))
    _, names, hparams = logged(logger)
    assert {"lora/default/mean_rank", "lora/b/delta_norm"} <= names
    assert (hparams["lora/default/rank"], hparams["lora/b/rank"]) == (2, 1)
    assert max(sum(n.startswith(f"lora/{a}/") for n in names) for a in ("default", "b")) == 5


def test_spectra_on_request(tmp_path):
    logger = CSVLogger(tmp_path)
    fitted(tmp_path, Module(), lora(log_spectrum=True), logger=logger)
    rows, names, _ = logged(logger)
    each = {n for n in names if "/blocks." in n}
    assert len(each) == 8 * (2 + 1)  # layers × (singular values and effective rank)
    last = {n: float(row[n]) for row in rows for n in names if row[n]}
    squares = sum(last[n] ** 2 for n in each if "sigma" in n)
    assert squares**0.5 == pytest.approx(last["lora/delta_norm"], rel=1e-5)


def test_spectra_are_histograms_where_the_logger_has_them(tmp_path, monkeypatch):
    board, wandb = stand_ins.tensorboard(monkeypatch), stand_ins.wandb(monkeypatch)
    loggers = [TensorBoardLogger(tmp_path), WandbLogger(save_dir=tmp_path)]
    fitted(tmp_path, Kept(), lora(log_spectrum=True), logger=loggers)
    histograms = [a for name, a in board if name == "add_histogram"]
    assert len(histograms) == 8 * 2  # layers × epochs
    assert {(name[-6:], len(values), step) for name, values, step in histograms} == {
        ("/sigma", 2, 2),
        ("/sigma", 2, 4),
    }
    drawn = [v for name, m in wandb if name == "log" for k, v in m.items() if k.endswith("/sigma")]
    assert sum(len(v.values) == 2 for v in drawn) == 8 * 2
    assert all("_0" not in key for name, m in wandb if name == "log" for key in m)
    # Beside the user's, in what TensorBoard shows (the first) and in W&B.
    first, *_ = [a for name, a in board if name == "hparams"]
    configs = [a for name, a in wandb if name == "config"]
    assert (first["width"], first["lora/rank"], first["lora/targets"]) == (3, 2, 8)
    assert {"width", "lora/rank", "lora/targets"} <= {key for c in configs for key in c}
