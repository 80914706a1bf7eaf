"""`diagnose` underfitting or overfitting from losses; `choose` a share by a permutation test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lora_lightning.errors import DataError

SHARES = (0.25, 0.5, 0.75, 1.0)  # of what was learnt; 0, the source model, is always there
LEVEL = 0.02  # of the test
LIKELY = 0.3  # of the test of mistakes
DRAWS = 10_000  # of signs
FEWEST = 6  # pairs that can pass it: five gains out of five have p = 0.03 by chance
SLIGHT = 0.02  # part of the source's loss that is no change


@dataclass(frozen=True)
class Look:
    """Losses after an epoch; epoch 0 is the source model.

    Attributes:
        epoch: Epochs done.
        training: Mean loss of the epoch's training batches, as they were trained on.
        held_out: Mean loss on the held-out data.
    """

    epoch: int
    training: float
    held_out: float


def diagnose(history: Sequence[Look]) -> str:
    """Underfitting, overfitting, or neither, from the source's losses and at least one epoch's.

    - *diverged*: a loss is not a number.
    - *overfitting*: the held-out loss has risen by more than 2 % of the source's since its lowest
      epoch, and the training loss has fallen.
    - *underfitting*: the training loss has fallen by less than 2 % of the source's; or the lowest
      held-out loss is the last, and the last epoch brought more than half of an even share.
    """
    source, last = history[0], history[-1]
    if not (math.isfinite(last.training) and math.isfinite(last.held_out)):
        return f"diverged in epoch {last.epoch}: lower the learning rate"
    best = min(history, key=lambda look: look.held_out)
    fell = source.training - last.training
    if last.held_out - best.held_out > SLIGHT * abs(source.held_out) and (
        last.training < best.training
    ):
        return (
            f"overfitting: since epoch {best.epoch} the held-out loss has risen from "
            f"{best.held_out:.3g} to {last.held_out:.3g} while the training loss fell from "
            f"{best.training:.3g} to {last.training:.3g}. Train on more items, for fewer epochs, "
            "or at a lower rank"
        )
    if fell < SLIGHT * abs(source.training):
        return (
            f"underfitting: the training loss is hardly below the source model's "
            f"({last.training:.3g}, was {source.training:.3g}). Unless the source fits as well as "
            "can be, raise the learning rate, the rank or the number of epochs"
        )
    gain = history[-2].held_out - last.held_out
    even = (source.held_out - last.held_out) / last.epoch
    if best is last and gain > max(even / 2, SLIGHT * abs(source.held_out)):
        return (
            f"underfitting: the held-out loss still falls at the end ({history[-2].held_out:.3g} "
            f"to {last.held_out:.3g} in the last epoch). Train for more epochs"
        )
    return (
        f"neither under- nor overfitting: the training loss fell from {source.training:.3g} to "
        f"{last.training:.3g}, the held-out loss from {source.held_out:.3g} to {best.held_out:.3g}"
    )


@dataclass(frozen=True)
class Choice:
    """The chosen share of an adapter, and why.

    Attributes:
        share: Of what was learnt; 0 is the source model.
        reason: Text for the user.
        p_value: Of the test; see `choose`.
        source: (N,) losses of the source model.
        losses: Share → (N,) losses of the adapted model.
    """

    share: float
    reason: str
    p_value: float
    source: Tensor
    losses: Mapping[float, Tensor] = field(default_factory=dict)

    def say(self, who: str) -> None:
        """Log the choice; a warning where the source model is kept."""
        (rank_zero_info if self.share else rank_zero_warn)(f"{who}: {self.reason}")


def choose(
    source: Tensor,
    losses: Mapping[float, Tensor],
    mistakes: tuple[Tensor, Mapping[float, Tensor]] | None = None,
    level: float = LEVEL,
) -> Choice:
    r"""The share with the lowest mean loss among those that gain significantly; or else 0.

    .. math:: p(a) = P\Big(\max_b t_b(\pm d) \ge t_a(d)\Big), \quad
        t_a(d) = \frac{\sum_i d_{ai}}{\sqrt{\sum_i d_{ai}^2}}, \quad
        d_{ai} = \ell_i(0) - \ell_i(a)

    A permutation test of pairs: if the adapter made no difference, the gains of each item could as
    well have the other sign. It assumes no distribution of the losses; pairing removes the variance
    that comes from some items being harder; and the maximum corrects for the choice among shares
    (Westfall & Young 1993, "Resampling-based multiple testing"). N items give
    :math:`p \ge 2^{-N}`: fewer than six are never significant at the default level.

    Args:
        source: (N,) losses of the source model on items that no adapter was trained on.
        losses: Share → (N,) losses of the adapted model on the same items.
        mistakes: Likewise (the source's, those of each share), of what will be measured: 1 where an
            item is wrong, say. Losses are more sensitive, but also fall where only the model's
            confidence changes. A share must have fewer mistakes as well, with p below 0.3 here.
        level: p must be below. A single pair (a score of a whole set) cannot be tested: the lower
            loss is taken.

    Raises:
        DataError: losses of another shape than the source's, or none.
    """
    shapes = {a: tuple(x.shape) for a, x in losses.items() if x.shape != source.shape}
    if shapes or not losses or not len(source):
        raise DataError(f"expected losses of shape {tuple(source.shape)} for each share: {shapes}")
    finite = {a: x for a, x in losses.items() if bool(x.isfinite().all())}
    if not finite:
        return Choice(0.0, "the source model is kept: no loss is a number", 1.0, source, losses)
    chance = _chances(source, finite)
    likely = _chances(mistakes[0], mistakes[1]) if mistakes else dict.fromkeys(finite, 0.0)
    sure = [a for a in finite if chance[a] < level and likely[a] < LIKELY]
    best = min(sure or finite, key=lambda a: float(finite[a].mean()))
    before, after = float(source.mean()), float(finite[best].mean())
    told = (
        f"held-out loss {after:.3g} at a share of {best:g}, the source model's {before:.3g} "
        f"(p = {chance[best]:.2g}, {len(source)} pairs)"
    )
    if mistakes:
        here, there = float(mistakes[1][best].mean()), float(mistakes[0].mean())
        told += f"; mistakes {here:.3g}, the source model's {there:.3g}"
    if sure:
        kept = f"{best:.0%} of what was learnt is kept: {told}"
        return Choice(best, kept, chance[best], source, losses)
    kept = f"the source model is kept, there is no sure gain: {told}"
    return Choice(0.0, kept, chance[best], source, losses)


def _chances(source: Tensor, losses: Mapping[float, Tensor]) -> dict[float, float]:
    """p of each share; of one pair 0 where its gain is above 0, and 1 otherwise."""
    gains, count = source - torch.stack(list(losses.values())), len(source)
    if count == 1:
        return dict(zip(losses, (gains[:, 0] <= 0).double().tolist(), strict=True))
    if 2**count <= DRAWS:  # all there are
        pairs = torch.arange(count, device="cpu")
        bits = torch.arange(2**count, device="cpu")[:, None] >> pairs & 1
    else:  # the first are the signs as they are
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(2, (DRAWS, count), generator=generator, device="cpu")
        bits[0] = 0
    norm = gains.square().sum(1).sqrt().clamp_min(torch.finfo(gains.dtype).tiny)
    scaled = (gains / norm[:, None]).double()
    highest = ((1.0 - 2.0 * bits.double()) @ scaled.T).amax(1)
    found = [float((highest >= t - 1e-9).double().mean()) for t in scaled.sum(1)]
    return dict(zip(losses, found, strict=True))
