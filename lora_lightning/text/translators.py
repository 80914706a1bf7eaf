"""`Translator`: a translation model around `nn.Transformer`, and its file.

Shapes: B sentences, S pieces of the source, T of the target, D width, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.model.adapter_file.schema import Leaf, Record, real, text, whole
from lora_lightning.runner.weights import build, load_built, save_built, weights_of
from lora_lightning.text.subwords import PAD, Subwords

_SCHEMA = Record(
    {
        "settings": Record(
            {
                "dim": whole(2, 8192), "num_layers": whole(1, 200), "num_heads": whole(1, 256),
                "ffn_dim": whole(1, 65_536), "dropout": real(0, 1),
            },
            others=Leaf("no such setting", lambda value: False),
        ),
        "subwords": text(10_000_000),
    }
)  # fmt: skip


class Translator(nn.Module):
    """Embedding (one for both languages), sinusoidal positions, `nn.Transformer`, linear head.

    Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762. Padding, on the right,
    is masked; the decoder is causal.

    Args:
        subwords: The tokeniser of both languages.
        dim: Width D; even.
        num_layers: Of the encoder, and of the decoder.
        num_heads: Attention heads; must divide `dim`.
        ffn_dim: Hidden width of the feed-forward modules.
        dropout: In both.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    def __init__(
        self,
        subwords: Subwords,
        dim: int = 96,
        num_layers: int = 2,
        num_heads: int = 4,
        ffn_dim: int = 256,
        dropout: float = 0.1,
    ):
        super().__init__()
        if dim % 2 or dim % num_heads:
            raise ConfigError(
                f"dim must be even and a multiple of num_heads; got dim={dim}, "
                f"num_heads={num_heads}"
            )
        self.settings = {
            "dim": dim, "num_layers": num_layers, "num_heads": num_heads, "ffn_dim": ffn_dim,
            "dropout": dropout,
        }  # fmt: skip
        self.subwords = subwords
        self.embedding = nn.Embedding(len(subwords), dim, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(dim, num_heads, ffn_dim, dropout, batch_first=True)
        # Nested tensors would change the length of outputs and save nothing at these sizes.
        encoder = nn.TransformerEncoder(
            layer, num_layers, nn.LayerNorm(dim), enable_nested_tensor=False
        )
        self.transformer = nn.Transformer(
            dim, num_heads, num_layers, num_layers, ffn_dim, dropout, batch_first=True,
            custom_encoder=encoder,
        )  # fmt: skip
        self.head = nn.Linear(dim, len(subwords))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """(B, S) and the translation so far (B, T) → logits (B, T, V) of each next piece."""
        logits: Tensor = self.head(self.hidden(source, target))
        return logits

    def hidden(self, source: Tensor, target: Tensor) -> Tensor:
        """(B, S), (B, T) → the decoder's output (B, T, D), which the head reads."""
        return self.decode(target, self.encode(source), source == PAD)

    def encode(self, source: Tensor) -> Tensor:
        """(B, S) → (B, S, D)."""
        encoded: Tensor = self.transformer.encoder(
            self.embedded(source), src_key_padding_mask=source == PAD
        )
        return encoded

    def decode(self, target: Tensor, encoded: Tensor, padding: Tensor) -> Tensor:
        """(B, T), (B, S, D) and where the source is padding, (B, S) → (B, T, D).

        The target's padding needs no mask: it lies after every position that is attended to.
        """
        size = target.shape[1]
        later = torch.ones(size, size, dtype=torch.bool, device=target.device).triu(1)
        decoded: Tensor = self.transformer.decoder(
            self.embedded(target), encoded, tgt_mask=later, memory_key_padding_mask=padding
        )
        return decoded

    def embedded(self, ids: Tensor, place: int = 0) -> Tensor:
        """Pieces (B, T), the first at position `place` → (B, T, D)."""
        x = self.embedding(ids) * math.sqrt(self.settings["dim"])
        embedded: Tensor = self.dropout(x + positions(place + ids.shape[1], x)[place:])
        return embedded


def positions(count: int, like: Tensor) -> Tensor:
    """(count, D): sines and cosines of wavelengths from 2π to 10,000·2π."""
    dim = like.shape[-1]
    place = torch.arange(count, device=like.device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, dim, 2, device=like.device) * (-math.log(1e4) / dim))
    angle = place * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).to(like.dtype)


def save_translator(model: Translator, path: Path | str) -> None:
    """Write weights, pieces and sizes to safetensors."""
    pieces = model.subwords.dumps()
    save_built(path, "translator", weights_of(model), settings=model.settings, subwords=pieces)


def load_translator(path: Path | str) -> Translator:
    """A translator from a file of `save_translator`, in eval mode.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no translator's file {path}")
    built, weights = load_built(path, "translator", _SCHEMA)
    settings = built["settings"]
    dim, last = settings["dim"], settings["num_layers"] - 1
    try:
        subwords = Subwords.loads(built["subwords"])
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: the header garbles subwords ({error})") from error
    shapes = {
        "embedding.weight": (len(subwords), dim),
        f"transformer.decoder.layers.{last}.linear1.weight": (settings["ffn_dim"], dim),
    }
    return build(path, lambda: Translator(subwords, **settings), shapes, weights)
