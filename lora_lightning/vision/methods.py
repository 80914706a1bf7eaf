"""The methods that a classification run compares, each a function from `Context` to rows.

A further method is one more function and one more entry in `METHODS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from lora_lightning import merge
from lora_lightning.batchnorm import BatchNormKeeper
from lora_lightning.callback import LoRACallback
from lora_lightning.decompose import spectrum
from lora_lightning.results import Row
from lora_lightning.runs.common import make_trainer
from lora_lightning.runs.context import Context
from lora_lightning.runs.gradient_free import ALIGNED, lame_row, recentre_row
from lora_lightning.runs.label_free import label_free
from lora_lightning.runs.progress import Ticks
from lora_lightning.runs.ranked import Rank, at_rank
from lora_lightning.state import named_factors
from lora_lightning.tasks.classification import Classifier


def source_only(context: Context) -> list[Row]:
    """The source model as it is."""
    return context.measure("source only", context.fresh(), seconds=0.0)


def batchnorm(context: Context) -> list[Row]:
    """BatchNorm's statistics taken anew from the target's unlabelled training pictures.

    Li et al. 2017, "Revisiting batch normalization for practical domain adaptation" (AdaBN),
    arXiv:1603.04779.
    """
    model = context.fresh()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        context.run.notes.append("The backbone has no BatchNorm: no statistics to take anew.")
        return []
    start = time.perf_counter()
    module = _BatchNormStatistics(model)
    tick = context.stages.stage("BatchNorm statistics of the target", "batches")
    trainer = make_trainer(context.config, [Ticks(tick)])
    loader = context.data.on(train=context.data.target).unlabelled_dataloader()
    trainer.predict(module, loader, return_predictions=False)
    seconds = time.perf_counter() - start
    size = sum(b.nbytes for norm in norms for b in norm.buffers())
    return context.measure("BatchNorm statistics", model, seconds, 0, size)


class _BatchNormStatistics(Classifier):
    """Each forward adds a batch to the averages of the BatchNorm layers."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.keeper = BatchNormKeeper("reset")
        self.keeper.start(model)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The labels are not looked at; all but BatchNorm stays in eval mode."""
        self.keeper.apply(self.model)
        return super().predict_step(batch, batch_idx)


def lora(context: Context, rank: Rank | None = None) -> list[Row]:
    """Low-rank factors and the head, trained with the target's labels; at another rank if given."""
    model = context.fresh()
    what = "" if rank is None else f"_rank_{rank}"
    name = context.named(f"adapter{what}")
    callback = LoRACallback(
        at_rank(context.config.lora, rank),
        name=name,
        batch_norm=context.config.batch_norm,
        output_dir=Path(context.config.out),
    )
    label = "LoRA, target labels" if rank is None else f"LoRA, rank {rank}, target labels"
    title = "LoRA with target labels" if rank is None else label
    settings = context.config.train.lora
    seconds = context.fit(model, settings, context.data.target, title, [callback])
    assert callback.report_ is not None
    assert callback.adapter_path_ is not None
    if context.first and rank is None:
        for path, factors in named_factors(model, name).items():
            values = spectrum(*factors.low_rank(), factors.spec.scaling)
            context.run.spectra[path] = values.tolist()
    size = callback.adapter_path_.stat().st_size
    parameters = callback.report_.trainable_parameters
    # Measured as it would be used: merged, at the speed of the source model.
    merge(model)
    return context.measure(label, model, seconds, parameters, size)


def full(context: Context) -> list[Row]:
    """Every weight trained with the target's labels: the upper reference."""
    model = context.fresh()
    title = "full fine-tuning with target labels"
    seconds = context.fit(model, context.config.train.full, context.data.target, title)
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(t.nbytes for t in model.state_dict().values())
    return context.measure("full, target labels", model, seconds, parameters, size)


# In the order of the table.
METHODS: dict[str, Callable[..., list[Row]]] = {
    "source_only": source_only,
    "recentre": recentre_row,
    "lame": lame_row,
    **ALIGNED,
    "batchnorm": batchnorm,
    "label_free": label_free,
    "lora": lora,
    "full": full,
}
