"""`TranslationMemory`: nearest neighbours among known translations, without training (kNN-MT)."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.lora.values import check_count, check_number
from lora_lightning.text.parallel import TextBatch
from lora_lightning.text.subwords import PAD
from lora_lightning.text.translators import Translator


class TranslationMemory:
    r"""k nearest neighbours among the pieces of known translations (kNN-MT).

    The memory holds the decoder's output :math:`h` before each piece of a known translation, and
    that piece. With the k nearest to :math:`h_t` at distances :math:`d_i`,

    .. math:: p(y) = \lambda \sum_i \mathrm{softmax}(-d_i^2 / \tau)\,[y_i = y]
              + (1 - \lambda)\,p_\text{model}(y).

    Khandelwal et al. 2021, "Nearest neighbor machine translation", arXiv:2010.00710; the key here
    is the decoder's output. :math:`\tau` is in units of the mean squared distance to the
    nearest other key of the memory, so that it suits any width.

    Args:
        model: In eval mode.
        batch: The known pairs.
        neighbours: k; fewer where the memory is smaller.
        weight: λ, in [0, 1].
        temperature: τ, above 0.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        model: Translator,
        batch: TextBatch,
        neighbours: int = 4,
        weight: float = 0.5,
        temperature: float = 1.0,
    ):
        check_memory(neighbours, weight, temperature)
        with torch.no_grad():
            hidden = model.hidden(batch.source, batch.target[:, :-1]).float()
        following = batch.target[:, 1:]
        real = following != PAD
        self.keys, self.values = hidden[real], following[real]
        self.neighbours, self.weight = min(neighbours, len(self.keys)), weight
        self._scale = temperature * self._spread()

    def __call__(self, hidden: Tensor, log_probs: Tensor) -> Tensor:
        """(B, D), (B, V) → log-probabilities (B, V) of the mixture."""
        squares = torch.cdist(hidden.float(), self.keys).square()
        nearest, places = squares.topk(self.neighbours, dim=1, largest=False)
        share = (-nearest / self._scale).softmax(dim=1)
        known = torch.zeros_like(log_probs).scatter_add_(1, self.values[places], share)
        return (self.weight * known + (1 - self.weight) * log_probs.exp()).clamp_min(1e-30).log()

    def _spread(self) -> float:
        if len(self.keys) < 2:
            return 1.0
        others = torch.cdist(self.keys, self.keys).square().fill_diagonal_(torch.inf)
        return max(float(others.amin(dim=1).mean()), 1e-6)


def check_memory(neighbours: int, weight: float, temperature: float) -> None:
    """Raise ConfigError for a value out of range."""
    check_count("neighbours", neighbours)
    check_number("weight", weight, "[0, 1]")
    check_number("temperature", temperature, "(0, inf)")
