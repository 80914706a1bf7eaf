"""The settings of runs over pictures; every field is a key of recipe.yaml."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lora_lightning.runner.settings import EpochTraining, RunConfig, TrainSettings, TrainStages


@dataclass
class RenderSettings:
    """Which pictures are rendered, where no folder of the user's own is given.

    Args:
        shift: What changes between the domains: lighting, viewpoint, environment or pose.
        source_train: Training pictures per class of the source.
        source_test: Held-out pictures per class of the source.
        target_train: Training pictures per class of each target domain.
        target_test: Held-out pictures per class of each target domain.
        cache: Folder for the rendered sets; null: ~/.cache/lora-lightning.
    """

    shift: str = "lighting"
    source_train: int = 60
    source_test: int = 8
    target_train: int = 10
    target_test: int = 8
    cache: str | None = None


@dataclass
class DataSettings:
    """Pictures in folders by domain, as `ImageDomains` takes them.

    Args:
        root: Folder that holds <domain>/<class>/*.png; null: rendered objects.
        source: Domain that the source model is trained on.
        target: Domains to adapt to, together; null: all others.
        classes: Classes to use; null: all.
        size: Side of the square that the network sees, in pixels.
        test_fraction: Part of each class that is held out, where folders have no splits.
        seed: Seed of rendering and of that split; the same pictures for every seed of `seeds`.
        batch_size: Pictures in a training batch.
        num_workers: Processes that load pictures; 0 loads in this one.
        cache_mb: Decoded pictures stay in memory if they take at most so many MiB.
        horizontal_flip: Mirror training pictures at random.
        render: Which pictures are rendered.
    """

    root: str | None = None
    source: str = "source"
    target: list[str] | None = None
    classes: list[str] | None = None
    size: int = 112
    test_fraction: float = 0.3
    seed: int = 0
    batch_size: int = 32
    num_workers: int = 0
    cache_mb: float = 1024
    horizontal_flip: bool = True
    render: RenderSettings = field(default_factory=RenderSettings)


@dataclass
class ModelSettings:
    """The backbone and where its weights come from.

    Args:
        name: A name that timm knows.
        imagenet: "package": the ImageNet weights that pip brings, for tf_efficientnet_lite0;
            "none": random weights.
        checkpoint: Local weights in place of `imagenet`: a state dict (.pth, .pt, .safetensors) or
            a training checkpoint of timm or Lightning. With train.source.epochs=0 it is the source.
        prefix: Of the network's names in the checkpoint, such as "model."; null: found.
        pretrained: Fetch timm's own weights from a hub, in place of `imagenet`.
    """

    name: str = "tf_efficientnet_lite0"
    imagenet: str = "package"
    checkpoint: str | None = None
    prefix: str | None = None
    pretrained: bool = False


@dataclass
class PictureTraining(EpochTraining):
    """Training on pictures without labels.

    Args:
        epochs: Passes over the target's pictures; after each the guard looks.
        batch_norm: BatchNorm statistics before training: auto, source or target.
        batch_size: Pictures in a batch.
        jitter: Part by which brightness, contrast and saturation change at random in training,
            while the answers to learn are to the pictures as they are; 0: not.
    """

    learning_rate: float = 2e-3
    least_steps: int = 12
    batch_norm: str = "auto"
    batch_size: int = 32
    jitter: float = 0.4

    def passes_over(self, items: int) -> int:
        """The epochs over so many pictures, or more for the least number of steps."""
        return self.passes(math.ceil(items / self.batch_size))


@dataclass
class LabelFreeSettings(PictureTraining):
    """Training without labels, as `lora_lightning.TransductiveTask` takes it.

    Args:
        objective: information-maximisation, minimum-class-confusion or entropy.
        pseudo_label_weight: Of the pseudo-labels by class centroid in the loss.
        diversity: How hard the predictions are spread over the classes; 0 for a target that
            lacks classes.
        target_modules: What is adapted, in place of `lora.target_modules`; None: the same.
    """

    objective: str = "information-maximisation"
    pseudo_label_weight: float = 0.3
    diversity: float = 1.0
    target_modules: Any = "auto"

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for a `TransductiveTask`."""
        own = ("objective", "pseudo_label_weight", "diversity", "batch_norm", "batch_size")
        return super().arguments() | {name: getattr(self, name) for name in own}


@dataclass
class ClassifierStages(TrainStages):
    """The trainings of a run.

    Args:
        source: Of the source model, on the source domain; 80 steps at least.
        label_free: Of the adapter, on the target domains without labels.
    """

    source: TrainSettings = field(default_factory=lambda: TrainSettings(least_steps=80))
    label_free: LabelFreeSettings = field(default_factory=LabelFreeSettings)


@dataclass
class Config(RunConfig):
    """A classification run.

    Args:
        methods: What is compared, keys of `lora_lightning.vision.methods.METHODS`.
        batch_norm: BatchNorm statistics under the adapter: frozen, adapt or reset.
        data: The pictures.
        model: The backbone.
        train: The trainings.
    """

    kind: str = "classification"
    name: str = "classification"
    title: str = "Domain adaptation of an image classifier"
    out: str = "runs/classification"
    methods: list[str] = field(
        default_factory=lambda: [
            "source_only", "recentre", "lame", "soft_centroids", "nearest_centroid", "subspace",
            "nmf_subspace", "coral", "batchnorm", "label_free", "lora", "full",
        ]
    )  # fmt: skip
    batch_norm: str = "frozen"
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: ClassifierStages = field(default_factory=ClassifierStages)


@dataclass
class MirrorTraining(PictureTraining):
    """Training without labels, as `TransductivePose` takes it.

    Args:
        tolerance: A picture is learnt from where the answers to it and to its mirror image lie
            within so many degrees.
        preference: Least part of those answers' mean squared difference that is common to all
            pictures, for training to begin: it unlearns a preference for a side; 0: always.
    """

    tolerance: float = 60.0
    preference: float = 0.25


@dataclass
class PoseStages:
    """The trainings of a run.

    Args:
        source: Of the source model, on the source domain.
        lora: Of the adapter, on the target domains with their labels.
        full: Of all weights, on the target domains with their labels.
        label_free: Of the adapter, on the target domains without labels.
    """

    source: EpochTraining = field(default_factory=EpochTraining)
    lora: EpochTraining = field(default_factory=EpochTraining)
    full: EpochTraining = field(default_factory=EpochTraining)
    label_free: MirrorTraining = field(default_factory=MirrorTraining)


@dataclass
class PoseConfig(Config):
    """A whole run: a `Config` with trainings of its own.

    Args:
        methods: What is compared, keys of `lora_lightning.vision.pose_recipe.METHODS`.
        train: The trainings.
    """

    kind: str = "pose"
    name: str = "pose"
    title: str = "Domain adaptation of a pose regressor"
    out: str = "runs/pose"
    methods: list[str] = field(
        default_factory=lambda: ["source_only", "batchnorm", "label_free", "lora", "full"]
    )
    data: DataSettings = field(
        default_factory=lambda: DataSettings(render=RenderSettings(shift="pose"))
    )
    train: PoseStages = field(default_factory=PoseStages)  # type: ignore[assignment]
