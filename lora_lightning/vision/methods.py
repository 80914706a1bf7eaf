"""The methods of a classification run, one function for each row of the table."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_lightning.adaptation import closed_form
from lora_lightning.adaptation.class_centroids import trusted_centroids
from lora_lightning.adaptation.closed_form import recentred
from lora_lightning.adaptation.label_propagation import lame
from lora_lightning.adaptation.target import Predicted, Target, predicted
from lora_lightning.adaptation.transductive_rounds import SOURCE_ITEMS
from lora_lightning.model.batch_norm import BatchNormKeeper, reestimated
from lora_lightning.model.introspection import classifier_modules
from lora_lightning.registry import Registry
from lora_lightning.report.results import Row
from lora_lightning.runner import methods as common
from lora_lightning.runner.cases import Adapted
from lora_lightning.runner.experiment import Method
from lora_lightning.runner.trainer import make_trainer
from lora_lightning.vision.classifier import Classifier
from lora_lightning.vision.experiment import Pictures, Seen

# In the order of the table.
METHODS: Registry[Method] = Registry("method")


def seen(experiment: Pictures, which: str) -> Seen:
    """The source model on a set of images, computed once for each seed.

    The sets: the source's training images ("learnt"), held-out ones of the "source", or of all
    targets ("target").
    """
    if which not in experiment.looks:
        data = experiment.data.on(train=[experiment.data.source])
        pictures, items = data.unlabelled(), data.training_pictures()
        if which != "learnt":
            data = data.on(test=[data.source] if which == "source" else data.target)
            pictures, items = data.predict_dataloader().dataset, data.held_out()
        start = time.perf_counter()
        model = experiment.fresh()
        loader = Target(pictures).loader(2 * data.batch_size, shuffle=False)
        said = predicted(model, model, loader, next(model.parameters()).device)
        seconds = time.perf_counter() - start
        experiment.looks[which] = Seen(said, experiment.labels(items), seconds)
    return experiment.looks[which]


@METHODS.register("source_only")
def source_only(experiment: Pictures) -> list[Row]:
    """The source model without adaptation; what it says is used by other methods, too."""
    answers = [seen(experiment, which).said.probabilities for which in ("source", "target")]
    return experiment.score("source only", torch.cat(answers), 0.0)


# From source features (N, D), their labels and features (M, D) of a domain to predictions (M, K).
Aligned = Callable[[Tensor, Tensor, Tensor], Tensor]


@METHODS.register("recentre")
def recentre(experiment: Pictures) -> list[Row]:
    """The source model with the target's features shifted to the source's mean."""
    model = experiment.fresh()
    heads = sorted(classifier_modules(model))
    head = model.get_submodule(heads[0]) if len(heads) == 1 else None
    if not isinstance(head, nn.Linear):
        experiment.run.notes.append("The backbone has no linear head: no features to re-centre.")
        return []
    learnt, target = seen(experiment, "learnt"), seen(experiment, "target")
    moved = recentred(target.said.features, learnt.said.features.mean(dim=0), head)
    answers = torch.cat([seen(experiment, "source").said.probabilities, moved])
    return experiment.score("feature re-centring", answers, learnt.seconds + target.seconds)


@METHODS.register("lame")
def lame_row(experiment: Pictures) -> list[Row]:
    """LAME: the source model's predictions, smoothed over neighbours."""
    source, target = seen(experiment, "source"), seen(experiment, "target")
    start = time.perf_counter()
    answers = [lame(p.features, p.probabilities) for p in (source.said, target.said)]
    seconds = source.seconds + target.seconds + time.perf_counter() - start
    return experiment.score("LAME", torch.cat(answers), seconds)


@METHODS.register("soft_centroids")
def soft_centroids_row(experiment: Pictures) -> list[Row]:
    """The source model's predictions and the target's class centroids, where they are trusted."""
    answers, seconds, told = [], 0.0, ""
    for which in ("source", "target"):
        now = seen(experiment, which)
        start = time.perf_counter()
        again = restated(experiment, which)
        found, told = trusted_centroids(now.said, again)
        answers.append(found)
        seconds += now.seconds + time.perf_counter() - start
    experiment.run.notes.append(f"Soft centroids, seed {experiment.seed}: by the {told}.")
    return experiment.score("soft centroids", torch.cat(answers), seconds)


def restated(experiment: Pictures, which: str) -> Predicted | None:
    """Held-out images of a set with BatchNorm's statistics of these; None without BatchNorm."""
    model, data = experiment.fresh(), experiment.data
    data = data.on(test=[data.source] if which == "source" else data.target)
    target = Target(data.predict_dataloader().dataset)
    device = next(model.parameters()).device
    mixed = target.loader(2 * data.batch_size, shuffle=True)
    if not reestimated(model, model, (x.to(device) for x, _ in mixed), SOURCE_ITEMS):
        return None
    return predicted(model, model, target.loader(2 * data.batch_size, shuffle=False), device)


def aligned(name: str, align: Aligned) -> Method:
    """A method with this row's name: predictions from the source model's features."""

    def row(experiment: Pictures) -> list[Row]:
        learnt = seen(experiment, "learnt")
        answers, seconds = [], learnt.seconds
        for which in ("source", "target"):
            now = seen(experiment, which)
            start = time.perf_counter()
            answers.append(align(learnt.said.features, learnt.labels, now.said.features))
            seconds += now.seconds + time.perf_counter() - start
        return experiment.score(name, torch.cat(answers), seconds)

    row.__doc__ = f"{name}: source features and target features aligned in closed form."
    return row


# Closed forms on features, each with the nearest class mean after it.
METHODS.register("nearest_centroid")(aligned("nearest centroid", closed_form.nearest_centroid))
METHODS.register("subspace")(aligned("subspace alignment", closed_form.subspace_alignment))
METHODS.register("nmf_subspace")(aligned("NMF subspace", closed_form.nmf_subspace))
METHODS.register("coral")(aligned("CORAL", closed_form.coral))


@METHODS.register("batchnorm")
def batchnorm(experiment: Pictures) -> list[Row]:
    """BatchNorm's statistics estimated from the target's unlabelled training images.

    Li et al. 2017, "Revisiting batch normalization for practical domain adaptation" (AdaBN),
    arXiv:1603.04779.
    """
    model = experiment.fresh()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        experiment.run.notes.append("The backbone has no BatchNorm: no statistics to re-estimate.")
        return []
    start = time.perf_counter()
    module = _BatchNormStatistics(model)
    trainer = make_trainer(
        experiment.config, [experiment.bar("BatchNorm statistics of the target")]
    )
    [case] = experiment.cases("")
    loader = experiment.data.on(train=case.train).unlabelled_dataloader()
    trainer.predict(module, loader, return_predictions=False)
    seconds = time.perf_counter() - start
    size = sum(b.nbytes for norm in norms for b in norm.buffers())
    return experiment.rows("BatchNorm statistics", case, Adapted(model, seconds, 0, size))


class _BatchNormStatistics(Classifier):
    """Each forward adds a batch to the averages of the BatchNorm layers."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.keeper = BatchNormKeeper("reset")
        self.keeper.start(model)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Forward without labels; all but BatchNorm stays in eval mode."""
        self.keeper.apply(self.model)
        return super().predict_step(batch, batch_idx)


common.add(METHODS, "label_free", "lora", "full")
