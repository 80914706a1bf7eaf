"""Which objects have a front, and how they stand."""

from __future__ import annotations

from dataclasses import dataclass

from lora_lightning.data.solids import Rng


@dataclass(frozen=True)
class Front:
    """How an object with a front stands; degrees, counter-clockwise as seen from above.

    Args:
        turn: What turns the front of what the maker made to the viewer.
        low: The least turn that a new instance is given by chance.
        high: The greatest.
        either: The turn's sign is drawn as well.
    """

    turn: float
    low: float
    high: float
    either: bool = False

    def random(self, rng: Rng) -> float:
        """Draw the turn of a new instance."""
        sign = rng.choice([-1, 1]) if self.either else 1
        return float(sign * rng.uniform(self.low, self.high))


# The classes whose front can be told from any side: the nose, the door, where one sits. Each is as
# likely as its mirror image, so that a mirrored picture shows the negated azimuth. The others have
# none: round ones look the same from all sides, a table from two, and some mugs have no handle.
FRONTS: dict[str, Front] = {
    "airplane": Front(90, 25, 70),
    "car": Front(90, -30, 30),
    "chair": Front(0, 0, 40, either=True),
    "house": Front(0, 10, 45, either=True),
}
