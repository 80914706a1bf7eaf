"""The common methods of all kinds of runs: functions from an `Experiment` to rows.

A kind adds them to its own registry by `add`, among its own methods, in the table's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from statistics import fmean
from typing import Any

from torch import nn

from lora_lightning.linalg.decompose import spectrum
from lora_lightning.model.state import named_factors
from lora_lightning.model.switching import merge
from lora_lightning.model.targets import without_head
from lora_lightning.registry import Registry
from lora_lightning.report.results import Row
from lora_lightning.runner.cases import LABELS, NO_LABELS, NOTHING, Adapted, Case
from lora_lightning.runner.experiment import Experiment, Method
from lora_lightning.runner.progress import Says
from lora_lightning.runner.sweep import Rank, at_rank
from lora_lightning.training.lora_callback import LoRACallback

COMMON: Registry[Method] = Registry("method")


def add(methods: Registry[Method], *names: str) -> None:
    """Register the common methods of these names."""
    for name in names:
        methods.register(name)(COMMON.get(name))


@COMMON.register("source_only")
def source_only(experiment: Experiment[Any]) -> list[Row]:
    """The source model without adaptation."""
    model = experiment.fresh()

    def row(case: Case, label: str) -> list[Row]:
        return experiment.rows(label, case, Adapted(model))

    return each(experiment, "source only", NOTHING, row)


@COMMON.register("label_free")
def label_free(experiment: Experiment[Any]) -> list[Row]:
    """Low-rank factors, trained on items of the target without their labels."""
    return each(experiment, "LoRA", NO_LABELS, partial(_label_free, experiment))


@COMMON.register("lora")
def lora(experiment: Experiment[Any], rank: Rank | None = None) -> list[Row]:
    """Low-rank factors and the head, trained with the target's labels; at another rank if given."""
    name = "LoRA" if rank is None else f"LoRA, rank {rank}"
    return each(experiment, name, LABELS, partial(_lora, experiment, rank))


@COMMON.register("full")
def full(experiment: Experiment[Any]) -> list[Row]:
    """Every weight, trained with the target's labels: the upper reference."""
    return each(experiment, "full", LABELS, partial(_full, experiment))


def each(
    experiment: Experiment[Any], name: str, what: str, method: Callable[[Case, str], list[Row]]
) -> list[Row]:
    """The rows of a method for every case.

    Args:
        experiment: Whose cases.
        name: Of the method; a row's name also has the case's `given`.
        what: Data of the target: `NOTHING`, `LABELS` or `NO_LABELS`.
        method: From a case and the row's name to rows.
    """

    def of(case: Case, label: str) -> list[Row]:
        if experiment.lacks_data(case):
            return experiment.without_values(label, case)
        return method(case, label)

    rows: list[Row] = []
    for given, group in groupby(experiment.cases(what), key=attrgetter("given")):
        cases, label = list(group), f"{name}, {given}" if given else name
        if experiment.counts_batches:  # the trainers have their own bars
            rows += [row for case in cases for row in of(case, label)]
            continue
        stage = experiment.stages.stage(label, "targets", len(cases))
        for done, case in enumerate(cases, 1):
            rows += of(case, label)
            stage(done, len(cases))
    return _averaged(rows)


def _averaged(rows: Sequence[Row]) -> list[Row]:
    """The rows; those of a domain in several cases are averaged, and come last."""
    same: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        same.setdefault((row.method, row.domain, row.metric), []).append(row)
    means = [
        replace(of[0], value=fmean(r.value for r in of), seconds=fmean(r.seconds for r in of))
        for of in same.values()
        if len(of) > 1
    ]
    return [of[0] for of in same.values() if len(of) == 1] + means


def _label_free(experiment: Experiment[Any], case: Case, label: str) -> list[Row]:
    model = experiment.fresh()
    own = experiment.unlabelled(model, case)
    lora = without_head(experiment.config.lora, model, own.target_modules, own.trainable)
    callback = experiment.adapter(lora, case, "no", "labels", batch_norm=own.batch_norm)
    says, end = _line(experiment, case)
    callbacks = [callback, *own.callbacks, *_bars(experiment, label), *says]
    seconds = experiment.train(own.task, own.data, callbacks, (label, case.name), **own.trainer)
    end()
    own.tell()
    adapted = _merged(model, seconds, callback)
    return [
        row
        for end, decoding in own.decodings.items()
        for row in experiment.rows(label + end, case, replace(adapted, decoding=decoding))
    ]


def _lora(experiment: Experiment[Any], rank: Rank | None, case: Case, label: str) -> list[Row]:
    model, what = experiment.fresh(), () if rank is None else ("rank", str(rank))
    lora = at_rank(experiment.config.lora, rank)
    callback = experiment.adapter(lora, case, *what, batch_norm=experiment.batch_norm)
    stage = experiment.config.train.lora
    callbacks = [callback, *_bars(experiment, label)]
    seconds = _fit(experiment, model, case, stage, callbacks, label)
    if experiment.first and experiment.shows(case, rank):
        for path, factors in named_factors(model, callback.name).items():
            values = spectrum(*factors.low_rank(), factors.spec.scaling)
            experiment.run.spectra[path] = values.tolist()
    return experiment.rows(label, case, _merged(model, seconds, callback))


def _full(experiment: Experiment[Any], case: Case, label: str) -> list[Row]:
    model, stage = experiment.fresh(), experiment.config.train.full
    callbacks = [*experiment.full_callbacks(), *_bars(experiment, label)]
    seconds = _fit(experiment, model, case, stage, callbacks, label)
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(t.nbytes for t in model.state_dict().values())
    return experiment.rows(label, case, Adapted(model, seconds, parameters, size))


def _fit(
    experiment: Experiment[Any],
    model: nn.Module,
    case: Case,
    stage: Any,
    callbacks: Sequence[Any],
    label: str,
) -> float:
    task, data = experiment.task(model, stage), experiment.fit_data(case, stage)
    length = experiment.length(case, stage)
    return experiment.train(task, data, callbacks, (label, case.name), **length)


def _bars(experiment: Experiment[Any], label: str) -> list[Any]:
    return [experiment.bar(label)] if experiment.counts_batches else []


def _line(experiment: Experiment[Any], case: Case) -> tuple[list[Says], Callable[[], None]]:
    """What a target's training says in the stage's line, and the one line that is left of it."""
    stage, said = experiment.stages.current, [""]
    if experiment.counts_batches or stage is None:  # its own bar says it
        return [], lambda: None

    def say(text: str) -> None:
        said[0] = f"{case.name}: {text}"
        stage.say(said[0])

    def end() -> None:
        stage.say("")
        if said[0]:
            experiment.stages.line(f"  {said[0]}")

    return [Says(say)], end


def _merged(model: nn.Module, seconds: float, callback: LoRACallback) -> Adapted:
    """The adapted model merged, as in deployment; with no adapter where the source was kept."""
    assert callback.report_ is not None
    merge(model)
    if callback.adapter_path_ is None:
        return Adapted(model, seconds)
    size = callback.adapter_path_.stat().st_size
    return Adapted(model, seconds, callback.report_.trainable_parameters, size)
