"""The methods of a translation run, one function for each row of the table."""

from __future__ import annotations

import time
from typing import Any

from lora_lightning.registry import Registry
from lora_lightning.report.results import Row
from lora_lightning.runner import methods as common
from lora_lightning.runner.cases import LABELS, Adapted, Case
from lora_lightning.runner.experiment import Method
from lora_lightning.text.parallel import TextBatch
from lora_lightning.text.translation_memory import TranslationMemory

# In the order of the table.
METHODS: Registry[Method] = Registry("method")
common.add(METHODS, "source_only")


@METHODS.register("memory")
def memory(experiment: Any) -> list[Row]:
    """The source model with the labelled pairs as its memory (kNN-MT): nothing is trained."""
    settings = experiment.config.memory

    def rows(case: Case, label: str) -> list[Row]:
        model = experiment.fresh().eval()
        start = time.perf_counter()
        known = TranslationMemory(
            model,
            TextBatch.of(experiment.labelled(case), model.subwords),
            settings.neighbours,
            settings.weight,
            settings.temperature,
        )
        size = known.keys.nbytes + known.values.nbytes
        seconds = time.perf_counter() - start
        adapted = Adapted(model, seconds, 0, size, {"adjust": known})
        table: list[Row] = experiment.rows(label, case, adapted)
        return table

    return common.each(experiment, "translation memory", LABELS, rows)


common.add(METHODS, "label_free", "lora", "full")
