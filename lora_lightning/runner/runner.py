"""`run`: check the settings, then run every method for every seed."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_lightning.report.results import Run
from lora_lightning.report.versions import hardware, versions
from lora_lightning.report.write import write_report
from lora_lightning.runner.checks import check_plan
from lora_lightning.runner.experiment import Experiment
from lora_lightning.runner.jobs import SERIAL, Jobs
from lora_lightning.runner.parts import parts_of, run_parts, show
from lora_lightning.runner.progress import Stages, interruptible, quiet_lightning
from lora_lightning.runner.settings import RunConfig
from lora_lightning.runner.sweep import at_rank, method_of, rank_of
from lora_lightning.runner.trainer import make_trainer, threads
from lora_lightning.training.lora_callback import LoRACallback

QUICK = "Quick, with fewer items, steps and methods than the recipe: its figures are rougher"
# Seed → its source model, and the folder of its run; None: that of all seeds.
Sources = dict[int | None, tuple[Any, str]]


def run(
    kind: type[Experiment[Any]],
    given: DictConfig,
    command: str = "",
    titled: bool = True,
    *,
    sources: Sources | None = None,
    quick: bool = False,
    jobs: Jobs = SERIAL,
) -> Run:
    """Run every stage for every seed; the results are written to ``config.out``.

    Args:
        kind: Of the run.
        given: Its settings.
        command: That repeats it, for the report.
        titled: Whether the user gave the title; else data of their own have one of their own.
        sources: Source models of an earlier run, to which those that are made are added.
        quick: Whether the settings are the recipe's ``quick`` ones, which title and notes say.
        jobs: How many seeds at once, and where; where ranks are compared, those too.

    Raises:
        ConfigError: an invalid value, before anything is read or trained.
        DataError: the data cannot be used.
        TaskError: with several jobs, a seed failed; the others' results are written.
    """
    with quiet_lightning(), interruptible():
        config: Any = OmegaConf.to_object(given)
        check_plan(config.methods, config.seeds, kind.methods)
        with threads(getattr(config, "threads", None)), Stages() as stages:
            experiment = kind(config, _empty(kind, config, given), stages)
            experiment.run.command = command
            if not titled and (own := own_title(config)):
                experiment.run.title = own
            if quick:
                experiment.run.title += " (quick)"
                experiment.run.notes.append(f"{QUICK}: {', '.join(config.quick)}.")
            _check(experiment)
            out = Path(config.out)
            out.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(given, out / "config.yaml")
            sources = {} if sources is None else sources
            if jobs.serial or len(parts_of(config)) == 1:
                _run(experiment, sources)
            else:
                empty = copy.deepcopy(experiment.run)
                _run_apart(experiment, empty, sources, jobs)
            return experiment.run


def _check(experiment: Experiment[Any]) -> None:
    config = experiment.config
    experiment.check()
    # They check their settings: early, not after the source model's training.
    for name in config.methods:
        LoRACallback(at_rank(config.lora, rank_of(name)), batch_norm=experiment.batch_norm)
    make_trainer(config, max_epochs=1)  # with all devices


def _run(experiment: Experiment[Any], sources: Sources) -> None:
    config, stages = experiment.config, experiment.stages
    experiment.load()
    if not experiment.source_each_seed:
        _take_source(experiment, sources, None)
    for seed in config.seeds:
        if len(config.seeds) > 1:
            stages.settle()
            stages.line(f"seed {seed}", style="bold")
        experiment.begin(seed)
        _one_seed(experiment, sources)
        experiment.run.notes[:] = dict.fromkeys(experiment.run.notes)
        write_report(experiment.run, Path(config.out))


def _run_apart(experiment: Experiment[Any], empty: Run, sources: Sources, jobs: Jobs) -> None:
    """As `_run`, with parts as tasks; source models that several share are made here."""
    experiment.load()
    parts, shared = parts_of(experiment.config), list[int | None]()
    if not experiment.source_each_seed:
        shared = [None]
    elif len(parts) > len(experiment.config.seeds):
        shared = [*experiment.config.seeds]
    for seed in shared:
        experiment.begin(experiment.config.seeds[0] if seed is None else seed)
        _take_source(experiment, sources, seed)
    made = {seed: sources[seed][0] for seed in shared}
    try:
        run_parts(experiment, empty, made, jobs)
    finally:
        if experiment.run.rows:
            write_report(experiment.run, Path(experiment.config.out))


def _take_source(experiment: Experiment[Any], sources: Sources, seed: int | None) -> None:
    if seed in sources:
        experiment.run.notes.append(f"The source model is that of {sources[seed][1]}.")
    else:
        sources[seed] = experiment.source(), experiment.config.out
    experiment.source_model, _ = sources[seed]


def _one_seed(experiment: Experiment[Any], sources: Sources) -> None:
    if experiment.source_each_seed:
        _take_source(experiment, sources, experiment.seed)
    experiment.before_methods()
    for name in experiment.config.methods:
        experiment.run.rows += method_of(name, experiment.methods)(experiment)
    show(experiment)


def _empty(kind: type[Experiment[Any]], config: RunConfig, given: DictConfig) -> Run:
    plain: Any = OmegaConf.to_container(given)
    made_with = versions("torch", "lightning", *kind.packages)
    return Run(
        name=config.name,
        title=config.title,
        metric=kind.metric,
        rows=[],
        predictions=[],
        classes=[],
        spectra={},
        config=plain,
        data_root=Path(config.out),
        versions={**made_with, "hardware": hardware()},
        skipped=[],
        notes=[],
    )


def own_title(config: Any) -> str:
    """The title of a run on the user's own data, by its names; "" on the recipe's data."""
    data: Any = getattr(config, "data", None)
    names = (getattr(data, name, None) for name in ("root", "pairs", "target"))
    folder = next((str(name) for name in names if name and isinstance(name, str)), "")
    if not folder:
        return ""
    given = getattr(data, "target", None)
    targets = [] if given is None or isinstance(given, str) else [str(t) for t in given]
    source = getattr(data, "source", None) if getattr(data, "root", None) else None
    shown = ", ".join(targets[:3]) + ", …" * (len(targets) > 3)
    way = [f"from {source}"] * bool(source) + [f"to {shown}"] * bool(shown)
    return ": ".join([os.path.basename(os.path.realpath(folder)), *[" ".join(way)] * bool(way)])
