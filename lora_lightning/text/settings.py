"""The typed configuration of a translation run; every field is a key of recipe.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_lightning.runner.settings import RunConfig, Scheduled, TrainStages


@dataclass
class RegisterSettings:
    """How many sentences the grammar makes, where no pairs of the user's own are given.

    Args:
        source_train: Training pairs of the everyday register.
        target_train: Training pairs of each target domain, to draw from.
    """

    source_train: int = 6000
    target_train: int = 400


@dataclass
class PairSettings:
    """Parallel text, as `lora_lightning.text.parallel.read_pairs` reads it.

    Args:
        pairs: Table with the columns source, target and domain; null: by the grammar.
        source: Domain that the source model is trained on.
        target: Domains to adapt to, each with an adapter of its own; null: all others.
        test: Held-out pairs of each domain.
        seed: Of the grammar's sentences, the source model and what is held out; the same for
            every seed of `seeds`.
        batch_size: Pairs in a batch of source training or measuring.
        target_batch_size: Pairs in a batch of the trainings on a target.
        registers: How many sentences the grammar makes.
    """

    pairs: str | None = None
    source: str = "everyday"
    target: list[str] | None = None
    test: int = 100
    seed: int = 0
    batch_size: int = 64
    target_batch_size: int = 10
    registers: RegisterSettings = field(default_factory=RegisterSettings)


@dataclass
class TranslatorSettings:
    """The translator, a `lora_lightning.text.translators.Translator`.

    Args:
        checkpoint: File that `save_translator` wrote; null: trained by this run.
        merges: Of the byte-pair encoding, learnt on the source domain.
        dim: Width.
        num_layers: Of the encoder, and of the decoder.
        num_heads: Attention heads.
        ffn_dim: Hidden width of the feed-forward modules.
        dropout: In both.
    """

    checkpoint: str | None = None
    merges: int = 500
    dim: int = 96
    num_layers: int = 2
    num_heads: int = 4
    ffn_dim: int = 256
    dropout: float = 0.1


@dataclass
class MemorySettings:
    """The baseline, as `lora_lightning.text.translation_memory.TranslationMemory` takes it.

    Args:
        neighbours: Known pieces that are asked.
        weight: Of their answer, against the model's.
        temperature: The higher, the more the farther ones count.
    """

    neighbours: int = 4
    weight: float = 0.5
    temperature: float = 1.0


@dataclass
class SelfTraining(Scheduled):
    """Training without translations, as
    `lora_lightning.text.self_training.PseudoTranslationCallback` does it.

    Args:
        steps: Optimizer steps, in all rounds together.
        keep: Part of the sentences that each round learns, in turn.
        dropped: Probability of leaving out a word of a sentence to learn.
        confidence: Least mean probability of a piece of the source model's own translations for
            anything to be trained; 1: nothing is, 0: always.
        label_smoothing: Part of the target spread over all pieces.
    """

    weight_decay: float = 0.0
    schedule: str = "cosine"
    steps: int = 60
    keep: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.5])
    dropped: float = 0.1
    confidence: float = 1.0
    label_smoothing: float = 0.0


@dataclass
class TranslationStages(TrainStages):
    """The trainings of a run.

    Args:
        label_free: Of the adapter, on the target's sentences without translations.
    """

    label_free: SelfTraining = field(default_factory=SelfTraining)


@dataclass
class Config(RunConfig):
    """A translation run.

    Args:
        methods: What is compared, keys of `lora_lightning.text.methods.METHODS`.
        labelled: Pairs of a target that a method with labels is given.
        unlabelled: Sentences of a target that a method without labels is given; fewer where it has
            fewer.
        threads: Threads of the CPU that torch uses; null: as many as it would.
        data: The pairs.
        model: The translator.
        memory: The baseline that trains nothing.
        train: The trainings.
    """

    kind: str = "translation"
    name: str = "translation"
    title: str = "Domain adaptation of a translator"
    out: str = "runs/translation"
    methods: list[str] = field(
        default_factory=lambda: ["source_only", "memory", "label_free", "lora", "full"]
    )
    labelled: int = 100
    unlabelled: int = 200
    threads: int | None = None
    data: PairSettings = field(default_factory=PairSettings)
    model: TranslatorSettings = field(default_factory=TranslatorSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    train: TranslationStages = field(default_factory=TranslationStages)
