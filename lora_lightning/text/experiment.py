"""`Translating`: the experiment of translation recipes, one adapter for each domain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch import seed_everything
from torchmetrics.functional.text import sacre_bleu_score
from torchmetrics.text import SacreBLEUScore

from lora_lightning.lora.values import check_number
from lora_lightning.report.results import Transcript
from lora_lightning.runner.cases import LABELS, NO_LABELS, NOTHING, Adapted, Case, Unlabelled
from lora_lightning.runner.checks import at_least, step_a_round
from lora_lightning.runner.experiment import Experiment
from lora_lightning.runner.trainer import in_rounds, make_trainer
from lora_lightning.text.domains import read_domains
from lora_lightning.text.methods import METHODS
from lora_lightning.text.parallel import Pair, ParallelData
from lora_lightning.text.self_training import PseudoTranslationCallback, check_rounds
from lora_lightning.text.settings import Config
from lora_lightning.text.subwords import Subwords
from lora_lightning.text.translation import Translation
from lora_lightning.text.translation_guard import TranslationLimits
from lora_lightning.text.translation_memory import check_memory
from lora_lightning.text.translators import Translator, load_translator, save_translator

AT_LEAST_ONE = (
    "labelled", "unlabelled", "data.test", "data.batch_size", "data.target_batch_size",
    "data.registers.source_train", "train.source.epochs", "train.lora.epochs", "train.full.epochs",
)  # fmt: skip


def bleu_sums(found: Sequence[str], wanted: Sequence[str]) -> list[list[float]]:
    """What each translation adds to BLEU's sums: matches, n-grams, its length, the reference's."""
    score, sums = SacreBLEUScore(), []
    for one, other in zip(found, wanted, strict=True):
        score.reset()
        score.update([one], [[other]])
        lengths = float(score.preds_len), float(score.target_len)
        sums.append([*score.numerator.tolist(), *score.denominator.tolist(), *lengths])
    return sums


class Translating(Experiment[Config]):
    """One case for each target, evaluated on the source too; predictions are domain → texts."""

    metric = "BLEU"
    methods = METHODS
    packages = ("torchmetrics",)
    gradient_clip = 1.0

    def check(self) -> None:
        """Raise ConfigError for an invalid value."""
        config, own = self.config, self.config.train.label_free
        at_least(config, 1, AT_LEAST_ONE)
        # All of these check their settings: early, not after the source's training.
        tiny = Translator(Subwords.learn(["a"]), dim=2, num_layers=1, num_heads=1, ffn_dim=2)
        for stage in (config.train.source, config.train.lora, config.train.full):
            self.task(tiny, stage)
        check_memory(**vars(config.memory))
        check_rounds(own.keep, own.dropped)
        check_number("train.label_free.confidence", own.confidence, "[0, 1]")
        step_a_round(own.steps, own.keep)
        self.task(tiny, own)

    # ---- data and source model ---------------------------------------------------------------

    def load(self) -> None:
        """Read the pairs, or generate them by the grammar."""
        self.everyday, *self.targets = read_domains(self.config)
        self.run.texts = "translations"
        self.run.data_root = Path(self.config.data.pairs or self.config.out)
        self.run.notes += [
            f"One adapter for each of {len(self.targets)} target domains, from "
            f"{self.config.labelled} labelled pairs of it; {len(self.everyday.test)} held-out "
            "pairs of each domain, which no training sees.",
            "Every method starts from the same source model, with the same pairs. In the column "
            "of the source domain is the mean over all adapters: what is lost there was forgotten.",
        ]

    def source(self) -> Translator:
        """The user's own, or trained on the source domain."""
        path = self.config.model.checkpoint
        model = load_translator(path) if path else self._trained()
        # An adapter can be used only with the model that it was trained on.
        save_translator(model, Path(self.config.out, "source.safetensors"))
        return model

    def _trained(self) -> Translator:
        given, seed = self.config.data, self.config.data.seed
        seed_everything(seed, verbose=False)
        texts = [text for p in self.everyday.train for text in (p.source, p.target)]
        sizes = {k: v for k, v in vars(self.config.model).items() if k != "checkpoint"}
        model = Translator(Subwords.learn(texts, sizes.pop("merges")), **sizes)
        pairs = self.everyday.train
        data = ParallelData(model.subwords, pairs, batch_size=given.batch_size, seed=seed)
        self.train_source(model, data)
        return model.eval()

    # ---- cases -------------------------------------------------------------------------------

    def cases(self, what: str) -> Iterator[Case]:
        """Each target; the source domain, which no method changes, is measured once at first."""
        for index, domain in enumerate(self.targets):
            if what == NOTHING:
                tested = [domain] if index else [self.everyday, domain]
                yield Case(domain.name, domain, tested)
            elif what == LABELS:
                tested, size = [domain, self.everyday], self.config.labelled
                yield Case(domain.name, domain, tested, "target labels", size)
            elif what == NO_LABELS:
                yield Case(domain.name, domain, [domain, self.everyday], "no labels")

    def task(self, model: Translator, stage: Any) -> Translation:
        """A `Translation`."""
        return Translation(model.train(), **stage.arguments())

    def labelled(self, case: Case) -> list[Pair]:
        """The pairs that a method with labels is given."""
        drawn: list[Pair] = case.train.drawn(self.config.labelled, self.seed)
        return drawn

    def fit_data(self, case: Case, stage: Any) -> ParallelData:
        """The domain's labelled pairs."""
        subwords, size = self.source_model.subwords, self.config.data.target_batch_size
        return ParallelData(subwords, self.labelled(case), batch_size=size, seed=self.seed)

    def unlabelled(self, model: Translator, case: Case) -> Unlabelled:
        """Self-training on pseudo-translations."""
        settings = self.config.train.label_free
        pairs = case.train.drawn(self.config.unlabelled, self.seed)
        own = PseudoTranslationCallback(
            [p.source for p in pairs],
            model.subwords,
            {word for p in self.everyday.train for word in p.target.split()},
            keep=settings.keep,
            dropped=settings.dropped,
            batch_size=self.config.data.target_batch_size,
            seed=self.seed,
            limits=TranslationLimits(confidence=settings.confidence),
        )
        own.setting = "train.label_free.confidence=0"
        task, length = self.task(model, settings), in_rounds(settings.steps)
        return Unlabelled(task, lambda: self._tell(case, pairs, own), own.data, [own], length)

    def measure(self, label: str, case: Case, adapted: Adapted) -> Iterator[tuple[str, str, float]]:
        """BLEU, and the part of exact matches, on held-out pairs."""
        for domain in case.tested:
            found = self.translated(adapted, domain.test)
            if domain is not self.everyday:
                self.answers.setdefault(label, {})[domain.name] = found
            wanted = [p.target for p in domain.test]
            self.count(label, domain.name, bleu_sums(found, wanted))
            yield domain.name, "BLEU", float(sacre_bleu_score(found, [[w] for w in wanted]))
            right = fmean(a == b for a, b in zip(found, wanted, strict=True))
            yield domain.name, "exact", right

    def translated(self, adapted: Adapted, pairs: Sequence[Pair]) -> list[str]:
        """The model's translation of each sentence."""
        size = self.config.data.batch_size
        data = ParallelData(self.source_model.subwords, test=pairs, batch_size=size)
        module = Translation(adapted.model, **adapted.decoding)
        batches: Any = make_trainer(self.config).predict(module, datamodule=data)
        return [t.text for batch in batches for t in batch]

    # ---- examples ----------------------------------------------------------------------------

    def shown(self) -> Sequence[str]:
        """The adapted model that the translations show."""
        return ("LoRA, no labels", "full, target labels", "LoRA, target labels")

    def show(self, before: dict[str, list[str]], after: dict[str, list[str]]) -> None:
        """The held-out sentences before and after adaptation."""
        for domain in self.targets:
            texts = before[domain.name], after[domain.name]
            self.run.transcripts += [
                Transcript(pair.source, domain.name, pair.target, old, new, self.seed)
                for pair, old, new in zip(domain.test, *texts, strict=True)
            ]

    def _tell(self, case: Case, pairs: list[Pair], own: PseudoTranslationCallback) -> None:
        """Add how it ended, and translations of the training sentences, to the run."""
        name = case.train.name
        self.run.notes.append(
            f"LoRA, no labels, {name} (seed {self.seed}): {own.termination_condition_}; the state "
            f"of round {own.accepted_} of {len(own.history_) - 1} is kept."
        )
        for pair in pairs:
            before, after = own.source_[pair.source], own.translations_[pair.source]
            sure, when = math.exp(after.log_probability), own.changed_in_.get(pair.source, 0)
            texts = pair.source, name, pair.target, before.text, after.text
            found = Transcript(*texts, self.seed, None, "target", round(sure, 4), when)
            self.run.transcripts.append(found)
