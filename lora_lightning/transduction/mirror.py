"""What a regressor of angles says of pictures and of their mirror images, and the judge of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.probe import preserved
from lora_lightning.tasks.pose import angle, circular_error, direction, mirrored
from lora_lightning.transduction.guard import Verdict
from lora_lightning.transduction.target import Target

BINS = 24  # of the histogram of angles, 15 degrees each


@dataclass(frozen=True)
class PoseLimits:
    """Where the alarms ring; each compares a round with the source model on the same pictures.

    Args:
        spread: Least part of the source's entropy of the answers' histogram: below, the answers
            collapse.
        moved: Degrees that the answers may have moved from the source's, the mean.
    """

    spread: float = 0.75
    moved: float = 40.0

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 1:
            raise ConfigError(f"spread must lie in [0, 1], got {self.spread}")
        if not 0 <= self.moved <= 180:
            raise ConfigError(f"moved must lie in [0, 180] degrees, got {self.moved}")


@dataclass(frozen=True)
class Twice:
    """What a network says of pictures, (N, 2), and of their mirror images, mirrored back."""

    plain: Tensor
    mirror: Tensor

    @property
    def mean(self) -> Tensor:
        """(N, 2)."""
        return (self.plain + self.mirror) / 2

    @property
    def apart(self) -> Tensor:
        """How many degrees both answers are apart, (N,)."""
        return circular_error(angle(self.plain), angle(self.mirror))

    @property
    def concordance(self) -> float:
        r"""How far both answers agree, beyond what answers that hardly differ would: 1 at most.

        :math:`2\sum_i (p_i - \bar p)\cdot(m_i - \bar m) \,/\, (\sum_i \|p_i - \bar p\|^2 +
        \sum_i \|m_i - \bar m\|^2 + N \|\bar p - \bar m\|^2)` of the unit vectors p and m of both.
        Degrees alone would praise a network that says nearly 0 to everything. Lin 1989, "A
        concordance correlation coefficient to evaluate reproducibility".
        """
        p, m = (direction(angle(v)).double() for v in (self.plain, self.mirror))
        apart = len(p) * (p.mean(0) - m.mean(0)).square().sum()
        p, m = p - p.mean(0), m - m.mean(0)
        total = p.square().sum() + m.square().sum() + apart
        return float(2 * (p * m).sum() / total.clamp_min(1e-12))

    @property
    def spread(self) -> float:
        """The entropy in nats of the histogram of the answers, over 15 degrees each."""
        found = torch.histc(angle(self.plain).float(), BINS, -180, 180)
        return float(torch.special.entr(found / found.sum()).sum())

    def of(self, indices: Tensor) -> Twice:
        """Some of the pictures."""
        return Twice(self.plain[indices], self.mirror[indices])


@torch.no_grad()
def seen_twice(model: nn.Module, target: Target, batch_size: int, device: torch.device) -> Twice:
    """What a network in eval mode says of each picture and of its mirror image."""
    plain, mirror = [], []
    with preserved(model):
        model.eval()
        for x, _ in target.loader(batch_size, shuffle=False):
            plain.append(model(x.to(device)).float().cpu())
            mirror.append(mirrored(model(x.to(device).flip(-1)).float().cpu()))
    return Twice(torch.cat(plain), torch.cat(mirror))


def judge(source: Twice, best: Twice, now: Twice, limits: PoseLimits) -> Verdict:
    """Whether a round may be kept: its two answers agree better than ever, and nothing is lost.

    Args:
        source: By the source model.
        best: By the best state so far.
        now: By the round, of the same pictures.
        limits: Where the alarms ring.
    """
    if not bool(torch.isfinite(now.plain).all() and torch.isfinite(now.mirror).all()):
        return Verdict({}, ["the answers are NaN: the learning rate is too high"])
    moved = circular_error(angle(now.plain), angle(source.plain))
    scores = {
        "agreement": float(torch.deg2rad(moved).cos().mean()),
        "mirror": now.concordance,
        "spread": min(now.spread / max(source.spread, 1e-6), 1.0),
    }
    alarms = []
    if now is not source and now.concordance <= best.concordance:
        alarms.append(
            f"the answers to mirror images agree no better: concordance {now.concordance:.3f}, "
            f"before {best.concordance:.3f}"
        )
    if scores["spread"] < limits.spread:
        alarms.append(
            f"the answers collapse: their spread is {scores['spread']:.0%} of the source's"
        )
    if float(moved.mean()) > limits.moved:
        alarms.append(f"the answers have moved by {float(moved.mean()):.1f} degrees")
    return Verdict(scores, alarms)
