"""The typed configuration of a speech run; every field is a key of recipe.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_lightning.runner.settings import Optimisation, RunConfig, Scheduled


@dataclass
class SpokenSettings:
    """What eSpeak says, where no recordings of the user's own are given.

    Args:
        source_voices: Voices that the source model is trained on.
        source_utterances: Sentences of each of them.
        target_voices: Unseen voices to adapt to; null: all of `synthetic.voices`.
        environment_voices: Source voices that speak in each acoustic environment.
        cache: Folder for the spoken sets; null: ~/.cache/lora-lightning.
    """

    source_voices: int = 84
    source_utterances: int = 60
    target_voices: list[str] | None = None
    environment_voices: int = 10
    cache: str | None = None


@dataclass
class SpeechDataSettings:
    """Recordings, as `lora_lightning.speech.data.manifests.load_utterances` reads them.

    Args:
        source: Manifest or folder that the source model is trained on; null: spoken.
        target: Manifest or folder with transcripts, to adapt to; null: spoken.
        environments: Acoustic environments to adapt to, each over all recordings of the target;
            empty: each speaker is a target.
        test: Held-out recordings of each target domain.
        seed: Of the sentences, the noise, and which recordings are held out; the same for every
            seed of `seeds`.
        lexicon: File of words, or of sentences, that are said, for the rows without labels; null:
            2,000 sentences of the spoken data's kind; none for a target of the user's own.
        numbers: Language, such as en, in which num2words spells out digits in transcripts; null:
            digits that the recogniser cannot write are an error.
        min_seconds: Shorter recordings are left out.
        max_seconds: Longer recordings are left out.
        batch_seconds: Sound in a batch of measuring or source training, padding included.
        spoken: What eSpeak says.
    """

    source: str | None = None
    target: str | None = None
    environments: list[str] = field(default_factory=list)
    test: int = 60
    seed: int = 0
    lexicon: str | None = None
    numbers: str | None = None
    min_seconds: float = 0.3
    max_seconds: float = 30.0
    batch_seconds: float = 80.0
    spoken: SpokenSettings = field(default_factory=SpokenSettings)


@dataclass
class RecogniserSettings:
    """The recogniser, a `lora_lightning.speech.tasks.recognisers.ConformerCTC`, and its weights.

    Args:
        checkpoint: "package": the weights that the package brings; a file that
            `save_recogniser` wrote; null: trained by this run.
        dim: Width of the encoder, where it is trained.
        num_layers: Blocks of the encoder.
        num_heads: Attention heads.
        ffn_dim: Hidden width of the feed-forward modules.
        kernel_size: Of the depthwise convolutions, in frames of 40 ms.
        dropout: In the encoder.
    """

    checkpoint: str | None = "package"
    dim: int = 128
    num_layers: int = 3
    num_heads: int = 4
    ffn_dim: int = 512
    kernel_size: int = 15
    dropout: float = 0.1


@dataclass
class SourceTraining(Optimisation):
    """Training of the source model, as `lora_lightning.speech.tasks.ctc.CTCRecognition` takes it.

    Args:
        epochs: Passes over the source.
    """

    learning_rate: float = 2e-3
    epochs: int = 10


@dataclass
class Adaptation(Optimisation):
    """Training on the enrolment of a target.

    Args:
        learning_rate: Peak learning rate of AdamW, one-cycle.
        steps: Optimizer steps, for each size of `enrolment`.
        batch: Recordings in a batch, at most.
        spec_augment: Mask bands and frames at random.
    """

    weight_decay: float = 0.0
    steps: list[int] = field(default_factory=lambda: [40, 60, 120])
    batch: int = 10
    spec_augment: bool = True


@dataclass
class LabelFreeAdaptation(Scheduled):
    """Training on recordings of a target without their transcripts, as
    `lora_lightning.speech.self_training.PseudoTranscriptCallback` does it.

    Args:
        steps: Optimizer steps, in all rounds together.
        keep: Part of the recordings that each round learns, in turn.
        batch: Recordings in a batch, at most.
        spec_augment: Mask bands and frames at random.
        batch_norm: BatchNorm statistics while it trains: frozen, adapt or reset.
        teacher_decay: Decay of a moving average of the factors, which then writes the labels;
            null: the model itself does.
        guard: Keep the source where the transcripts, as they will be decoded, say that adapting
            does harm.
    """

    learning_rate: float = 8e-3
    weight_decay: float = 0.0
    schedule: str = "cosine"
    steps: int = 200
    keep: list[float] = field(default_factory=lambda: [0.4, 0.5, 0.7, 0.8, 0.9])
    batch: int = 8
    spec_augment: bool = True
    batch_norm: str = "adapt"
    teacher_decay: float | None = None
    guard: bool = True


@dataclass
class AdaptationStages:
    """The trainings of a run.

    Args:
        source: Of the source model.
        lora: Of the adapter, on the enrolment with its transcripts.
        full: Of all weights, on the enrolment with its transcripts.
        label_free: Of the adapter, on recordings without transcripts.
    """

    source: SourceTraining = field(default_factory=SourceTraining)
    lora: Adaptation = field(default_factory=Adaptation)
    full: Adaptation = field(default_factory=Adaptation)
    label_free: LabelFreeAdaptation = field(default_factory=LabelFreeAdaptation)


@dataclass
class Config(RunConfig):
    """A speech run.

    Args:
        methods: What is compared, keys of `lora_lightning.speech.methods.METHODS`.
        enrolment: Labelled recordings of a target that a method is given; one row for each.
        unlabelled: Seconds of a target's speech that a method without labels is given; one row for
            each. A target that has less gives all of its enrolment.
        headline: The size of `enrolment` that the report shows where it shows one.
        threads: Threads of the CPU that torch uses; null: as many as it would.
        batch_norm: BatchNorm statistics while a target is learnt: frozen, adapt or reset.
        data: The recordings.
        model: The recogniser.
        train: The trainings.
    """

    kind: str = "speech"
    name: str = "speech"
    title: str = "Domain adaptation of a speech recogniser"
    out: str = "runs/speech"
    methods: list[str] = field(
        default_factory=lambda: ["source_only", "lexicon", "label_free", "lora", "full"]
    )
    enrolment: list[int] = field(default_factory=lambda: [5, 20, 100])
    unlabelled: list[int] = field(default_factory=lambda: [90, 150])
    headline: int = 20
    threads: int | None = None
    batch_norm: str = "frozen"
    data: SpeechDataSettings = field(default_factory=SpeechDataSettings)
    model: RecogniserSettings = field(default_factory=RecogniserSettings)
    train: AdaptationStages = field(default_factory=AdaptationStages)
