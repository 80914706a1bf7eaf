"""Predictions of images and of their mirror images, and the guard's check of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.adaptation.guard import NAN, Verdict
from lora_lightning.adaptation.target import Target
from lora_lightning.lora.values import check_number, finite
from lora_lightning.model.probing import evaluating
from lora_lightning.vision.pose_regressor import angle, circular_error, direction, mirrored

BINS = 24  # of the histogram of angles, 15 degrees each


@dataclass(frozen=True)
class PoseLimits:
    """Thresholds of the alarms; each compares a round with the source model on the same images.

    Args:
        spread: Least part of the source's entropy of the predictions' histogram: below, the
            predictions collapse.
        moved: Largest mean change of the predictions from the source's, in degrees.
    """

    spread: float = 0.75
    moved: float = 40.0

    def __post_init__(self) -> None:
        check_number("spread", self.spread, "[0, 1]")
        check_number("moved", self.moved, "[0, 180]", unit="degrees")


@dataclass(frozen=True)
class Twice:
    """Predictions of images, (N, 2), and of their mirror images, mirrored back."""

    plain: Tensor
    mirror: Tensor

    def __len__(self) -> int:
        return len(self.plain)

    @property
    def mean(self) -> Tensor:
        """(N, 2)."""
        return (self.plain + self.mirror) / 2

    @property
    def apart(self) -> Tensor:
        """The difference of both predictions in degrees, (N,)."""
        return circular_error(angle(self.plain), angle(self.mirror))

    @property
    def concordance(self) -> float:
        r"""The concordance correlation of both predictions, 1 at most.

        :math:`2\sum_i (p_i - \bar p)\cdot(m_i - \bar m) \,/\, (\sum_i \|p_i - \bar p\|^2 +
        \sum_i \|m_i - \bar m\|^2 + N \|\bar p - \bar m\|^2)` of the unit vectors p and m of both.
        Degrees alone would favour a network that always predicts nearly 0. Lin 1989, "A
        concordance correlation coefficient to evaluate reproducibility".
        """
        p, m = (direction(angle(v)).double() for v in (self.plain, self.mirror))
        apart = len(p) * (p.mean(0) - m.mean(0)).square().sum()
        p, m = p - p.mean(0), m - m.mean(0)
        total = p.square().sum() + m.square().sum() + apart
        return float(2 * (p * m).sum() / total.clamp_min(1e-12))

    @property
    def preference(self) -> float:
        """The part of the mean squared difference of both that is a difference of all, 0 to 1."""
        apart = (angle(self.plain) - angle(self.mirror) + 180).double() % 360 - 180
        return float(apart.mean().square() / apart.square().mean().clamp_min(1e-6))

    @property
    def spread(self) -> float:
        """The entropy in nats of the predictions' histogram, with bins of 15 degrees."""
        found = torch.histc(angle(self.plain).float(), BINS, -180, 180)
        return float(torch.special.entr(found / found.sum()).sum())

    def of(self, indices: Tensor) -> Twice:
        """The subset of these images."""
        return Twice(self.plain[indices], self.mirror[indices])


@torch.no_grad()
def seen_twice(model: nn.Module, target: Target, batch_size: int, device: torch.device) -> Twice:
    """Predictions of each image and of its mirror image, in eval mode."""
    plain, mirror = [], []
    with evaluating(model):
        for x, _ in target.loader(batch_size, shuffle=False):
            plain.append(model(x.to(device)).float().cpu())
            mirror.append(mirrored(model(x.to(device).flip(-1)).float().cpu()))
    return Twice(torch.cat(plain), torch.cat(mirror))


def judge(source: Twice, best: Twice, now: Twice, limits: PoseLimits) -> Verdict:
    """The verdict on a round: both predictions must agree better than ever, without collapse."""
    if not finite(now.plain, now.mirror):
        return Verdict({}, [NAN.format("answers")])
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
