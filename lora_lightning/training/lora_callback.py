"""`LoRACallback`: adapters through Lightning's hooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lora_lightning.lora.config import ConfigFields, LoRAConfig
from lora_lightning.lora.values import check_adapter_name, check_choice
from lora_lightning.model.adapter_file.save import save_adapter
from lora_lightning.model.batch_norm import POLICIES, BatchNormKeeper
from lora_lightning.model.calling import Forward
from lora_lightning.model.state import named_factors
from lora_lightning.training import (
    adapter_files,
    adapter_log,
    checkpoint_hooks,
    checks,
    injection,
    sharded,
)
from lora_lightning.training.first_look import FirstLook
from lora_lightning.training.last_finite import LastFinite
from lora_lightning.training.optimizer_check import check_optimizers
from lora_lightning.training.rank_schedule import RankSchedule


class LoRACallback(injection.InjectingCallback):
    """Adapt the backbone of a LightningModule with low-rank adapters.

        Trainer(callbacks=[LoRACallback(rank=8, target_modules="auto", backbone="model")])

    In `setup` (or right after the module's own ``configure_model``, where the network is built
    only there) the adapter is injected, the base frozen and exactly the factors, the head and
    what ``trainable`` names left trainable; so the optimizer that Lightning makes afterwards
    sees them. The first batch verifies that every adapter is alive. Checkpoints hold factors,
    what is trained, and buffers, but no frozen base weight; they load strictly into a fresh
    module of the same base. An adapter file is written with each checkpoint, goes with it where it
    is pruned, and another is written at the end. A fit that diverges (NaN in the adapter) is
    stopped, and the last finite values are kept.

    Args:
        config: A `LoRAConfig` or a mapping of its fields; its fields can be given as keyword
            arguments instead, or over it.
        backbone: Attribute path of the network in the LightningModule; ``""``: the module.
        name: Name of the adapter.
        data: Batches of the target that a rule as `rank`, and an `init` which starts from the
            target, read; None: the trainer's own training batches. Labels are needed for
            ``"lora-ga"`` alone.
        forward: From (backbone, batch): runs the backbone once on a batch of `data`; None: the
            module's ``predict_step``, its forward, or the backbone where it has neither (see
            `lora_lightning.model.calling`).
        loss: From (backbone, batch) to a scalar loss, for ``"lora-ga"``; None: what the module's
            ``training_step`` returns.
        batch_norm: BatchNorm's statistics during training: ``"frozen"`` (eval mode, the
            source's statistics stay; the default), ``"adapt"`` (updated on the target), or
            ``"reset"`` (reset at the start, then averaged over the target's batches).
            Statistics that changed are saved with the adapter.
        verify: Verify every adapter on the first training batch (see `lora_lightning.verify`).
        log_spectrum: Log each layer's effective rank and the singular values of its ΔW every epoch
            too: as histograms in TensorBoard and W&B, else as a scalar each.
        output_dir: Folder for adapter files; default ``adapters`` in the trainer's log folder.

    Attributes:
        report_: what was adapted; set in `setup`.
        adapter_path_: the file of the best checkpoint, where a `ModelCheckpoint` monitors
            something (the first that does, if several); else that of the end of the fit, as under
            callbacks that choose or average themselves (`FitGuard`, self-training, averages of
            weights) and with `prune_to`. None where such a callback kept the source model.

    Raises:
        ConfigError: a bad value, or a combination of callbacks that cannot work.
        TargetError: the backbone or a target does not exist.
        VerificationError: on the first batch, an adapter is dead.
    """

    def __init__(
        self,
        config: LoRAConfig | Mapping[str, Any] | None = None,
        *,
        backbone: str = "model",
        name: str = "default",
        data: Iterable[Any] | None = None,
        forward: Forward | None = None,
        loss: Forward | None = None,
        batch_norm: str = "frozen",
        verify: bool = True,
        log_spectrum: bool = False,
        output_dir: str | Path | None = None,
        **config_kwargs: ConfigFields,
    ) -> None:
        check_choice("batch_norm", batch_norm, POLICIES)
        check_adapter_name(name)
        self.config = LoRAConfig.make(config, **config_kwargs)
        self.backbone, self.name, self.output_dir = backbone, name, output_dir
        self.data, self.forward, self.loss = data, forward, loss
        self.verify, self.log_spectrum = verify, log_spectrum
        self.adapter_path_: Path | None = None
        self._batch_norm = BatchNormKeeper(batch_norm)
        self._ranks = RankSchedule(self.config.prune_to)
        self._first_look = FirstLook()
        self._finite = LastFinite()
        self._log = adapter_log.AdapterLog(self)
        self.files = adapter_files.AdapterFiles(name, self._save)

    @property
    def state_key(self) -> str:
        """Distinct for each adapter, so that two callbacks can share a trainer."""
        return self._generate_state_key(backbone=self.backbone, name=self.name)

    # ---- before training -------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject, or do so after ``configure_model``, where that builds the network."""
        super().setup(trainer, pl_module, stage)
        checks.check_callbacks(trainer, self)
        sharded.check_strategy(trainer, self.config)
        sharded.load_without_base(trainer, pl_module)
        # Called on every process: in distributed runs the folder is broadcast.
        folder = Path(self.output_dir or Path(trainer.log_dir or ".") / "adapters")
        self.files.follow(trainer, folder)
        self._hook(pl_module)
        self.inject(trainer, pl_module)

    def take(self, trainer: Trainer, pl_module: LightningModule, held: dict[str, Any]) -> None:
        """Take what processes of the strategy learnt; checkpoints are as after any other fit."""
        super().take(trainer, pl_module, held)
        self._hook(pl_module)

    def _hook(self, pl_module: LightningModule) -> None:
        adapter = checkpoint_hooks.Adapter(self.backbone, self.name, self.config.to_dict())
        checkpoint_hooks.install(pl_module, self.state_key, adapter)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what the optimizer captured; log the size of the adapter."""
        backbone = checks.find_backbone(pl_module, self.backbone)
        check_optimizers(trainer, pl_module, backbone, self.name)
        checks.check_unused_parameters(trainer, backbone)
        sharded.check_sharded(trainer, pl_module)
        self._batch_norm.start(backbone, fresh=checks.is_new(trainer))
        if self.verify:
            self._first_look.start(backbone)
        self.report_ = injection.state_in(backbone).reports[self.name]
        self._log.size(trainer, self.report_)
        self._log.hyperparameters(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Initialise from the target's batches, where `init` needs them, unless done before."""
        backbone = checks.find_backbone(pl_module, self.backbone)
        if checks.is_new(trainer) and self.name in injection.state_in(backbone).unstarted:
            from lora_lightning.training.data_driven import start_in_trainer

            start_in_trainer(
                trainer, pl_module, backbone, self.name, self.data, self.forward, self.loss
            )
        self._ranks.start(trainer, backbone, self.name)
        self._finite.start(trainer, backbone)

    # ---- while training --------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the base is still frozen; set BatchNorm's mode."""
        backbone = checks.find_backbone(pl_module, self.backbone)
        checks.check_still_frozen(backbone)
        self._batch_norm.apply(backbone)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Set BatchNorm's mode again, which a validation in mid-epoch may have changed."""
        self._batch_norm.apply(checks.find_backbone(pl_module, self.backbone))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """On the first batch, verify every adapter with the backbone's own input."""
        self._first_look.after_backward(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, *of: Any) -> None:
        """Update the importance scores by the gradients, where ranks are pruned."""
        self._ranks.before_step(trainer, of[-1])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop a fit that has diverged; prune ranks, where the schedule is due."""
        if self._finite.after_batch(trainer, look=self.config.prune_to is not None):
            return
        self._log.metrics(trainer, self._ranks.after_batch(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how far the adapter has gone, and on request the spectrum of each ΔW."""
        self._finite.after_batch(trainer, look=True)
        if trainer.num_training_batches:
            self._first_look.at_end(trainer)  # raises where no backward pass reached an adapter
        deltas = named_factors(checks.find_backbone(pl_module, self.backbone), self.name)
        self._log.deltas(trainer, deltas, each=self.log_spectrum)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove pruned directions; write the adapter file."""
        backbone = checks.find_backbone(pl_module, self.backbone)
        self._batch_norm.stop(backbone)
        self._ranks.finish(backbone, self.name)
        self.report_ = injection.state_in(backbone).reports[self.name]
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.adapter_path_ = self.files.finish(trainer, pruned=self.config.prune_to is not None)

    def _save(self, trainer: Trainer, path: Path) -> None:
        save_adapter(checks.find_backbone(trainer.lightning_module, self.backbone), path, self.name)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the LightningModule's own hooks, and the strategy's."""
        adapter_files.put_back(trainer)
        self._clean(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Remove all hooks after a failed fit; the adapter stays."""
        self._clean(trainer, pl_module)  # a checkpoint may follow

    def _clean(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sharded.put_back(trainer)
        injection.put_back(pl_module)
        self._finite = LastFinite()
        self._first_look.close()
        if checks.has_backbone(pl_module, self.backbone):
            self._batch_norm.stop(checks.find_backbone(pl_module, self.backbone))

    # ---- checkpoints -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of the rank schedule, for a checkpoint."""
        return self._ranks.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._ranks.load_state_dict(state_dict)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the adapter file beside a checkpoint of the fit, validation included."""
        if adapter_files.is_fitting(trainer):
            self._finite.after_batch(trainer, look=True)  # what is not finite is not saved
            self.files.to_checkpoint(trainer, checkpoint, self.state_key)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the files of the fit that is resumed."""
        self.files.from_checkpoint(trainer, checkpoint, self.state_key)
