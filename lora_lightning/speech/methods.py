"""The methods of a speech run, one function for each row of the table."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback
from torch import nn

from lora_lightning.model.batch_norm import BatchNormKeeper
from lora_lightning.registry import Registry
from lora_lightning.report.results import Row
from lora_lightning.runner import methods as common
from lora_lightning.runner.cases import NOTHING, Adapted, Case
from lora_lightning.runner.experiment import Method

# In the order of the table.
METHODS: Registry[Method] = Registry("method")
common.add(METHODS, "source_only")


@METHODS.register("lexicon")
def lexicon_only(experiment: Any) -> list[Row]:
    """The source model, decoded with the lexicon."""
    lexicon, model = experiment.lexicon(), experiment.fresh()
    if lexicon is None:
        experiment.run.notes.append("There is no lexicon (data.lexicon): no row with one.")
        return []

    def rows(case: Case, label: str) -> list[Row]:
        start = time.perf_counter()
        found = experiment.understood(model, case.train, lexicon)
        cost = Adapted(model, time.perf_counter() - start)
        table: list[Row] = experiment.table(
            label, case, cost, experiment.score(label, case.train, found)
        )
        return table

    return common.each(experiment, "lexicon only", NOTHING, rows)


common.add(METHODS, "label_free", "lora", "full")


class FrozenBatchNorm(Callback):
    """Keeps BatchNorm in eval mode, as `LoRACallback` does with ``batch_norm="frozen"``."""

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
        """Set eval mode again, as the Trainer puts everything in train mode."""
        BatchNormKeeper("frozen").apply(pl_module)
