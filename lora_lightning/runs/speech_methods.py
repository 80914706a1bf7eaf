"""The methods that a speech run compares, each a function from `Context` to rows.

A method with labels is run once for each target and each size of the enrolment. A further
method is one more function and one more entry in `METHODS`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, seed_everything
from torch import nn
from torchmetrics.functional.text import char_error_rate, word_error_rate

from lora_lightning import merge
from lora_lightning.callback import LoRACallback
from lora_lightning.data.speech import SpeechData
from lora_lightning.decompose import spectrum
from lora_lightning.results import Row, Run
from lora_lightning.runs.common import make_trainer
from lora_lightning.runs.progress import Stages
from lora_lightning.runs.speech_domains import Domain, Recordings
from lora_lightning.runs.speech_settings import Adaptation, Config
from lora_lightning.state import named_factors
from lora_lightning.tasks.ctc import CTCRecognition, spec_augment
from lora_lightning.tasks.recognisers import ConformerCTC


@dataclass
class Context:
    """What a method may use: the recordings, the source model, ways to train and measure.

    Attributes:
        source: the source model; a method works on a copy of it (`fresh`).
        hypotheses: (method, domain) → what was understood of the held-out recordings.
        run: what the report is made of; a method may add spectra and notes.
    """

    config: Config
    recordings: Recordings
    source: ConformerCTC
    seed: int
    stages: Stages
    run: Run
    hypotheses: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether this is the first seed, which the report shows where it shows one."""
        return self.seed == self.config.seeds[0]

    def fresh(self) -> ConformerCTC:
        """A copy of the source model, and the random numbers that every method starts with."""
        seed_everything(self.seed, verbose=False)
        return copy.deepcopy(self.source)

    def fit(
        self,
        model: ConformerCTC,
        settings: Adaptation,
        domain: Domain,
        size: int,
        callbacks: Sequence[Callback] = (),
    ) -> float:
        """Train `model` on the domain's enrolment of this size; returns the seconds."""
        steps = settings.steps[self.config.enrolment.index(size)]
        model.augment = spec_augment() if settings.spec_augment else None
        module = CTCRecognition(
            model.train(), learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
        )
        data = SpeechData(
            train=domain.enrolment(size, self.seed),
            sample_rate=model.sample_rate,
            max_batch=settings.batch,
            transform=domain.transform,
            seed=self.seed,
        )
        trainer = make_trainer(
            self.config, callbacks, max_epochs=-1, max_steps=steps, gradient_clip_val=5.0
        )
        start = time.perf_counter()
        trainer.fit(module, datamodule=data)
        return time.perf_counter() - start

    def measure(
        self,
        method: str,
        model: nn.Module,
        domain: Domain,
        seconds: float,
        parameters: int = 0,
        file_bytes: int | None = None,
        items: int | None = None,
    ) -> list[Row]:
        """WER and CER on the domain's held-out recordings."""
        found = self.understood(model, domain)
        self.hypotheses[method, domain.name] = found
        said = [self.source.labels.normalise(u.text or "") for u in domain.held_out]
        rates = {"WER": word_error_rate(found, said), "CER": char_error_rate(found, said)}
        return [
            Row(
                method, domain.name, self.seed, metric, float(rate), parameters, seconds,
                file_bytes, items,
            )
            for metric, rate in rates.items()
        ]  # fmt: skip

    def understood(self, model: nn.Module, domain: Domain) -> list[str]:
        """What the model writes for each held-out recording."""
        data = SpeechData(
            test=domain.held_out,
            sample_rate=self.source.sample_rate,
            batch_seconds=self.config.data.batch_seconds,
            transform=domain.transform,
        )
        trainer = make_trainer(self.config)
        module = CTCRecognition(model, self.source.labels)
        batches: Any = trainer.predict(module, data)
        found = {t.path: t.text for batch in batches for t in batch}
        return [found.get(str(item.path), "") for item in domain.held_out]


def source_only(context: Context) -> list[Row]:
    """The source model as it is."""
    tick = context.stages.stage("source only", "targets")
    rows, model = [], context.fresh()
    domains = context.recordings.domains
    for done, domain in enumerate(domains, 1):
        rows += context.measure("source only", model, domain, seconds=0.0)
        tick(done, len(domains))
    return rows


def lora(context: Context) -> list[Row]:
    """Low-rank factors, trained with the enrolment's transcripts."""
    return _each(context, "LoRA", _lora)


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


def _lora(context: Context, title: str, domain: Domain, size: int) -> list[Row]:
    model = context.fresh()
    seed = "" if context.first else f"-seed{context.seed}"
    callback = LoRACallback(
        context.config.lora,
        name=f"{domain.name}-{size}{seed}",
        batch_norm=context.config.batch_norm,
        output_dir=Path(context.config.out, "adapters"),
    )
    seconds = context.fit(model, context.config.train.lora, domain, size, [callback])
    assert callback.report_ is not None
    assert callback.adapter_path_ is not None
    if context.first and size == context.config.headline and not context.run.spectra:
        for path, factors in named_factors(model, callback.name).items():
            values = spectrum(factors.lora_B, factors.lora_A, factors.spec.scaling)
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
METHODS: dict[str, Callable[[Context], list[Row]]] = {
    "source_only": source_only,
    "lora": lora,
    "full": full,
}
