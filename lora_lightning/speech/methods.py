"""The methods that a speech run compares, each a function from `Context` to rows.

A method with labels is run once for each target and each size of the enrolment. A further
method is one more function and one more entry in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import nn

from lora_lightning import merge
from lora_lightning.callback import LoRACallback
from lora_lightning.decompose import spectrum
from lora_lightning.results import Row
from lora_lightning.runs.ranked import Rank, at_rank
from lora_lightning.runs.speech_context import Context
from lora_lightning.runs.speech_domains import Domain
from lora_lightning.runs.speech_label_free import label_free, lexicon_only
from lora_lightning.state import named_factors


def source_only(context: Context) -> list[Row]:
    """The source model as it is."""
    tick = context.stages.stage("source only", "targets")
    rows, model = [], context.fresh()
    domains = context.recordings.domains
    for done, domain in enumerate(domains, 1):
        rows += context.measure("source only", model, domain, seconds=0.0)
        tick(done, len(domains))
    return rows


def lora(context: Context, rank: Rank | None = None) -> list[Row]:
    """Low-rank factors, trained with the enrolment's transcripts; at another rank if given."""
    name = "LoRA" if rank is None else f"LoRA, rank {rank}"
    return _each(context, name, partial(_lora, rank=rank))


def full(context: Context) -> list[Row]:
    """Every weight, trained with the enrolment's transcripts: the upper reference."""
    return _each(context, "full", _full)


_Method = Callable[[Context, str, Domain, int], list[Row]]


def _each(context: Context, name: str, method: _Method) -> list[Row]:
    rows: list[Row] = []
    domains = context.recordings.domains
    for size in context.config.enrolment:
        title = f"{name}, {size} target labels"
        tick = context.stages.stage(title, "targets")
        for done, domain in enumerate(domains, 1):
            rows += method(context, title, domain, size)
            tick(done, len(domains))
    return rows


def _lora(context: Context, title: str, domain: Domain, size: int, rank: Rank | None) -> list[Row]:
    model = context.fresh()
    callback = LoRACallback(
        at_rank(context.config.lora, rank),
        name=context.named(domain, str(size) if rank is None else f"{size}-rank-{rank}"),
        batch_norm=context.config.batch_norm,
        output_dir=Path(context.config.out, "adapters"),
    )
    seconds = context.fit(model, context.config.train.lora, domain, size, [callback])
    assert callback.report_ is not None
    assert callback.adapter_path_ is not None
    if context.first and size == context.config.headline and not context.run.spectra:
        for path, factors in named_factors(model, callback.name).items():
            values = spectrum(*factors.low_rank(), factors.spec.scaling)
            context.run.spectra[path] = values.tolist()
    size_of_file = callback.adapter_path_.stat().st_size
    parameters = callback.report_.trainable_parameters
    # Measured as it would be used: merged, at the speed of the source model.
    merge(model)
    return context.measure(title, model, domain, seconds, parameters, size_of_file, size)


def _full(context: Context, title: str, domain: Domain, size: int) -> list[Row]:
    model = context.fresh()
    freeze = FrozenBatchNorm() if context.config.batch_norm == "frozen" else None
    callbacks = [freeze] if freeze else []
    seconds = context.fit(model, context.config.train.full, domain, size, callbacks)
    parameters = sum(p.numel() for p in model.parameters())
    file_bytes = sum(t.nbytes for t in model.state_dict().values())
    return context.measure(title, model, domain, seconds, parameters, file_bytes, size)


class FrozenBatchNorm(Callback):
    """Keeps BatchNorm in eval mode, as `LoRACallback` does with ``batch_norm="frozen"``."""

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
        """A Trainer puts everything in train mode."""
        for module in pl_module.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


# In the order of the table.
METHODS: dict[str, Callable[..., list[Row]]] = {
    "source_only": source_only,
    "lexicon": lexicon_only,
    "label_free": label_free,
    "lora": lora,
    "full": full,
}
