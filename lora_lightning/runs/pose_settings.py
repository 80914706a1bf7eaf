"""The typed configuration of a pose run; every field is a key of recipe.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_lightning.runs import settings


@dataclass
class AngleTraining:
    """One training, as `lora_lightning.tasks.pose.PoseRegressor` takes it.

    Args:
        epochs: Passes over the training pictures.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        schedule: Of the learning rate: one-cycle, cosine or constant.
    """

    epochs: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    schedule: str = "one-cycle"


@dataclass
class MirrorTraining:
    """Training without labels, as `lora_lightning.transduction.poses.TransductivePose` takes it.

    Args:
        epochs: Passes over the target's pictures; after each the guard looks.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        schedule: Of the learning rate: one-cycle, cosine or constant.
        tolerance: A picture is learnt from where the answers to it and to its mirror image lie
            within so many degrees.
        batch_norm: BatchNorm statistics before training: auto, source or target.
        batch_size: Pictures in a batch.
        jitter: Part by which brightness, contrast and saturation change at random in training; 0:
            not.
    """

    epochs: int = 4
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    schedule: str = "one-cycle"
    tolerance: float = 60.0
    batch_norm: str = "auto"
    batch_size: int = 32
    jitter: float = 0.4


@dataclass
class PoseStages:
    """The trainings of a run.

    Args:
        source: Of the source model, on the source domain.
        lora: Of the adapter, on the target domains with their labels.
        full: Of all weights, on the target domains with their labels.
        label_free: Of the adapter, on the target domains without labels.
    """

    source: AngleTraining = field(default_factory=AngleTraining)
    lora: AngleTraining = field(default_factory=AngleTraining)
    full: AngleTraining = field(default_factory=AngleTraining)
    label_free: MirrorTraining = field(default_factory=MirrorTraining)


@dataclass
class Config(settings.Config):
    """A whole run: a `lora_lightning.runs.settings.Config` with trainings of its own.

    Args:
        methods: What is compared, keys of `lora_lightning.runs.pose.METHODS`.
        train: The trainings.
    """

    kind: str = "pose"
    name: str = "pose"
    title: str = "Domain adaptation of a pose regressor"
    out: str = "runs/pose"
    methods: list[str] = field(
        default_factory=lambda: [
            "source_only",
            "ridge",
            "subspace",
            "nmf_subspace",
            "coral",
            "batchnorm",
            "label_free",
            "lora",
            "full",
        ]
    )
    data: settings.DataSettings = field(
        default_factory=lambda: settings.DataSettings(render=settings.RenderSettings(shift="pose"))
    )
    train: PoseStages = field(default_factory=PoseStages)  # type: ignore[assignment]
