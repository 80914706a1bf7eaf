"""The methods that a classification run compares, each a function from `Context` to rows.

A further method is one more function and one more entry in `METHODS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lora_lightning.adaptation import closed_form
from lora_lightning.adaptation.closed_form import lame, recentred
from lora_lightning.adaptation.rounds import Round
from lora_lightning.adaptation.transductive_task import TransductiveTask
from lora_lightning.errors import ConfigError
from lora_lightning.linalg.decompose import spectrum
from lora_lightning.model.batch_norm import BatchNormKeeper
from lora_lightning.model.introspection import classifier_modules
from lora_lightning.model.state import named_factors
from lora_lightning.model.switching import merge
from lora_lightning.model.targets import without_head
from lora_lightning.report.results import Prediction, Row
from lora_lightning.runner.progress import Ticks
from lora_lightning.runner.sweep import Rank, at_rank
from lora_lightning.runner.trainer import make_trainer
from lora_lightning.training.lora_callback import LoRACallback
from lora_lightning.vision.classifier import Classifier
from lora_lightning.vision.experiment import Context
from lora_lightning.vision.settings import LabelFreeSettings

# The methods of a classification run that look at the target's pictures, not at their labels.


NAME = "LoRA, no labels"


def label_free(context: Context) -> list[Row]:
    """Low-rank factors, trained on the target's pictures with the labels that it gives itself."""
    settings, model = context.config.train.label_free, context.fresh()
    pictures = context.data.on(train=context.data.target)
    task = _task(model, settings, pictures.unlabelled(), pictures.unlabelled(True, settings.jitter))
    rows = fitted(context, model, task, settings.epochs)
    course = task.rounds_
    assert course is not None
    say(context, course, course.source, course.probabilities_, course.changed_in_.tolist())
    return rows


def fitted(context: Context, model: nn.Module, task: LightningModule, epochs: int) -> list[Row]:
    """Fit a task that needs no labels by an adapter that leaves the head alone, and measure."""
    config = context.config
    callback = LoRACallback(
        without_head(config.lora, model),
        name=context.named("adapter_no_labels"),
        output_dir=Path(config.out),
    )
    tick = context.stages.stage(NAME, "batches")
    trainer = make_trainer(config, [callback, Ticks(tick)], max_epochs=epochs)
    start = time.perf_counter()
    trainer.fit(task)
    seconds = time.perf_counter() - start
    assert callback.report_ is not None
    assert callback.adapter_path_ is not None
    merge(model)
    return context.measure(
        NAME,
        model,
        seconds,
        callback.report_.trainable_parameters,
        callback.adapter_path_.stat().st_size,
    )


def check(settings: LabelFreeSettings) -> None:
    """Raise ConfigError for a value that cannot be."""
    check_training(settings.epochs, settings.jitter)
    _task(nn.Identity(), settings, torch.zeros(1, 1))


def check_training(epochs: int, jitter: float) -> None:
    """Raise ConfigError for what no task checks."""
    if epochs < 1:
        raise ConfigError(f"train.label_free.epochs must be at least 1, got {epochs}")
    if not 0 <= jitter <= 1:
        raise ConfigError(f"train.label_free.jitter must lie in [0, 1], got {jitter}")


def _task(
    model: nn.Module, settings: LabelFreeSettings, target: object, training: object = None
) -> TransductiveTask:
    return TransductiveTask(
        model,
        target,
        settings.objective,
        training=training,
        pseudo_label_weight=settings.pseudo_label_weight,
        diversity=settings.diversity,
        batch_norm=settings.batch_norm,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        schedule=settings.schedule,
    )


class Course(Protocol):
    """How an adaptation without labels went; see `lora_lightning.adaptation.rounds.Rounds`."""

    history_: list[Round]
    accepted_: int
    termination_condition_: str


def say(
    context: Context,
    course: Course,
    before: Tensor,
    after: Tensor,
    changed_in: Sequence[int | None],
) -> None:
    """What the target's own pictures were taken for, and how it ended.

    Args:
        context: Whose run is told.
        course: How it went.
        before: The source model's answers to the target's training pictures.
        after: Those of the state that was kept.
        changed_in: The round in which each changed, where that is known.
    """
    context.run.rounds[context.seed] = [vars(r) for r in course.history_]
    data, where = context.data, f" (seed {context.seed})" if not context.first else ""
    context.run.notes.append(
        f"{NAME}{where}: {course.termination_condition_}; the state of round {course.accepted_} of "
        f"{len(course.history_) - 1} is kept."
    )
    pictures = data.on(train=data.target).training_pictures()
    rows = zip(pictures, before, after, changed_in, strict=True)
    context.run.predictions += [
        Prediction(
            item.path.relative_to(data.root).as_posix(),
            item.domain,
            context.label(item),
            *context.said(old),
            *context.said(new),
            context.seed,
            "target",
            NAME,
            changed,
        )
        for item, old, new, changed in rows
    ]


# The methods of a classification run that train nothing: they read what the source model sees.


Aligned = Callable[[Tensor, Tensor, Tensor], Tensor]


def lame_row(context: Context) -> list[Row]:
    """The source model's answers, made to agree among neighbours."""
    source, target = context.seen("source"), context.seen("target")
    start = time.perf_counter()
    answers = [lame(p.features, p.probabilities) for p in (source.said, target.said)]
    seconds = source.seconds + target.seconds + time.perf_counter() - start
    return context.score("LAME", torch.cat(answers), seconds)


def recentre_row(context: Context) -> list[Row]:
    """The source model with the target's features moved to the source's mean."""
    model = context.fresh()
    heads = sorted(classifier_modules(model))
    head = model.get_submodule(heads[0]) if len(heads) == 1 else None
    if not isinstance(head, nn.Linear):
        context.run.notes.append("The backbone has no linear head: no features to re-centre.")
        return []
    learnt, target = context.seen("learnt"), context.seen("target")
    moved = recentred(target.said.features, learnt.said.features.mean(dim=0), head)
    answers = torch.cat([context.seen("source").said.probabilities, moved])
    return context.score("feature re-centring", answers, learnt.seconds + target.seconds)


def aligned(name: str, align: Aligned) -> Callable[[Context], list[Row]]:
    """The method of this name: answers from what the source model sees.

    Args:
        name: Of the row.
        align: From source features (N, D), their labels, and features (M, D) of a domain to
            answers (M, outputs).
    """

    def row(context: Context) -> list[Row]:
        learnt = context.seen("learnt")
        answers, seconds = [], learnt.seconds
        for which in ("source", "target"):
            seen = context.seen(which)
            start = time.perf_counter()
            answers.append(align(learnt.said.features, learnt.labels, seen.said.features))
            seconds += seen.seconds + time.perf_counter() - start
        return context.score(name, torch.cat(answers), seconds)

    row.__doc__ = f"{name}: source features and target features aligned in closed form."
    return row


# Closed forms on features, each with the nearest class mean after it.
ALIGNED: dict[str, Callable[[Context], list[Row]]] = {
    "nearest_centroid": aligned("nearest centroid", closed_form.nearest_centroid),
    "subspace": aligned("subspace alignment", closed_form.subspace_alignment),
    "nmf_subspace": aligned("NMF subspace", closed_form.nmf_subspace),
    "coral": aligned("CORAL", closed_form.coral),
}


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
