"""`Context`: what the methods of a translation run have in common."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
from lightning.pytorch import Callback, seed_everything
from torchmetrics.functional.text import sacre_bleu_score

from lora_lightning.report.results import Row, Run
from lora_lightning.runner.progress import Stages
from lora_lightning.runner.settings import TrainSettings
from lora_lightning.runner.trainer import make_trainer
from lora_lightning.text.decoding import Adjust
from lora_lightning.text.parallel import Pair, ParallelData
from lora_lightning.text.settings import Config
from lora_lightning.text.translation import Translation
from lora_lightning.text.translators import Translator


@dataclass(frozen=True)
class Domain:
    """A kind of text.

    Attributes:
        name: of the domain.
        train: pairs to draw from.
        test: held-out pairs.
    """

    name: str
    train: list[Pair]
    test: list[Pair]

    def drawn(self, count: int, seed: int) -> list[Pair]:
        """Pairs drawn for this seed; fewer draws are a part of more."""
        order = np.random.default_rng(seed).permutation(len(self.train))
        return [self.train[i] for i in order[:count]]


@dataclass(frozen=True)
class Adapted:
    """A translator that a method made for a domain, and what it cost."""

    model: Translator
    seconds: float
    parameters: int = 0
    file_bytes: int | None = None
    adjust: Adjust | None = None


@dataclass
class Context:
    """What a method may use: the pairs, the source model, ways to train and measure.

    Attributes:
        everyday: the source domain.
        targets: the domains to adapt to.
        source: the source model; a method works on a copy of it (`fresh`).
        written: (method, domain) → what was written for the held-out sentences.
        run: what the report is made of; a method may add spectra and notes.
    """

    config: Config
    everyday: Domain
    targets: list[Domain]
    source: Translator
    seed: int
    stages: Stages
    run: Run
    written: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether this is the first seed, which the report shows where it shows one."""
        return self.seed == self.config.seeds[0]

    def named(self, domain: Domain, what: str = "") -> str:
        """A name for this seed's adapter: the first seed's is plain."""
        return domain.name + what + ("" if self.first else f"-seed{self.seed}")

    def fresh(self) -> Translator:
        """A copy of the source model, and the random numbers that every method starts with."""
        seed_everything(self.seed, verbose=False)
        return copy.deepcopy(self.source)

    def labelled(self, domain: Domain) -> list[Pair]:
        """The pairs that a method with labels is given."""
        return domain.drawn(self.config.labelled, self.seed)

    def fit(
        self,
        model: Translator,
        settings: TrainSettings,
        domain: Domain,
        callbacks: Sequence[Callback] = (),
    ) -> float:
        """Train `model` on the domain's labelled pairs; returns the seconds."""
        data = ParallelData(
            model.subwords,
            self.labelled(domain),
            batch_size=self.config.data.target_batch_size,
            seed=self.seed,
        )
        trainer = make_trainer(
            self.config, callbacks, max_epochs=settings.epochs, gradient_clip_val=1.0
        )
        start = time.perf_counter()
        trainer.fit(translation(model.train(), settings), datamodule=data)
        return time.perf_counter() - start

    def measure(self, method: str, domain: Domain, adapted: Adapted) -> list[Row]:
        """BLEU, and whole sentences that are right, on a domain's held-out pairs."""
        found = self.translated(adapted, domain)
        if domain is not self.everyday:
            self.written[method, domain.name] = found
        wanted = [p.target for p in domain.test]
        right = fmean(a == b for a, b in zip(found, wanted, strict=True))
        bleu = float(sacre_bleu_score(found, [[w] for w in wanted]))
        items = self.config.labelled if "target labels" in method else None
        return [
            Row(
                method, domain.name, self.seed, metric, value, adapted.parameters,
                adapted.seconds, adapted.file_bytes, items,
            )
            for metric, value in {"BLEU": bleu, "exact": right}.items()
        ]  # fmt: skip

    def translated(self, adapted: Adapted, domain: Domain) -> list[str]:
        """What is written for each held-out sentence."""
        data = ParallelData(
            self.source.subwords, test=domain.test, batch_size=self.config.data.batch_size
        )
        module = Translation(adapted.model, adjust=adapted.adjust)
        batches: Any = make_trainer(self.config).predict(module, datamodule=data)
        return [t.text for batch in batches for t in batch]


def translation(model: Translator, settings: TrainSettings) -> Translation:
    """The module that trains `model` in this way; raises ConfigError for a bad value."""
    s = settings
    return Translation(model, s.learning_rate, s.weight_decay, s.label_smoothing, s.schedule)
