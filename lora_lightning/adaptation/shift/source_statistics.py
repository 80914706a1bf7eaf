"""`SourceStatistics`: a summary of a source, so that its data are not needed later.

Of the head's input and of each block's output: mean, leading directions, and a sample of items
projected on them; of the predictions: confidence and agreement, and with labels the accuracy. About
a megabyte, in a file beside the source model's weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adaptation.shift.batch_norm_agreement import second_opinion
from lora_lightning.adaptation.shift.features import features_of
from lora_lightning.errors import AdapterFileError, ConfigError, DataError, DataNotFoundError
from lora_lightning.linalg.decompose import truncated_svd
from lora_lightning.linalg.torch_settings import shuffled
from lora_lightning.lora.values import not_finite
from lora_lightning.model.adapter_file.container import contents
from lora_lightning.model.adapter_file.format import checksum, parsed, verify
from lora_lightning.model.adapter_file.schema import Leaf, Listed, Record, check, real, text
from lora_lightning.model.calling import classifier
from lora_lightning.model.fingerprint import fingerprint
from lora_lightning.report.files import atomic_write

DIRECTIONS = 32
SAMPLE = 500  # items of the source that are kept
FEWEST = 8
_FORMAT = "lora_lightning.adaptation.shift.source_statistics"
_SHARE = Leaf("a share or nothing", lambda v: v is None or real(0, 1).fits(v))
_SCHEMA = Record(
    {
        "model": Record({"architecture": text(), "structure": text()}, others=text()),
        "accuracy": _SHARE,
        "agreement": _SHARE,
        "layers": Listed(text(), 20_000),
    }
)
_HINT = (
    "Load the source model that they lie beside, or compute them again with "
    "SourceStatistics.of(model, data, labels)"
)


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's features on the source.

    Attributes:
        mean: (D,).
        basis: (d, D), orthonormal, along which the source varies most.
        scale: Root of the source's total variance, the unit of distances.
        sample: (S, d + 1), `project` of items of the source.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor
    sample: Tensor

    @classmethod
    def of(cls, features: Tensor, directions: int = DIRECTIONS) -> LayerStatistics:
        """From features (N, D): at most N / 8 directions of one half, a sample of the other.

        Items lie closer to directions fitted to them than other items of the same source do, which
        would pass for a domain shift.
        """
        order = shuffled(len(features))
        half = len(features) // 2
        first, second = features[order[:half]], features[order[half : half + SAMPLE]]
        mean = first.mean(dim=0)
        centred = first - mean
        d = max(1, min(directions, half // 4, features.shape[1]))
        basis = truncated_svd(centred, d).Vh
        scale = (centred.square().sum() / (half - 1)).sqrt().clamp_min(1e-12)
        empty = cls(mean, basis, scale, torch.empty(0, device="cpu"))
        return cls(mean, basis, scale, empty.project(second))

    def project(self, features: Tensor) -> Tensor:
        """(N, D) → (N, d + 1): coordinates and distance from their span, in units of the scale."""
        centred = features.float() - self.mean
        along = centred @ self.basis.T
        off = (centred - along @ self.basis).norm(dim=1, keepdim=True)
        return torch.cat([along, off], dim=1) / self.scale


@dataclass(frozen=True)
class SourceStatistics:
    """Summary of a source.

        SourceStatistics.of(model, held_out, labels).save("source_statistics.safetensors")

    Attributes:
        layers: Name → statistics, by depth, the last one ``"head"``.
        confidence: (N,) probability of the predicted class of each source item.
        accuracy: Of the predictions; None where no labels were given.
        agreement: With the second opinion, see `shift.batch_norm_agreement`; None without
            BatchNorm.
        model: Fingerprint of the model, see `lora_lightning.model.fingerprint`.
    """

    layers: dict[str, LayerStatistics]
    confidence: Tensor
    accuracy: float | None
    agreement: float | None
    model: dict[str, str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Any,
        labels: Tensor | None = None,
        *,
        forward: Callable[..., Any] | None = None,
        batch_size: int = 64,
    ) -> SourceStatistics:
        """Compute the statistics of a source with the model that was trained on it.

        Args:
            model: A classifier; run in eval mode, on the device it is on.
            data: Of the source: a dataset of inputs (or of tuples that begin with one), a loader
                over one or a tensor (N, …). Items that the model was **not** trained on: it is
                more confident on the others.
            labels: (N,) classes, in that order.
            forward: From (model, inputs), or from a batch of inputs alone, to logits (B, K);
                None: as `lora_lightning.model.calling` says.
            batch_size: Of the forward passes.

        Raises:
            ConfigError: the model's output is not (B, K); says what to pass.
            DataError: fewer than 8 items, NaN, or labels of another number.
        """
        run = classifier(model, forward)
        found, predictions = features_of(model, data, batch_size, run)
        n = len(predictions.probabilities)
        if n < FEWEST:
            raise DataError(f"statistics of a source need {FEWEST} items or more, got {n}")
        confidence, best = predictions.probabilities.max(dim=1)
        if labels is not None and labels.shape != best.shape:
            raise DataError(f"{n} items and labels of shape {tuple(labels.shape)}; give one each")
        right = None if labels is None else float((best == labels.cpu()).double().mean())
        layers = {name: LayerStatistics.of(x) for name, x in found.items()}
        second = second_opinion(model, data, run)
        steady = None if second is None else second.agreement(predictions.probabilities)
        return cls(layers, confidence, right, steady, fingerprint(model))

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError where they belong to another model, or to other weights."""
        now = fingerprint(model)
        if now["structure"] != self.model["structure"]:
            raise ConfigError(
                f"the source statistics are of another model: of {self.model['architecture']}, "
                f"this is {now['architecture']} (or has another head). {_HINT}"
            )
        if now.get("weights") != self.model.get("weights"):
            raise ConfigError(
                f"the source statistics are of a {now['architecture']} with other weights. {_HINT}"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file."""
        from safetensors.torch import save

        tensors = {"confidence": self.confidence}
        for layer, statistics in self.layers.items():
            tensors |= {f"{layer}/{k}": v.contiguous() for k, v in vars(statistics).items()}
        header: dict[str, Any] = {"format": _FORMAT, "model": self.model}
        header |= {"accuracy": self.accuracy, "agreement": self.agreement}
        header["layers"] = list(self.layers)  # by depth
        header["checksum"] = checksum(header, tensors)
        return atomic_write(Path(path), save(tensors, {"statistics": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SourceStatistics:
        """Read what `save` wrote.

        Raises:
            DataNotFoundError: there is no such file.
            AdapterFileError: it is another kind of file.
        """
        path = Path(path)
        if not path.is_file():
            raise DataNotFoundError(
                f"there is no file {path}: SourceStatistics.of(model, data, labels).save(path) "
                "writes one, and so does a recipe"
            )
        try:
            metadata, tensors = contents(path)
        except AdapterFileError as error:
            raise AdapterFileError(f"{path} is damaged, or no safetensors file: {error}") from error
        header = parsed(metadata, "statistics", path) or {}
        if header.get("format") != _FORMAT:
            raise AdapterFileError(f"{path} holds no statistics of a source")
        check(_SCHEMA, header, "the header", path)
        verify(header, tensors, path)
        confidence, layers = _whole(header["layers"], tensors, path)
        return cls(layers, confidence, header["accuracy"], header["agreement"], header["model"])


def _whole(
    names: list[str], tensors: dict[str, Tensor], path: Path
) -> tuple[Tensor, dict[str, LayerStatistics]]:
    """Confidence, and the statistics of each layer, whose sizes fit each other."""
    parts = [f.name for f in fields(LayerStatistics)]
    wanted = {"confidence", *(f"{layer}/{part}" for layer in names for part in parts)}
    if wanted != tensors.keys() or not_finite(tensors):
        raise AdapterFileError(f"{path} is not whole, or holds NaN or infinity; write it again")
    layers = {n: LayerStatistics(*(tensors[f"{n}/{part}"] for part in parts)) for n in names}
    for name, layer in layers.items():
        wide = layer.mean.numel(), layer.basis.shape[-1:].numel()
        shapes = [tuple(t.shape) for t in vars(layer).values()]
        directions, items = layer.basis.shape[:1].numel(), layer.sample.shape[:1].numel()
        right = [wide[:1], (directions, wide[1]), (), (items, directions + 1)]
        if shapes != right or wide[0] != wide[1]:
            raise AdapterFileError(
                f"{path}: the sizes of {name}'s statistics do not fit each other"
            )
    return tensors["confidence"], layers
