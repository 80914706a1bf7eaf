"""`second_opinion`: predictions with BatchNorm's statistics of the target."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lora_lightning.adaptation.target import Predict, Target, predicted
from lora_lightning.adaptation.transductive_rounds import SOURCE_ITEMS
from lora_lightning.adaptation.validators import agreement
from lora_lightning.linalg.torch_settings import shuffled
from lora_lightning.model.batch_norm import reestimated
from lora_lightning.model.calling import moved
from lora_lightning.model.probing import preserved

MOST = 500  # items to predict; drawn at random from more
BATCH = 64


class Opinion(NamedTuple):
    """Predictions with re-estimated BatchNorm statistics.

    Attributes:
        items: (n,) indices of the items.
        probabilities: (n, K) of these.
    """

    items: Tensor
    probabilities: Tensor

    def agreement(self, probabilities: Tensor) -> float:
        """The part of these items that predictions (N, K) of all items label in the same way."""
        return agreement(probabilities[self.items], self.probabilities)


@torch.no_grad()
def second_opinion(model: nn.Module, data: Any, predict: Predict) -> Opinion | None:
    """Predict with BatchNorm's statistics re-estimated on these items; None without BatchNorm.

    Two equally accurate models that differ by randomness agree on as many items as they classify
    correctly (Jiang et al. 2022, "Assessing generalization of SGD via disagreement",
    arXiv:2106.13799). The model is left as it was.
    """
    target = Target(data)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # Shuffled: in batches of one class, as folders give them, the features vary too little.
    chosen = shuffled(len(target))[:MOST]
    some: Any = Subset(target, chosen.tolist())
    loader: DataLoader[Any] = DataLoader(some, BATCH, **target.settings)
    with preserved(model):
        if not reestimated(model, predict, (moved(x, device) for x, _ in loader), SOURCE_ITEMS):
            return None
        found = predicted(predict, model, loader, device)
    # `predicted` puts them in the order of their indices.
    return Opinion(chosen.sort().values, found.probabilities)
