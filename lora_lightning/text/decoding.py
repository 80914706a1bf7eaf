"""`greedy`: greedy decoding with a key-value cache.

The keys and values of earlier pieces and of the source sentence are cached. This reads the weights
of `nn.MultiheadAttention` instead of calling it; an adapted layer gives its adapted weight.
Shapes: as in `lora_lightning.text.translators`; H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.text.subwords import BEGIN, END, PAD
from lora_lightning.text.translators import Translator

# From hidden states (B, D) and log-probabilities (B, V) of the next piece to adjusted ones.
Adjust = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def greedy(
    model: Translator, source: Tensor, most: int | None = None, adjust: Adjust | None = None
) -> tuple[Tensor, Tensor]:
    """Translate (B, S) by the most likely next piece.

    Args:
        model: In eval mode.
        source: Padded sentences.
        most: Maximum length of a translation; None: one and a half times the source's plus 5.
        adjust: Changes the log-probabilities of each next piece.

    Returns:
        Pieces (B, T), `PAD` after each `END`; and (B,) the mean log-probability of a sentence's
        pieces, `END` included.
    """
    most = 3 * source.shape[1] // 2 + 5 if most is None else most
    steps = _Steps(model, source)
    piece = torch.full((len(source),), BEGIN, device=source.device)
    total = torch.zeros(len(source), device=source.device)
    written: list[Tensor] = []
    for place in range(most):
        hidden = steps(piece, place)
        log_probs = model.head(hidden).float().log_softmax(dim=1)
        log_probs = log_probs if adjust is None else adjust(hidden, log_probs)
        likely, best = log_probs[:, END:].max(dim=1)  # neither PAD nor BEGIN
        open_ = (piece != END) & (piece != PAD)
        total += torch.where(open_, likely, 0.0)
        piece = torch.where(open_, best + END, PAD)
        written.append(piece)
        if not bool(((piece != END) & (piece != PAD)).any()):
            break
    pieces = torch.stack(written, dim=1)
    return pieces, total / (pieces != PAD).sum(dim=1).clamp_min(1)


class _Steps:
    """The decoder, one position at a time."""

    def __init__(self, model: Translator, source: Tensor):
        self.model = model
        encoded, attended = model.encode(source), (source != PAD)[:, None, None]
        layers = model.transformer.decoder.layers
        self.layers = [_Layer(layer, encoded, attended) for layer in layers]

    def __call__(self, piece: Tensor, place: int) -> Tensor:
        """The latest pieces (B,), at this position → (B, D)."""
        x = self.model.embedded(piece[:, None], place)
        for layer in self.layers:
            x = layer(x)
        hidden: Tensor = self.model.transformer.decoder.norm(x)[:, 0]
        return hidden


class _Layer:
    """A post-norm `nn.TransformerDecoderLayer` with its key-value cache."""

    def __init__(self, layer: Any, encoded: Tensor, attended: Tensor):
        self.layer, self.attended = layer, attended
        self.heads, self.dim = layer.self_attn.num_heads, encoded.shape[2]
        own, other = layer.self_attn, layer.multihead_attn
        self.own = own.in_proj_weight, own.in_proj_bias
        weight, bias = other.in_proj_weight, other.in_proj_bias
        self.query = weight[: self.dim], bias[: self.dim]
        known = F.linear(encoded, weight[self.dim :], bias[self.dim :])
        self.sentence = [self._split(x) for x in known.chunk(2, dim=2)]
        self.past: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """(B, 1, D) → (B, 1, D)."""
        layer = self.layer
        query, *new = (self._split(y) for y in F.linear(x, *self.own).chunk(3, dim=2))
        pairs = zip(self.past, new, strict=True) if self.past else ()
        self.past = [torch.cat(pair, dim=2) for pair in pairs] or new
        x = layer.norm1(x + self._attend(layer.self_attn, query, self.past))
        query = self._split(F.linear(x, *self.query))
        x = layer.norm2(x + self._attend(layer.multihead_attn, query, self.sentence, self.attended))
        out: Tensor = layer.norm3(x + layer.linear2(layer.activation(layer.linear1(x))))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, H, T, D / H)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    @staticmethod
    def _attend(
        attention: nn.MultiheadAttention,
        query: Tensor,
        known: list[Tensor],
        attended: Tensor | None = None,
    ) -> Tensor:
        keys, values = known
        found = F.scaled_dot_product_attention(query, keys, values, attn_mask=attended)
        out: Tensor = attention.out_proj(found.transpose(1, 2).flatten(2))
        return out
