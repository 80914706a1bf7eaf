"""`Recognition`: the experiment of speech recipes, by speaker or acoustic environment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, seed_everything
from torch import nn
from torchmetrics.functional.text import char_error_rate, word_error_rate

from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_number
from lora_lightning.report.results import Transcript
from lora_lightning.report.word_errors import errors
from lora_lightning.runner.cases import LABELS, NO_LABELS, Adapted, Case, Unlabelled
from lora_lightning.runner.checks import at_least, step_a_round
from lora_lightning.runner.experiment import Experiment
from lora_lightning.runner.file_names import file_names
from lora_lightning.runner.trainer import in_rounds, make_trainer
from lora_lightning.speech.data.audio import read_audio
from lora_lightning.speech.data.speech_data import SpeechData
from lora_lightning.speech.data.utterances import Utterance
from lora_lightning.speech.domains import Domain, notices, recordings
from lora_lightning.speech.methods import METHODS, FrozenBatchNorm
from lora_lightning.speech.self_training import PseudoTranscriptCallback
from lora_lightning.speech.settings import Config
from lora_lightning.speech.tasks.ctc import CTCRecognition, spec_augment
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.lexicon import Lexicon, spoken_lexicon
from lora_lightning.speech.tasks.recognisers import ConformerCTC, load_recogniser, save_recogniser
from lora_lightning.speech.transcript_guard import SpeechLimits
from lora_lightning.training.lora_callback import LoRACallback


class Recognition(Experiment[Config]):
    """One case for each target and size of its enrolment; predictions are domain → texts."""

    metric = "WER"
    methods = METHODS
    packages = ("torchaudio",)
    gradient_clip = 5.0

    def check(self) -> None:
        """Raise ConfigError for an invalid value."""
        config, sizes, settings = self.config, self.config.enrolment, self.config.train.label_free
        if not sizes or min(sizes) < 1 or sorted(set(sizes)) != sizes:
            raise ConfigError(f"enrolment must be sizes in rising order, at least 1; got {sizes}")
        if config.headline not in sizes:
            raise ConfigError(f"headline must be one of enrolment={sizes}, got {config.headline}")
        for name in ("lora", "full"):
            steps = getattr(config.train, name).steps
            if len(steps) != len(sizes) or min(steps) < 1:
                raise ConfigError(
                    f"train.{name}.steps must hold a number of steps for each size of "
                    f"enrolment={sizes}, got {steps}"
                )
        at_least(config, 1, ["data.test"])
        step_a_round(settings.steps, settings.keep)
        check_number("unlabelled", min(config.unlabelled, default=0), "(0, inf)", "seconds")
        # The callback checks its settings: early, not after the source model's training.
        PseudoTranscriptCallback([Utterance(Path("none"))], keep=settings.keep)
        if (decay := settings.teacher_decay) is not None:
            check_number("train.label_free.teacher_decay", decay, "[0, 1)")
        LoRACallback(config.lora, batch_norm=settings.batch_norm)
        if config.data.lexicon is not None:
            self.lexicon()

    # ---- data and source model ---------------------------------------------------------------

    def load(self) -> None:
        """Find, or synthesise, the recordings."""
        config, run, path = self.config, self.run, self.config.model.checkpoint
        self._given = None if path is None else load_recogniser(path)
        rate = 16000 if self._given is None else self._given.sample_rate
        self.recordings = heard = recordings(config, rate, self._given is None, self.stages)
        what = "environment" if config.data.environments else "speaker"
        run.data_root = Path(config.data.target or config.out)
        run.skipped, run.read_audio = heard.skipped, read_audio
        run.notes += [
            f"One adapter for each {what} and size of enrolment; {config.data.test} held-out "
            f"recordings of each of {len(heard.domains)} {what}s, which no training hears.",
            "Every method starts from the same source model, with the same enrolment.",
        ]
        for notice in notices(heard, getattr(self._given, "labels", Labels.english()), config):
            self.stages.console.print(notice, style="yellow")
            run.notes.append(notice)

    def source(self) -> ConformerCTC:
        """The user's own, the package's, or trained on the source's recordings."""
        model = self._trained() if self._given is None else self._given
        # An adapter can be used only with the model that it was trained on.
        save_recogniser(model, Path(self.config.out, "source.safetensors"))
        return model

    def _trained(self) -> ConformerCTC:
        data = self.config.data
        seed_everything(data.seed, verbose=False)
        sizes = {k: v for k, v in vars(self.config.model).items() if k != "checkpoint"}
        model = ConformerCTC(**sizes)
        heard = self.recordings.source
        source = SpeechData(train=heard, batch_seconds=data.batch_seconds, seed=data.seed)
        self.train_source(model, source)
        # Rounded as in the file, so that the saved model is the one that is evaluated.
        return model.half().float()

    def lexicon(self) -> Lexicon | None:
        """The words that may occur, where they are known."""
        data = self.config.data
        if data.lexicon is not None:
            return Lexicon.read(data.lexicon)
        return None if data.target else spoken_lexicon()

    # ---- cases -------------------------------------------------------------------------------

    def cases(self, what: str) -> Iterator[Case]:
        """Each target, for each size of the enrolment or each number of seconds."""
        sizes: Sequence[int | None] = {
            LABELS: self.config.enrolment,
            NO_LABELS: self.config.unlabelled,
        }.get(what, [None])
        form = {LABELS: "{} target labels", NO_LABELS: "no labels, {} s"}.get(what, "")
        unit = "s" if what == NO_LABELS else ""
        domains = self.recordings.domains
        stems = file_names(domain.name for domain in domains)
        for size in sizes:
            for domain in domains:
                name = f"{stems[domain.name]}-{size}{unit}"
                yield Case(name, domain, [domain], form.format(size), size)

    def task(self, model: ConformerCTC, stage: Any) -> CTCRecognition:
        """Training with CTC, with SpecAugment unless the stage switches it off."""
        model.augment = spec_augment() if getattr(stage, "spec_augment", True) else None
        return CTCRecognition(model.train(), **stage.arguments())

    def fit_data(self, case: Case, stage: Any) -> SpeechData:
        """The domain's enrolment of this size."""
        return SpeechData(
            train=case.train.enrolment(case.size, self.seed),
            sample_rate=self.source_model.sample_rate,
            max_batch=stage.batch,
            transform=case.train.transform,
            seed=self.seed,
        )

    def length(self, case: Case, stage: Any) -> dict[str, int]:
        """The steps of this size of enrolment."""
        steps = stage.steps[self.config.enrolment.index(case.size)]  # type: ignore[arg-type]
        return {"max_epochs": -1, "max_steps": steps}

    def full_callbacks(self) -> list[Callback]:
        """BatchNorm as under the adapter."""
        return [FrozenBatchNorm()] if self.batch_norm == "frozen" else []

    def shows(self, case: Case, rank: int | str | None) -> bool:
        """The first of the headline's size."""
        return case.size == self.config.headline and not self.run.spectra

    def unlabelled(self, model: ConformerCTC, case: Case) -> Unlabelled:
        """Self-training on pseudo-transcripts; also decoded with a lexicon."""
        settings, domain, lexicon = self.config.train.label_free, case.train, self.lexicon()
        heard = domain.unlabelled(case.size, self.seed)
        pseudo = PseudoTranscriptCallback(
            heard,
            lexicon,
            keep=settings.keep,
            teacher_decay=settings.teacher_decay,
            sample_rate=model.sample_rate,
            max_batch=settings.batch,
            transform=domain.transform,
            seed=self.seed,
            limits=SpeechLimits() if settings.guard else None,
        )
        pseudo.setting = "train.label_free.guard=false"
        return Unlabelled(
            self.task(model, settings),
            lambda: self._tell(case, heard, pseudo),
            pseudo.data,
            [pseudo],
            in_rounds(settings.steps),
            settings.batch_norm,
            {"": {}} if lexicon is None else {"": {}, ", lexicon": {"lexicon": lexicon}},
        )

    def measure(self, label: str, case: Case, adapted: Adapted) -> list[tuple[str, str, float]]:
        """WER and CER on the domain's held-out recordings, decoded with a lexicon if given."""
        [domain] = case.tested
        return self.score(label, domain, self.understood(adapted.model, domain, **adapted.decoding))

    def score(self, label: str, domain: Domain, found: list[str]) -> list[tuple[str, str, float]]:
        """WER and CER of the transcripts of the domain's held-out recordings."""
        self.answers.setdefault(label, {})[domain.name] = found
        said = [self.source_model.labels.normalise(u.text or "") for u in domain.held_out]
        counts = [(errors(a, b), len(a.split())) for a, b in zip(said, found, strict=True)]
        self.count(label, domain.name, counts)
        rates = {"WER": word_error_rate(found, said), "CER": char_error_rate(found, said)}
        return [(domain.name, metric, float(rate)) for metric, rate in rates.items()]

    def understood(
        self, model: nn.Module, domain: Domain, lexicon: Lexicon | None = None
    ) -> list[str]:
        """The model's transcript of each held-out recording."""
        data = SpeechData(
            test=domain.held_out,
            sample_rate=self.source_model.sample_rate,
            batch_seconds=self.config.data.batch_seconds,
            transform=domain.transform,
        )
        module = CTCRecognition(model, self.source_model.labels, lexicon=lexicon)
        batches: Any = make_trainer(self.config).predict(module, data)
        found = {t.path: t.text for batch in batches for t in batch}
        return [found.get(str(item.path), "") for item in domain.held_out]

    # ---- examples ----------------------------------------------------------------------------

    def shown(self) -> Sequence[str]:
        """The adapter at the headline's size; else the one with most unlabelled data."""
        unlabelled = [f"LoRA, no labels, {s} s" for s in self.config.unlabelled]
        return [*unlabelled, f"LoRA, {self.config.headline} target labels"]

    def show(self, before: dict[str, list[str]], after: dict[str, list[str]]) -> None:
        """The held-out recordings before and after adaptation."""
        for domain in self.recordings.domains:
            sounds = domain.sounds(Path(self.config.out), self.source_model.sample_rate)
            for index, item in enumerate(domain.held_out):
                texts = before[domain.name][index], after[domain.name][index]
                audio = sounds[index] if index < len(sounds) else None
                self._transcript(domain, item, *texts, audio=audio)

    def _transcript(self, domain: Domain, item: Utterance, old: str, new: str, **more: Any) -> None:
        said = self.source_model.labels.normalise(item.text or "")
        found = Transcript(item.path.name, domain.name, said, old, new, self.seed, **more)
        self.run.transcripts.append(found)

    def _tell(
        self, case: Case, heard: Sequence[Utterance], pseudo: PseudoTranscriptCallback
    ) -> None:
        """Add pseudo-transcripts of the training recordings, before and after, to the run."""
        if case.size != max(self.config.unlabelled):
            return
        for item in heard:
            path = str(item.path)
            before, after = (x.get(path) for x in (pseudo.source_, pseudo.transcripts_))
            if before is not None and after is not None:
                more: dict[str, Any] = {"split": "target", "round": pseudo.changed_in_.get(path, 0)}
                more["confidence"] = round(math.exp(-after.distance), 4)
                self._transcript(case.train, item, before.label, after.label, **more)
