"""CTC decoding: greedy, and by prefix beam search.

Legend of shapes: B recordings, F frames, C classes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_count
from lora_lightning.speech.tasks.labels import Labels

NEVER = -math.inf


def greedy(log_probs: Tensor, lengths: Tensor, labels: Labels) -> list[str]:
    """The text of the most likely class of each frame.

    Args:
        log_probs: (B, F, C) log-probabilities, or logits.
        lengths: (B,) frames that are no padding.
        labels: The symbols of the classes.

    Raises:
        ConfigError: the log-probabilities hold NaN.
    """
    best = (row.argmax(dim=1) for row in valid_frames(log_probs, lengths))
    paths = (torch.unique_consecutive(row) for row in best)
    return [labels.decode(path.tolist()) for path in paths]


def beam_search(
    log_probs: Tensor,
    lengths: Tensor,
    labels: Labels,
    beam_size: int = 16,
    threshold: float = -8.0,
) -> list[str]:
    """The most likely text, summed over all alignments within the beam.

    Hannun et al. 2014, "First-pass large vocabulary continuous speech recognition using
    bi-directional recurrent DNNs", arXiv:1408.2873.

    Args:
        log_probs: (B, F, C) log-probabilities (not logits: they are summed).
        lengths: (B,) frames that are no padding.
        labels: The symbols of the classes.
        beam_size: Prefixes that are kept after each frame.
        threshold: Classes below this log-probability are not tried in a frame.

    Raises:
        ConfigError: `beam_size` is below 1, or the log-probabilities hold NaN.
    """
    check_count("beam_size", beam_size)
    found = []
    for row in valid_frames(log_probs, lengths):
        ranked = prefixes(row.double().tolist(), labels.blank, beam_size, threshold)
        found.append(labels.decode(ranked[0][0]))
    return found


def valid_frames(log_probs: Tensor, lengths: Tensor) -> list[Tensor]:
    """The frames (F, C) of each recording, without padding, which may hold NaN.

    Raises:
        ConfigError: a frame holds NaN.
    """
    rows = [row[:n] for row, n in zip(log_probs.detach().cpu(), lengths.tolist(), strict=True)]
    for index, row in enumerate(rows):
        if row.isnan().any():
            raise ConfigError(
                f"the recogniser's output for recording {index} of the batch is NaN: its weights "
                "are broken; train again with a lower learning rate, or in bf16 in place of fp16"
            )
    return rows


Prefix = tuple[int, ...]


# Prefix → for each class that may follow, what a language model adds to the longer one's score.
Grow = Callable[[Prefix], Mapping[int, float]]
Sums = dict[Prefix, tuple[float, float]]


def prefixes(
    frames: Sequence[Sequence[float]],
    blank: int,
    beam_size: int,
    threshold: float = NEVER,
    grow: Grow | None = None,
) -> list[tuple[Prefix, float]]:
    """Prefixes with their score, the log of their summed probability, the best first.

    Each prefix has two sums, over the alignments that end in the blank and over those that end in
    its last class: repeating that class extends the prefix only after a blank. `grow` says by
    which classes, all without it.
    """
    bonus: dict[Prefix, float] = {(): 0.0}
    beam: Sums = {(): (0.0, NEVER)}
    for frame in frames:
        tried = {c: p for c, p in enumerate(frame) if p >= threshold or c == blank}
        after = _step(beam, tried, blank, grow, bonus)
        scores = {x: add(*sums) + bonus.get(x, 0.0) for x, sums in after.items()}
        possible = [prefix for prefix, score in scores.items() if score > NEVER]
        kept = sorted(possible, key=scores.__getitem__, reverse=True)[:beam_size]
        beam = {prefix: after[prefix] for prefix in kept}
    return [(prefix, add(*sums) + bonus.get(prefix, 0.0)) for prefix, sums in beam.items()]


def _step(
    beam: Sums,
    tried: Mapping[int, float],
    blank: int,
    grow: Grow | None,
    bonus: dict[Prefix, float],
) -> Sums:
    """The sums after another frame, given class → log-probability."""
    after: Sums = defaultdict(lambda: (NEVER, NEVER))
    for prefix, (ended, going) in beam.items():
        either = add(ended, going)
        more = tried if grow is None else grow(prefix)
        for c in tried if grow is None else sorted({blank, *prefix[-1:], *more} & tried.keys()):
            p = tried[c]
            if c == blank:
                _raise(after, prefix, blank=either + p)
                continue
            again = bool(prefix) and c == prefix[-1]
            if again:
                _raise(after, prefix, label=going + p)
            longer, start = (*prefix, c), ended if again else either
            if start > NEVER and c in more:
                _raise(after, longer, label=start + p)
                if grow is not None:
                    bonus[longer] = more[c]
    return after


def _raise(
    sums: dict[Prefix, tuple[float, float]],
    prefix: Prefix,
    blank: float = NEVER,
    label: float = NEVER,
) -> None:
    old = sums[prefix]
    sums[prefix] = add(old[0], blank), add(old[1], label)


def add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    high, low = max(a, b), min(a, b)
    return high if low == NEVER else high + math.log1p(math.exp(low - high))
