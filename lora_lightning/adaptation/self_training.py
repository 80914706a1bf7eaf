"""What trainings on a model's own answers share."""

from __future__ import annotations

from torchmetrics.functional.text import edit_distance


def normalised_distance(a: str, b: str) -> float:
    """Edit distance of characters over the length of the longer; 0 for two empty texts."""
    return float(edit_distance(a, b)) / max(len(a), len(b), 1)
