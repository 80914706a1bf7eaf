"""`SourceStatistics`: what is kept of a source so that its data need not be there later.

Of the head's input and of each block's output: mean, leading directions, and a sample of items
along them; of the answers: their confidence and, with labels, their accuracy. A few hundred
kilobytes, in a file beside the source model's weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.decompose import truncated_svd
from lora_lightning.errors import AdapterFileError, DataError
from lora_lightning.structure import block_list
from lora_lightning.transduction.target import Predicted, Target, predicted

HEAD = "head"  # the layer that stands for what the classifier is given
DIRECTIONS = 32
SAMPLE = 1000  # items of the source that are kept
_FORMAT = "lora_lightning.source_statistics"


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's features on the source.

    Attributes:
        mean: (D,).
        basis: (d, D), orthonormal, along which the source varies most.
        scale: Root of the source's whole variance: the unit of distances.
        sample: (S, d + 1), `project` of items of the source.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor
    sample: Tensor

    @classmethod
    def of(cls, features: Tensor, directions: int = DIRECTIONS) -> LayerStatistics:
        """From features (N, D), at most N / 4 directions of them."""
        mean = features.mean(dim=0)
        centred = features - mean
        d = max(1, min(directions, len(features) // 4, features.shape[1]))
        basis = truncated_svd(centred, d).Vh
        scale = (centred.square().sum() / max(1, len(features) - 1)).sqrt().clamp_min(1e-12)
        chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:SAMPLE]
        empty = cls(mean, basis, scale, torch.empty(0))
        return cls(mean, basis, scale, empty.project(features[chosen]))

    def project(self, features: Tensor) -> Tensor:
        """(N, D) → (N, d + 1): along the directions, and how far off them; the scale is 1."""
        centred = features.float() - self.mean
        along = centred @ self.basis.T
        off = (centred.square().sum(1) - along.square().sum(1)).clamp_min(0).sqrt()
        return torch.cat([along, off[:, None]], dim=1) / self.scale


@dataclass(frozen=True)
class SourceStatistics:
    """What is kept of a source.

    Attributes:
        layers: Name → statistics, the deepest last: ``"head"``.
        confidence: (N,) of the answers to the source's items.
        accuracy: Part of them that is right; None where no labels were given.
    """

    layers: dict[str, LayerStatistics]
    confidence: Tensor
    accuracy: float | None = None

    @classmethod
    def of(
        cls, model: nn.Module, data: Any, labels: Tensor | None = None, batch_size: int = 64
    ) -> SourceStatistics:
        """Look at a source with the model that was trained on it.

        Args:
            model: A classifier; run in eval mode, on the device it is on.
            data: Of the source: a dataset of inputs (or of tuples that begin with one), a loader
                over one or a tensor (N, …). Items that the model was not trained on: it is surer
                of the others.
            labels: (N,) classes, in that order.
            batch_size: Items that it is run on at once.

        Raises:
            DataError: fewer than 8 items, NaN, or labels of another number.
        """
        found, said = features_of(model, data, batch_size)
        n = len(said.probabilities)
        if n < 8:
            raise DataError(f"statistics of a source need 8 items or more, got {n}")
        confidence, best = said.probabilities.max(dim=1)
        if labels is not None and labels.shape != best.shape:
            raise DataError(f"{n} items and labels of shape {tuple(labels.shape)}; give one each")
        right = None if labels is None else float((best == labels.cpu()).double().mean())
        return cls({k: LayerStatistics.of(x) for k, x in found.items()}, confidence, right)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        tensors = {
            f"{layer}/{k}": v.contiguous()
            for layer, s in self.layers.items()
            for k, v in vars(s).items()
        }
        header = {"format": _FORMAT, "accuracy": self.accuracy, "layers": list(self.layers)}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {**tensors, "confidence": self.confidence}, path, {"statistics": json.dumps(header)}
        )
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SourceStatistics:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            AdapterFileError: it is no such file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("statistics", "{}"))
                if header.get("format") != _FORMAT:
                    raise AdapterFileError(f"{path} holds no statistics of a source")
                layers = {
                    name: LayerStatistics(
                        *(
                            file.get_tensor(f"{name}/{k}")
                            for k in LayerStatistics.__dataclass_fields__
                        )
                    )
                    for name in header["layers"]
                }
                return cls(layers, file.get_tensor("confidence"), header["accuracy"])
        except SafetensorError as error:
            raise AdapterFileError(f"{path} is no safetensors file: {error}") from error


def features_of(
    model: nn.Module, data: Any, batch_size: int
) -> tuple[dict[str, Tensor], Predicted]:
    """Each block's output pooled over places, (N, D) by name, the head's input last; answers."""
    target = Target(data)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with _watched(model) as found:
        said = predicted(model, model, target.loader(batch_size, shuffle=False), device)
    layers = {name: torch.cat(x) for name, x in found.items() if x}
    return {**layers, HEAD: said.features}, said


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    found: dict[str, list[Tensor]] = {name: [] for name in block_list(model)}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, Tensor) and first.is_floating_point() and first.ndim > 1:
                found[name].append(_pooled(first).float().cpu())

        return hook

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in found]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _pooled(x: Tensor) -> Tensor:
    """The mean over places of (B, C, H, W), of (B, H, W, C) where H = W tells it, or (B, N, C)."""
    if x.ndim == 4:
        last = x.shape[1] == x.shape[2] != x.shape[3]
        return x.mean(dim=(1, 2) if last else (2, 3))
    return x if x.ndim == 2 else x.flatten(1, -2).mean(dim=1)
