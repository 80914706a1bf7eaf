"""A LightningModule's own steps, run outside the training loop."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning.errors import ConfigError
from lora_lightning.linalg.torch_settings import forked_rng
from lora_lightning.model.calling import call


@contextmanager
def outside_training(pl_module: LightningModule) -> Iterator[None]:
    """Within the block the module's steps log nothing; the random state is restored afterwards.

    What is logged here belongs to no step of the training, and the order of the training that
    follows must not depend on it.
    """
    own = vars(pl_module)
    kept: dict[str, Any] = {n: own[n] for n in ("log", "log_dict") if n in own}
    with forked_rng():
        own["log"] = own["log_dict"] = lambda *args, **kwargs: None
        try:
            yield
        finally:
            del own["log"], own["log_dict"]
            own |= kept


def own_pass(batches: Iterable[Any]) -> Iterable[Any]:
    """The same batches, for a pass over them beside the trainer's own.

    A DataLoader with persistent workers has one iterator, so that another pass would end the first.
    """
    if not isinstance(batches, DataLoader) or not batches.persistent_workers:
        return batches
    twin = copy.copy(batches)
    vars(twin).update(persistent_workers=False, _iterator=None)  # past its `__setattr__`
    return twin


def check_lasting(batches: Any) -> None:
    """Refuse a training loader that a pass before the training would use up.

    Raises:
        ConfigError: it is an iterator.
    """
    if hasattr(batches, "__next__"):
        raise ConfigError(
            f"the training loader is an iterator ({type(batches).__name__}), and what is read "
            "before the training would be missing in it: give the fit a DataLoader or a list, or "
            "LoRACallback(data=…) other batches to start from"
        )


def gradient_scale(trainer: Trainer, optimizer: Any) -> float:
    """By how much gradients exceed their values before this optimizer's step.

    Lightning leaves those of fused optimizers as ``GradScaler`` scaled them: they unscale their
    gradients themselves, in the step.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    own = getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if own and scaler is not None else 1.0


def loss_in(outputs: Any) -> Any:
    """The loss in what ``training_step`` returned, which may be the loss itself."""
    return outputs.get("loss") if isinstance(outputs, Mapping) else outputs


def step_loss(pl_module: LightningModule, batch: Any) -> Any:
    """The loss that the module's ``training_step`` returns for this batch."""
    return loss_in(step(pl_module, "training_step", batch))


def step(pl_module: LightningModule, name: str, batch: Any) -> Any:
    """What this step of the module returns; called with the arguments that it takes."""
    run = getattr(pl_module, name)
    if is_param_in_hook_signature(run, "dataloader_iter", explicit=True):
        return run(iter([(batch, 0, 0)]))
    return run(batch, 0) if is_param_in_hook_signature(run, "batch_idx", min_args=2) else run(batch)


def run_module(pl_module: LightningModule, network: nn.Module, batch: Any) -> Any:
    """The output of the module's forward; of the adapted network's where it has none."""
    has_forward = is_overridden("forward", pl_module)
    return call(pl_module if has_forward else network, batch, network)
