"""Logging of an adapter by the trainer's loggers: hyperparameters, few scalars, and spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from lora_lightning.linalg.decompose import effective_rank, spectrum
from lora_lightning.lora.factors import Factors
from lora_lightning.model.injection_report import InjectionReport
from lora_lightning.training.injection import InjectingCallback


class AdapterLog:
    """Logs by every logger of a trainer.

    Names begin with "lora/", then the adapter's where the trainer has several such callbacks.
    """

    def __init__(self, callback: InjectingCallback):
        self.callback = callback

    def _prefix(self, trainer: Trainer) -> str:
        callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
        several = sum(isinstance(c, type(self.callback)) for c in callbacks) > 1
        return f"lora/{self.callback.name}" if several else "lora"

    def metrics(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Log scalars at the present step."""
        if metrics:
            named = {f"{self._prefix(trainer)}/{name}": value for name, value in metrics.items()}
            for logger in trainer.loggers:
                logger.log_metrics(named, step=trainer.global_step)

    def size(self, trainer: Trainer, report: InjectionReport) -> None:
        """Log the number of parameters."""
        counts = ("trainable_parameters", "factor_parameters")
        self.metrics(trainer, {name: float(getattr(report, name)) for name in counts})

    def hyperparameters(self, trainer: Trainer) -> None:
        """Log the adapter's, before Lightning logs the user's, and beside them."""
        config, report, prefix = self.callback.config, self.callback.report_, self._prefix(trainer)
        assert report is not None
        patterns = config.target_modules
        own = {
            f"{prefix}/adapter": self.callback.name,
            f"{prefix}/rank": config.rank,
            f"{prefix}/alpha": config.alpha,
            f"{prefix}/target_modules": patterns if isinstance(patterns, str) else str(patterns),
            f"{prefix}/targets": len(report.rows),
            f"{prefix}/trainable_parameters": report.trainable_parameters,
        }
        holders = (trainer.lightning_module, getattr(trainer, "datamodule", None))
        users = [h for h in holders if h is not None]
        taken = {key for h in users for key in _flatten_dict(dict(h.hparams_initial))}  # as logged
        own = {key: value for key, value in own.items() if key not in taken}
        shown = {k: v for h in users if h._log_hyperparams for k, v in h.hparams_initial.items()}
        shown.pop("_class_path", None)  # LightningCLI's
        for logger in trainer.loggers:
            # TensorBoard shows what it is given first, and nothing that follows.
            before = shown if isinstance(logger, TensorBoardLogger) else {}
            logger.log_hyperparams(before | own)

    def deltas(self, trainer: Trainer, deltas: Mapping[str, Factors], each: bool) -> None:
        """Log how large the ΔW of all layers are together, and their mean effective rank.

        Args:
            trainer: Whose loggers.
            deltas: Layer → its factors.
            each: Log each layer's singular values too: as a histogram, where the logger has them.
        """
        if not trainer.loggers or not deltas:
            return
        found = [spectrum(*f.low_rank(), f.spec.scaling) for f in deltas.values()]
        spectra = dict(zip(deltas, (v.cpu() for v in found), strict=True))  # one wait for all
        ranks = {f"{path}/effective_rank": effective_rank(v) for path, v in spectra.items()}
        norm = math.sqrt(sum(float(v.square().sum()) for v in spectra.values()))
        all_layers = {"delta_norm": norm, "effective_rank": sum(ranks.values()) / len(ranks)}
        self.metrics(trainer, all_layers | (ranks if each else {}))
        if each:
            named = {f"{self._prefix(trainer)}/{path}/sigma": v for path, v in spectra.items()}
            for logger in trainer.loggers:
                _log_spectra(logger, named, trainer.global_step)


def _log_spectra(logger: Any, spectra: Mapping[str, Tensor], step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        for name, values in spectra.items():
            logger.experiment.add_histogram(name, values, step)
    elif isinstance(logger, WandbLogger):
        import wandb

        histograms: Any = {n: wandb.Histogram(values.tolist()) for n, values in spectra.items()}
        logger.log_metrics(histograms, step)
    else:
        singly = ((n, i, v) for n, values in spectra.items() for i, v in enumerate(values.tolist()))
        logger.log_metrics({f"{n}_{i}": v for n, i, v in singly}, step)
