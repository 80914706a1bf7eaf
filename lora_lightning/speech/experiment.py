"""`Context`: what the methods of a speech run have in common."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, seed_everything
from torch import nn
from torchmetrics.functional.text import char_error_rate, word_error_rate

from lora_lightning.report.results import Row, Run
from lora_lightning.runner.progress import Stages
from lora_lightning.runner.trainer import make_trainer
from lora_lightning.speech.data.speech_data import SpeechData
from lora_lightning.speech.domains import Domain, Recordings
from lora_lightning.speech.settings import Adaptation, Config
from lora_lightning.speech.tasks.ctc import CTCRecognition, spec_augment
from lora_lightning.speech.tasks.lexicon import Lexicon, spoken_lexicon
from lora_lightning.speech.tasks.recognisers import ConformerCTC


@dataclass
class Context:
    """What a method may use: the recordings, the source model, ways to train and measure.

    Attributes:
        source: the source model; a method works on a copy of it (`fresh`).
        hypotheses: (method, domain) → what was understood of the held-out recordings.
        run: what the report is made of; a method may add spectra and notes.
    """

    config: Config
    recordings: Recordings
    source: ConformerCTC
    seed: int
    stages: Stages
    run: Run
    hypotheses: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether this is the first seed, which the report shows where it shows one."""
        return self.seed == self.config.seeds[0]

    def lexicon(self) -> Lexicon | None:
        """The words that may be said, where they are known."""
        data = self.config.data
        if data.lexicon is not None:
            return Lexicon.read(data.lexicon)
        return None if data.target else spoken_lexicon()

    def named(self, domain: Domain, what: str) -> str:
        """A name for this seed's adapter: the first seed's is plain."""
        return f"{domain.name}-{what}" + ("" if self.first else f"-seed{self.seed}")

    def fresh(self) -> ConformerCTC:
        """A copy of the source model, and the random numbers that every method starts with."""
        seed_everything(self.seed, verbose=False)
        return copy.deepcopy(self.source)

    def fit(
        self,
        model: ConformerCTC,
        settings: Adaptation,
        domain: Domain,
        size: int,
        callbacks: Sequence[Callback] = (),
    ) -> float:
        """Train `model` on the domain's enrolment of this size; returns the seconds."""
        steps = settings.steps[self.config.enrolment.index(size)]
        model.augment = spec_augment() if settings.spec_augment else None
        module = CTCRecognition(
            model.train(), learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
        )
        data = SpeechData(
            train=domain.enrolment(size, self.seed),
            sample_rate=model.sample_rate,
            max_batch=settings.batch,
            transform=domain.transform,
            seed=self.seed,
        )
        trainer = make_trainer(
            self.config, callbacks, max_epochs=-1, max_steps=steps, gradient_clip_val=5.0
        )
        start = time.perf_counter()
        trainer.fit(module, datamodule=data)
        return time.perf_counter() - start

    def measure(
        self,
        method: str,
        model: nn.Module,
        domain: Domain,
        seconds: float,
        parameters: int = 0,
        file_bytes: int | None = None,
        items: int | None = None,
        lexicon: Lexicon | None = None,
    ) -> list[Row]:
        """WER and CER on the domain's held-out recordings, decoded with a lexicon if given."""
        found = self.understood(model, domain, lexicon)
        return self.score(method, found, domain, seconds, parameters, file_bytes, items)

    def score(
        self,
        method: str,
        found: list[str],
        domain: Domain,
        seconds: float,
        parameters: int = 0,
        file_bytes: int | None = None,
        items: int | None = None,
    ) -> list[Row]:
        """WER and CER of what was understood of the domain's held-out recordings."""
        self.hypotheses[method, domain.name] = found
        said = [self.source.labels.normalise(u.text or "") for u in domain.held_out]
        rates = {"WER": word_error_rate(found, said), "CER": char_error_rate(found, said)}
        return [
            Row(
                method, domain.name, self.seed, metric, float(rate), parameters, seconds,
                file_bytes, items,
            )
            for metric, rate in rates.items()
        ]  # fmt: skip

    def understood(
        self, model: nn.Module, domain: Domain, lexicon: Lexicon | None = None
    ) -> list[str]:
        """What the model writes for each held-out recording."""
        data = SpeechData(
            test=domain.held_out,
            sample_rate=self.source.sample_rate,
            batch_seconds=self.config.data.batch_seconds,
            transform=domain.transform,
        )
        trainer = make_trainer(self.config)
        module = CTCRecognition(model, self.source.labels, lexicon=lexicon)
        batches: Any = trainer.predict(module, data)
        found = {t.path: t.text for batch in batches for t in batch}
        return [found.get(str(item.path), "") for item in domain.held_out]
