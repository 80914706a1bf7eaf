"""Objectives and scores of a CTC recogniser without labels: SUTA, DUST, rate of non-blanks.

Legend of shapes: B recordings, F frames, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_lightning.adaptation.objectives import entropy, minimum_class_confusion
from lora_lightning.adaptation.text_self_training import normalised_distance
from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_number


def non_blank_rate(log_probs: Tensor, lengths: Tensor, blank: int = 0) -> float:
    """The part of the frames, without padding, whose most likely class is not the blank.

    Args:
        log_probs: (B, F, C), or logits.
        lengths: (B,) frames that are no padding.
        blank: Class of the blank.
    """
    inside = torch.arange(log_probs.shape[1], device=log_probs.device) < lengths[:, None]
    said = (log_probs.argmax(dim=2) != blank) & inside
    return float(said.sum()) / max(int(inside.sum()), 1)


def suta(
    log_probs: Tensor,
    lengths: Tensor,
    blank: int = 0,
    weight: float = 0.3,
    temperature: float = 2.5,
) -> Tensor:
    r"""SUTA: entropy of non-blank frames, and minimum class confusion.

    :math:`w\,H + (1 - w)\,C` with H the mean entropy of the frames whose likeliest class is no
    blank, at temperature T, and C the minimum class confusion of all frames, blank left out, at T.
    Lin et al. 2022, "Listen, adapt, better WER: source-free single-utterance test-time adaptation
    for automatic speech recognition", arXiv:2203.14222.

    Args:
        log_probs: (B, F, C), or logits.
        lengths: (B,) frames that are no padding.
        blank: Class of the blank.
        weight: w, in [0, 1].
        temperature: T, above 0.

    Returns:
        A scalar; where all frames are blank, the second term alone.

    Raises:
        ConfigError: a value is out of range, or the shape is another.
    """
    check_number("weight", weight, "[0, 1]")
    check_number("temperature", temperature, "(0, inf)")
    if log_probs.ndim != 3 or log_probs.shape[2] < 3:
        raise ConfigError(
            f"expected (recordings, frames, classes) with two classes beside the blank, got "
            f"{tuple(log_probs.shape)}"
        )
    inside = torch.arange(log_probs.shape[1], device=log_probs.device) < lengths[:, None]
    frames = log_probs[inside].float()
    said = frames[frames.argmax(dim=1) != blank]
    others = [c for c in range(frames.shape[1]) if c != blank]
    confusion = minimum_class_confusion(frames[:, others], temperature)
    sharp = entropy(said / temperature) if len(said) else frames.sum() * 0
    return weight * sharp + (1 - weight) * confusion


def dust_distances(hypotheses: Sequence[str], variants: Sequence[Sequence[str]]) -> list[float]:
    """How far each transcript changes under dropout (DUST): 0, not at all, to 1.

    The mean normalised edit distance of its variants. Khurana et al. 2021, "Unsupervised domain
    adaptation for speech recognition via uncertainty driven self-training", arXiv:2011.13439.

    Raises:
        ConfigError: variants are missing.
    """
    if len(variants) != len(hypotheses) or not all(variants):
        raise ConfigError("each transcript needs one variant or more")
    return [
        sum(normalised_distance(text, v) for v in others) / len(others)
        for text, others in zip(hypotheses, variants, strict=True)
    ]
