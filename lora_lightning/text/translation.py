"""`Translation`: the LightningModule that trains a translator and translates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.text import SacreBLEUScore

from lora_lightning.text.decoding import Adjust, greedy
from lora_lightning.text.parallel import TextBatch
from lora_lightning.text.subwords import PAD
from lora_lightning.text.translators import Translator
from lora_lightning.training.optimised_module import Optimised


class Translated(NamedTuple):
    """A predicted translation."""

    source: str  # the sentence
    text: str  # its translation
    log_probability: float  # mean over the pieces of the translation


class Translation(Optimised):
    r"""Translation; the network is ``self.model``, and `LoRACallback` finds it there.

    The loss of a batch is the mean over all pieces :math:`y_t` of the translations of
    :math:`-\log p(y_t \mid y_{<t}, x)` with label smoothing; padding is ignored.

    Args:
        model: From sentences (B, S) and translations so far (B, T) to logits (B, T, V).
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        label_smoothing: Of the cross-entropy, in [0, 1).
        schedule: ``"one-cycle"`` (warm-up, then cosine to near 0), ``"cosine"``, ``"constant"``.
        adjust: Changes the probabilities of each next piece in decoding.

    Logs ``train_loss`` and ``test_bleu`` (SacreBLEU over the whole epoch, as a fraction).

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        model: Translator,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        label_smoothing: float = 0.1,
        schedule: str = "one-cycle",
        adjust: Adjust | None = None,
    ):
        super().__init__(learning_rate, weight_decay, schedule, label_smoothing)
        self.model, self.adjust = model, adjust
        self.test_bleu = SacreBLEUScore()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """(B, S), (B, T) → logits (B, T, V)."""
        logits: Tensor = self.model(source, target)
        return logits

    def loss(self, batch: TextBatch) -> Tensor:
        """Cross-entropy of each next piece."""
        logits = self(batch.source, batch.target[:, :-1])
        return nn.functional.cross_entropy(
            logits.flatten(0, 1),
            batch.target[:, 1:].flatten(),
            ignore_index=PAD,
            label_smoothing=self.label_smoothing,
        )

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=len(batch))
        return loss

    def test_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Translates, and logs ``test_bleu``."""
        found = [t.text for t in self.translate(batch)]
        self.test_bleu.update(found, [[p.target] for p in batch.pairs])
        self.log("test_bleu", self.test_bleu, on_epoch=True, batch_size=len(batch))

    def predict_step(self, batch: TextBatch, batch_idx: int) -> list[Translated]:
        """The translation of each sentence."""
        return self.translate(batch)

    @torch.no_grad()
    def translate(self, batch: TextBatch) -> list[Translated]:
        """The translation of each sentence, by greedy decoding."""
        pieces, likely = greedy(self.model, batch.source, adjust=self.adjust)
        texts = map(self.model.subwords.decode, pieces.tolist())
        rows = zip(batch.pairs, texts, likely.tolist(), strict=True)
        return [Translated(pair.source, text, value) for pair, text, value in rows]
