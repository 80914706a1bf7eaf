"""`PoseRegressor`: regression of an angle from an image, with errors and losses on the circle.

Angles are in degrees. A network outputs two numbers for each image, (cos, sin): their direction
is the angle, their length the confidence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.training.optimised_module import Optimised


def circular_error(angles: Tensor, others: Tensor) -> Tensor:
    """Circular distance of two angles, in [0, 180]: 359 and 1 are 2 degrees apart."""
    return ((angles - others + 180) % 360 - 180).abs()


def direction(angles: Tensor) -> Tensor:
    """Angles (…) → unit vectors (…, 2), as (cos, sin)."""
    radians = torch.deg2rad(angles)
    return torch.stack([radians.cos(), radians.sin()], dim=-1)


def angle(vectors: Tensor) -> Tensor:
    """Vectors (…, 2) → the angles (…) of their directions, in (-180, 180]."""
    return torch.rad2deg(torch.atan2(vectors[..., 1], vectors[..., 0]))


def mirrored(vectors: Tensor) -> Tensor:
    """Vectors (…, 2) of the negated angles, those of the mirror image."""
    return vectors * vectors.new_tensor([1.0, -1.0])


class PoseRegressor(Optimised):
    r"""Regression of an angle; the network is ``self.model``, and `LoRACallback` finds it there.

    The loss is :math:`\frac1B\sum_i\|v_i - u(\theta_i)\|^2` with the network's :math:`v_i` and
    the unit vector :math:`u(\theta)=(\cos\theta, \sin\theta)`. The minimiser is the
    conditional mean of u: its direction is the circular mean, its length, 0 to 1, the mean
    resultant length of directional statistics, short where the image is ambiguous.
    Mardia & Jupp 2000, "Directional statistics".

    Args:
        model: The network, from images (B, 3, H, W) to (B, 2).
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        schedule: ``"one-cycle"`` (warm-up, then cosine to near 0), ``"cosine"``, ``"constant"``.

    Logs ``train_loss``, and ``test_azimuth_error``: the mean circular error in degrees.

    Raises:
        ConfigError: a value is out of range, or the model's output is not (B, 2).
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: str = "one-cycle",
    ):
        super().__init__(learning_rate, weight_decay, schedule)
        # Convolutions run twice as fast on a CPU, and faster on a GPU, with channels last.
        self.model = model.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (B, 2) of images (B, 3, H, W)."""
        found: Tensor = self.model(x.contiguous(memory_format=torch.channels_last))
        if found.ndim != 2 or found.shape[1] != 2:
            raise ConfigError(
                f"{type(self.model).__name__} gives a tensor of shape {tuple(found.shape)}; an "
                "angle needs two numbers for each picture, (cos, sin): num_classes=2"
            )
        return found

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of images and angles (B,)."""
        x, angles = batch
        loss: Tensor = (self(x) - direction(angles)).square().sum(dim=1).mean()
        self.log("train_loss", loss, batch_size=len(x))
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``test_azimuth_error``."""
        error = circular_error(angle(self(batch[0])), batch[1]).mean()
        self.log("test_azimuth_error", error, on_epoch=True, batch_size=len(batch[1]))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Vectors (B, 2)."""
        found: Tensor = self(batch[0])
        return found
