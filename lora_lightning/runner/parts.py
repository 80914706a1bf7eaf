"""A run whose seeds, or ranks, are tasks of `run_tasks`; its files are those of `run` in turn.

Each task writes what it adds to the run into ``out/parts``, from where it is taken, in the order of
the list, when all have ended: a run that was killed is finished by the same command.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_lightning.errors import TaskError
from lora_lightning.report.files import atomic_write
from lora_lightning.report.results import Prediction, Row, Run, Transcript
from lora_lightning.report.sentences import sentence
from lora_lightning.runner.each_target import counted
from lora_lightning.runner.experiment import Experiment
from lora_lightning.runner.jobs import Jobs
from lora_lightning.runner.progress import Stages, interruptible, quiet_lightning
from lora_lightning.runner.sweep import method_of, rank_of
from lora_lightning.runner.tasks import run_tasks
from lora_lightning.runner.trainer import threads

_LISTS = {"rows": Row, "predictions": Prediction, "transcripts": Transcript, "notes": None}
_DICTS = ("spectra", "rounds", "shifts", "scores", "losses")
# A seed, the methods of the task, and its number among the seed's.
Part = tuple[int, Sequence[str], int]


def parts_of(config: Any) -> list[Part]:
    """The tasks of a run: its seeds; where methods are compared at several ranks, those too."""
    ranks = sum(rank_of(name) is not None for name in config.methods) > 1
    groups = [[name] for name in config.methods] if ranks else [config.methods]
    return [(seed, names, n) for seed in config.seeds for n, names in enumerate(groups)]


def run_parts(
    experiment: Experiment[Any], empty: Run, sources: Mapping[int | None, Any], jobs: Jobs
) -> None:
    """Run every part, and add what they found to the experiment's run, in order.

    Args:
        experiment: With its data; of a run with several parts.
        empty: The run as it was before the data were read.
        sources: Seed → source model; None: that of all seeds. One that is missing is made by the
            task.
        jobs: How many at once, and where.

    Raises:
        TaskError: a part failed; the others are added, and kept for the next run.
    """
    config, failed = experiment.config, list[str]()
    folder = Path(config.out, "parts")
    key = json.dumps(empty.config, sort_keys=True)
    parts = parts_of(config)
    paths = [folder / f"seed{seed}-{number}.pt" for seed, _, number in parts]
    due = [i for i, path in enumerate(paths) if _read(path, key) is None]
    items = ((parts[i], paths[i], key) for i in due)
    common = type(experiment), config, empty, sources
    for done in counted(run_tasks(_part, items, common, jobs), experiment.stages, len(due)):
        if done.error is not None:
            seed, names, _ = parts[due[done.index]]
            reason = sentence(done.error) or repr(done.error)
            failed.append(f"seed {seed}, {', '.join(names)}: {reason}")
    for seed in config.seeds:
        experiment.begin(seed)
        for part, path in zip(parts, paths, strict=True):
            if part[0] == seed and (found := _read(path, key)) is not None:
                _add(experiment, found)
        show(experiment)
    if failed:
        raise TaskError(
            f"{len(failed)} of {len(parts)} parts failed ({'; '.join(failed)}); the same command "
            f"runs them again, and {folder} holds the others"
        )
    shutil.rmtree(folder, ignore_errors=True)


def show(experiment: Experiment[Any]) -> None:
    """Let the run show examples of the seed's predictions, before and after."""
    answers = experiment.answers
    shown = [label for label in experiment.shown() if label in answers]
    if shown and "source only" in answers:
        experiment.show(answers["source only"], answers[shown[-1]])


def _part(common: Any, item: tuple[Part, Path, str]) -> None:
    """A task: writes what it adds to an empty run."""
    kind, config, empty, sources = common
    (seed, names, number), path, key = item
    with (
        quiet_lightning(), interruptible(), threads(getattr(config, "threads", None)),
        Stages() as stages,
    ):  # fmt: skip
        experiment = kind(config, copy.deepcopy(empty), stages)
        experiment.check()
        experiment.load()
        run, before = experiment.run, copy.deepcopy(vars(experiment.run))
        experiment.begin(seed)
        given = sources.get(seed, sources.get(None))
        experiment.source_model = experiment.source() if given is None else given
        if number == 0:
            experiment.before_methods()
        for name in names:
            run.rows += method_of(name, experiment.methods)(experiment)
        kept = {"source only", *experiment.shown()}
        answers = {name: told for name, told in experiment.answers.items() if name in kept}
        _write(path, {"key": key, "answers": answers, **_added(before, run)})


def _added(before: Mapping[str, Any], run: Run) -> dict[str, Any]:
    now = vars(run)
    lists = {name: now[name][len(before[name]) :] for name in _LISTS}
    return lists | {name: {k: v for k, v in now[name].items() if k not in before[name]}
                    for name in _DICTS}  # fmt: skip


def _add(experiment: Experiment[Any], found: Mapping[str, Any]) -> None:
    run = experiment.run
    experiment.answers |= found["answers"]
    for name, kind in _LISTS.items():
        getattr(run, name).extend(x if kind is None else kind(**x) for x in found[name])
    run.notes[:] = dict.fromkeys(run.notes)
    for name in _DICTS:
        getattr(run, name).update(found[name])


def _write(path: Path, found: Any) -> None:
    content = io.BytesIO()
    torch.save(_plain(found), content)
    atomic_write(path, content.getvalue())


def _read(path: Path, key: str) -> dict[str, Any] | None:
    """What a part of these settings found, if it has ended; runs no code that the file holds."""
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return found if found["key"] == key else None
    except Exception:  # there is none, or whatever a damaged file makes of it
        return None


def _plain(value: Any) -> Any:
    """With containers, numbers, texts and tensors alone, which are read without running code."""
    if isinstance(value, Row | Prediction | Transcript):
        return _plain(asdict(value))
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value
