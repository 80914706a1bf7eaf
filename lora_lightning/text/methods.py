"""The methods that a translation run compares, each a function from `Context` to rows.

A method is run once for each target domain. A further method is one more function and one more
entry in `METHODS`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from lora_lightning.linalg.decompose import spectrum
from lora_lightning.model.state import named_factors
from lora_lightning.model.switching import merge
from lora_lightning.model.targets import without_head
from lora_lightning.report.results import Row, Transcript
from lora_lightning.runner.sweep import Rank, at_rank
from lora_lightning.runner.trainer import make_trainer
from lora_lightning.text.experiment import Adapted, Context, Domain
from lora_lightning.text.parallel import Pair, TextBatch
from lora_lightning.text.self_training import PseudoTranslationCallback
from lora_lightning.text.translation import Translation
from lora_lightning.text.translation_memory import TranslationMemory
from lora_lightning.text.translators import Translator
from lora_lightning.training.lora_callback import LoRACallback

_Method = Callable[[Context, Domain], Adapted]

NAME = "LoRA, no labels"


def source_only(context: Context) -> list[Row]:
    """The source model as it is."""
    model = context.fresh()
    rows = context.measure("source only", context.everyday, Adapted(model, 0.0))
    tick = context.stages.stage("source only", "targets")
    for done, domain in enumerate(context.targets, 1):
        rows += context.measure("source only", domain, Adapted(model, 0.0))
        tick(done, len(context.targets))
    return rows


def memory(context: Context) -> list[Row]:
    """The source model with the labelled pairs as its memory (kNN-MT): nothing is trained."""
    return _each(context, "translation memory, target labels", _memory)


def label_free(context: Context) -> list[Row]:
    """Low-rank factors, trained on translations that the translator writes itself."""
    return _each(context, NAME, _label_free)


def lora(context: Context, rank: Rank | None = None) -> list[Row]:
    """Low-rank factors and the head, trained on the labelled pairs; at another rank if given."""
    name = "LoRA, target labels" if rank is None else f"LoRA, rank {rank}, target labels"
    return _each(context, name, partial(_lora, rank=rank))


def full(context: Context) -> list[Row]:
    """Every weight, trained on the labelled pairs: the upper reference."""
    return _each(context, "full, target labels", _full)


def _each(context: Context, name: str, method: _Method) -> list[Row]:
    """The rows of every target; that of the source domain is the mean over all adapters."""
    rows: list[Row] = []
    forgotten: list[Row] = []
    tick = context.stages.stage(name, "targets")
    for done, domain in enumerate(context.targets, 1):
        adapted = method(context, domain)
        rows += context.measure(name, domain, adapted)
        forgotten += context.measure(name, context.everyday, adapted)
        tick(done, len(context.targets))
    for metric in dict.fromkeys(r.metric for r in forgotten):
        of = [r for r in forgotten if r.metric == metric]
        value, seconds = fmean(r.value for r in of), fmean(r.seconds for r in of)
        rows.append(replace(of[0], value=value, seconds=seconds))
    return rows


def _memory(context: Context, domain: Domain) -> Adapted:
    model, settings = context.fresh().eval(), context.config.memory
    start = time.perf_counter()
    known = TranslationMemory(
        model,
        TextBatch.of(context.labelled(domain), model.subwords),
        settings.neighbours,
        settings.weight,
        settings.temperature,
    )
    size = known.keys.nbytes + known.values.nbytes
    return Adapted(model, time.perf_counter() - start, 0, size, known)


def _lora(context: Context, domain: Domain, rank: Rank | None) -> Adapted:
    model = context.fresh()
    callback = _callback(context, domain, "" if rank is None else f"-rank-{rank}", rank=rank)
    seconds = context.fit(model, context.config.train.lora, domain, [callback])
    if context.first and not context.run.spectra:
        for path, factors in named_factors(model, callback.name).items():
            values = spectrum(*factors.low_rank(), factors.spec.scaling)
            context.run.spectra[path] = values.tolist()
    return _merged(model, seconds, callback)


def _full(context: Context, domain: Domain) -> Adapted:
    model = context.fresh()
    seconds = context.fit(model, context.config.train.full, domain)
    parameters = sum(p.numel() for p in model.parameters())
    return Adapted(model, seconds, parameters, sum(t.nbytes for t in model.state_dict().values()))


def _label_free(context: Context, domain: Domain) -> Adapted:
    config, model = context.config, context.fresh()
    settings, pairs = config.train.label_free, domain.drawn(config.unlabelled, context.seed)
    own = PseudoTranslationCallback(
        [p.source for p in pairs],
        model.subwords,
        {word for p in context.everyday.train for word in p.target.split()},
        keep=settings.keep,
        dropped=settings.dropped,
        batch_size=config.data.target_batch_size,
        seed=context.seed,
    )
    callback = _callback(context, domain, "-no-labels", without=model)
    trainer = make_trainer(
        config,
        [callback, own],
        max_epochs=-1,
        max_steps=settings.steps,
        gradient_clip_val=1.0,
        reload_dataloaders_every_n_epochs=1,
    )
    module = Translation(
        model.train(),
        settings.learning_rate,
        settings.weight_decay,
        settings.label_smoothing,
        settings.schedule,
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule=own.data)
    seconds = time.perf_counter() - start
    _say(context, domain, pairs, own)
    return _merged(model, seconds, callback)


def _callback(
    context: Context,
    domain: Domain,
    what: str,
    without: Translator | None = None,
    rank: Rank | None = None,
) -> LoRACallback:
    config = context.config
    lora = at_rank(config.lora if without is None else without_head(config.lora, without), rank)
    out = Path(config.out, "adapters")
    return LoRACallback(lora, name=context.named(domain, what), output_dir=out)


def _merged(model: Translator, seconds: float, callback: LoRACallback) -> Adapted:
    """Measured as it would be used: merged, at the speed of the source model."""
    assert callback.report_ is not None
    assert callback.adapter_path_ is not None
    merge(model)
    size = callback.adapter_path_.stat().st_size
    return Adapted(model, seconds, callback.report_.trainable_parameters, size)


def _say(
    context: Context, domain: Domain, pairs: list[Pair], own: PseudoTranslationCallback
) -> None:
    """How it ended, and what the sentences that were learnt from were taken for."""
    context.run.notes.append(
        f"{NAME}, {domain.name} (seed {context.seed}): {own.termination_condition_}; the state of "
        f"round {own.accepted_} of {len(own.history_) - 1} is kept."
    )
    for pair in pairs:
        before, after = own.source_[pair.source], own.translations_[pair.source]
        context.run.transcripts.append(
            Transcript(
                item=pair.source,
                domain=domain.name,
                reference=pair.target,
                source=before.text,
                adapted=after.text,
                seed=context.seed,
                split="target",
                confidence=round(math.exp(after.log_probability), 4),
                round=own.changed_in_.get(pair.source, 0),
            )
        )


# In the order of the table.
METHODS: dict[str, Callable[..., list[Row]]] = {
    "source_only": source_only,
    "memory": memory,
    "label_free": label_free,
    "lora": lora,
    "full": full,
}
