"""`LoRACallback`: adapters through Lightning's hooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lora_lightning.errors import ConfigError
from lora_lightning.linalg.decompose import effective_rank, spectrum
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.values import check_adapter_name
from lora_lightning.model.adapter_file.save import save_adapter
from lora_lightning.model.batch_norm import POLICIES, BatchNormKeeper
from lora_lightning.model.calling import Forward
from lora_lightning.model.injection_report import InjectionReport
from lora_lightning.model.state import named_factors
from lora_lightning.training import checkpoint_hooks, checks, injection, sharded
from lora_lightning.training.last_finite import LastFinite
from lora_lightning.training.launch import LaunchedCallback
from lora_lightning.training.rank_schedule import RankSchedule


class LoRACallback(LaunchedCallback):
    """Adapt the backbone of a LightningModule with low-rank adapters.

        Trainer(callbacks=[LoRACallback(rank=8, target_modules="auto", backbone="model")])

    In `setup` (or right after the module's own ``configure_model``, where the network is built
    only there) the adapter is injected, the base frozen and exactly the factors, the head and
    what ``trainable`` names left trainable; so the optimizer that Lightning makes afterwards
    sees them. The first batch verifies that every adapter is alive. Checkpoints hold factors,
    what is trained, and buffers, but no frozen base weight; they load strictly into a fresh
    module of the same base. An adapter file is written with each checkpoint and at the end. A fit
    that diverges (NaN in the adapter) is stopped, and the last finite values are kept.

    Args:
        config: A `LoRAConfig` or a mapping of its fields; its fields can be given as keyword
            arguments instead, or over it.
        backbone: Attribute path of the network in the LightningModule; ``""``: the module.
        name: Name of the adapter.
        data: Batches of the target that ``rank="auto"``, and an `init` which starts from the
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
        log_spectrum: Log the singular values of each ΔW to the trainer's loggers every epoch.
        output_dir: Folder for adapter files; default ``adapters`` in the trainer's log folder.

    Attributes:
        report_: what was adapted; set in `setup`.
        adapter_path_: the file written at the end of the fit; None where another callback (a
            `FitGuard`, self-training) kept the source model.

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
        log_spectrum: bool = True,
        output_dir: str | Path | None = None,
        **config_kwargs: Any,
    ) -> None:
        if batch_norm not in POLICIES:
            raise ConfigError(f"batch_norm must be one of {POLICIES}, got {batch_norm!r}")
        check_adapter_name(name)
        self.config = LoRAConfig.make(config, **config_kwargs)
        self.backbone, self.name, self.output_dir = backbone, name, output_dir
        self.data, self.forward, self.loss = data, forward, loss
        self.verify, self.log_spectrum = verify, log_spectrum
        self.report_: InjectionReport | None = None
        self.adapter_path_: Path | None = None
        self._batch_norm = BatchNormKeeper(batch_norm)
        self._ranks = RankSchedule(self.config.prune_to)
        self._first_batch: Any = None  # a `FirstBatch`, until the first batch is over
        self._finite = LastFinite()
        self._folder = Path()

    @property
    def state_key(self) -> str:
        """Distinct for each adapter, so that two callbacks can share a trainer."""
        return self._generate_state_key(backbone=self.backbone, name=self.name)

    # ---- before training -------------------------------------------------------------------

    def before_launch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Inject here already, where the strategy is about to start processes by itself."""
        place = (pl_module, self.backbone, self.config, self.name)
        self.report_ = injection.inject_before_launch(*place)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject, or do so after ``configure_model``, where that builds the network."""
        super().setup(trainer, pl_module, stage)
        checks.check_callbacks(trainer, self)
        sharded.check_strategy(trainer, self.config)
        sharded.load_without_base(trainer, pl_module)
        # Called on every process: in distributed runs the folder is broadcast.
        self._folder = Path(self.output_dir or Path(trainer.log_dir or ".") / "adapters")
        adapter = checkpoint_hooks.Adapter(self.backbone, self.name, self.config.to_dict())
        checkpoint_hooks.install(pl_module, self.state_key, adapter)
        if checks.has_backbone(pl_module, self.backbone):
            self._inject(trainer, pl_module)
        if self.report_ is None or checks.builds_late(pl_module):
            injection.after_configure_model(pl_module, partial(self._inject, trainer, pl_module))

    def _inject(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report_ = injection.inject_in_trainer(
            trainer, pl_module, self.backbone, self.config, self.name, self.data, self.forward
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what the optimizer captured; log the size of the adapter."""
        backbone = checks.find_backbone(pl_module, self.backbone)
        checks.check_optimizers(trainer, pl_module, backbone, self.name)
        checks.check_unused_parameters(trainer, backbone)
        sharded.check_sharded(trainer, pl_module)
        self._batch_norm.start(backbone, fresh=checks.is_new(trainer))
        if self.verify:
            from lora_lightning.training.first_batch import FirstBatch

            self._first_batch = FirstBatch(backbone)
        self.report_ = report = injection.state_in(backbone).reports[self.name]
        counts = ("trainable_parameters", "factor_parameters")
        self._log(trainer, {f"lora/{name}": float(getattr(report, name)) for name in counts})

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

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set BatchNorm's mode again, which a validation in mid-epoch may have changed."""
        self._batch_norm.apply(checks.find_backbone(pl_module, self.backbone))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """On the first batch, verify every adapter with the backbone's own input."""
        # With manual optimization, a module may begin with a step that does not use the backbone.
        first = self._first_batch
        if first is not None and (first.reached or pl_module.automatic_optimization):
            self._verify_first(trainer)

    def _verify_first(self, trainer: Trainer) -> None:
        first, self._first_batch = self._first_batch, None
        if first is not None:
            first.verify(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Update the importance scores by the gradients, where ranks are pruned."""
        self._ranks.before_step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop a fit that has diverged; prune ranks, where the schedule is due."""
        if self._finite.after_batch(trainer, look=self.config.prune_to is not None):
            return
        if metrics := self._ranks.after_batch(trainer):
            self._log(trainer, metrics)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the spectrum of each delta."""
        self._finite.after_batch(trainer, look=True)
        if trainer.num_training_batches:
            self._verify_first(trainer)  # raises where no backward pass reached an adapter
        if not self.log_spectrum or not trainer.loggers:
            return
        metrics: dict[str, float] = {}
        backbone = checks.find_backbone(pl_module, self.backbone)
        for path, factors in named_factors(backbone, self.name).items():
            values = spectrum(*factors.low_rank(), factors.spec.scaling).cpu()  # one wait for all
            metrics |= {f"lora/{path}/sigma_{i}": float(v) for i, v in enumerate(values)}
            metrics[f"lora/{path}/effective_rank"] = effective_rank(values)
        self._log(trainer, metrics)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove pruned directions; write the adapter file."""
        backbone = checks.find_backbone(pl_module, self.backbone)
        self._batch_norm.stop(backbone)
        self._ranks.finish(backbone, self.name)
        self.report_ = injection.state_in(backbone).reports[self.name]
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self._folder / f"{self.name}.safetensors"
        self.adapter_path_ = None if checks.source_kept(trainer, path) else path
        if self.adapter_path_ and sharded.writes(trainer):
            save_adapter(backbone, path, self.name)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the LightningModule's own hooks."""
        sharded.put_back(trainer)
        self._clean(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove all hooks after a failed fit; the adapter stays."""
        sharded.put_back(trainer)
        self._clean(pl_module)

    def _clean(self, pl_module: LightningModule) -> None:
        injection.put_back(pl_module)
        self._finite = LastFinite()
        if self._first_batch is not None:  # the fit ended before its first backward pass
            self._first_batch.close()
            self._first_batch = None
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
        running = trainer.state.fn == TrainerFn.FITTING and trainer.state.stage is not None
        if running:
            self._finite.after_batch(trainer, look=True)  # what is not finite is not saved
        if running and sharded.writes(trainer):
            stem = f"{self.name}-epoch={trainer.current_epoch}-step={trainer.global_step}"
            backbone = checks.find_backbone(pl_module, self.backbone)
            save_adapter(backbone, self._folder / f"{stem}.safetensors", self.name)

    def _log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
