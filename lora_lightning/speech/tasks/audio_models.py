"""torchaudio's models by name: its pretrained bundles and its factories.

A bundle is loaded by torchaudio's own code, which downloads the weights; with a local state dict
the same architecture is built from the bundle's description, without the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torchaudio
from torch import Tensor, nn
from torchaudio import models, pipelines

from lora_lightning.errors import ConfigError
from lora_lightning.registry import unknown
from lora_lightning.runner.weights import read_checkpoint, read_weights

_ASSETS = "https://download.pytorch.org/torchaudio/"


@dataclass
class AudioModel:
    """A model with the metadata of its bundle."""

    model: nn.Module  # in eval mode
    # Symbols of its classes, the blank first; None where it has none
    labels: tuple[str, ...] | None
    sample_rate: int  # of its input, in Hz; 0 where unknown
    # ``"ctc"``, ``"encoder"``, ``"transducer"``, ``"synthesis"``, ``"separation"``, ``"quality"``,
    # or ``"factory"`` for a model without a bundle
    kind: str
    # What its checkpoint's header says, see `lora_lightning.model.adapter_file.data_config`
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Recipe:
    """How to load a type of bundle, and how to build it without its weights."""

    kind: str
    load: Callable[[Any], nn.Module]
    build: Callable[[Any], nn.Module]
    file: Callable[[Any], str]


def load_audio_model(
    name: str, checkpoint: Path | str | None = None, **settings: Any
) -> AudioModel:
    """A model of torchaudio by name.

    Args:
        name: A bundle of ``torchaudio.pipelines`` (``WAV2VEC2_ASR_BASE_960H``, …), or a factory
            or class of ``torchaudio.models`` (``wavlm_base``, ``Conformer``, …).
        checkpoint: A local state dict (.pth, .pt, .safetensors) in place of a bundle's download.
        settings: Arguments of a factory.

    Raises:
        ConfigError: there is no such model, the weights cannot be fetched, or do not fit.
    """
    bundles = [n for n in pipelines.__all__ if not isinstance(getattr(pipelines, n), type)]
    if name in bundles:
        if settings:
            raise ConfigError(f"{name} is a bundle and takes no settings, got {sorted(settings)}")
        return _bundle(name, checkpoint)
    factory = getattr(models, name, None)
    if not callable(factory) or name.startswith("_"):
        known = [*bundles, *(n for n in models.__all__ if callable(getattr(models, n)))]
        raise ConfigError(f"torchaudio has no such model: {unknown('key', name, known)[:300]}")
    try:
        model = factory(**settings)
    except TypeError as error:
        raise ConfigError(f"torchaudio.models.{name}: {error}") from error
    if checkpoint is not None:
        _fit(model, read_weights(Path(checkpoint)), f"{checkpoint}", name)
    return AudioModel(model.eval(), None, 0, "factory")


def _bundle(name: str, checkpoint: Path | str | None) -> AudioModel:
    bundle: Any = getattr(pipelines, name)
    recipe = _recipe(bundle)
    data: Mapping[str, Any] = {}
    if checkpoint is None:
        model = _downloaded(name, bundle, recipe)
    else:
        model = recipe.build(bundle)
        found = read_checkpoint(Path(checkpoint))
        weights, data = found.weights, found.data
        if all(key.startswith("model.") for key in weights):  # saved from the normalising wrapper
            weights = {key.removeprefix("model."): value for key, value in weights.items()}
        _drop_unused_classes(bundle, weights, model)
        _fit(model, weights, str(checkpoint), name)
        if getattr(bundle, "_normalize_waveform", False):
            model = pipelines._wav2vec2.utils._extend_model(model, normalize_waveform=True)
    labels = _labels(bundle)
    rate = getattr(bundle, "sample_rate", None) or 22050  # Tacotron2's bundles have none
    return AudioModel(model.eval(), labels, int(rate), recipe.kind, data)


def _labels(bundle: Any) -> tuple[str, ...] | None:
    if isinstance(bundle, pipelines.Wav2Vec2FABundle):
        return tuple(bundle.get_labels(star=None))  # the star is for forced alignment alone
    return tuple(bundle.get_labels()) if hasattr(bundle, "get_labels") else None


def _downloaded(name: str, bundle: Any, recipe: _Recipe) -> nn.Module:
    try:
        return recipe.load(bundle)
    except (OSError, RuntimeError) as error:
        file = recipe.file(bundle)
        url = file if file.startswith("https") else _ASSETS + file
        raise ConfigError(
            f"the weights of {name} could not be fetched ({str(error).splitlines()[0]}). Download "
            f"{url} where there is a network, and give checkpoint={url.rpartition('/')[2]}"
        ) from error


def _recipe(bundle: Any) -> _Recipe:
    kinds = pipelines
    if isinstance(bundle, kinds.Wav2Vec2Bundle):
        kind = "ctc" if isinstance(bundle, kinds.Wav2Vec2ASRBundle) else "encoder"
        aligns = isinstance(bundle, kinds.Wav2Vec2FABundle)
        make = pipelines._wav2vec2.utils._get_model
        return _Recipe(
            "ctc" if aligns else kind,
            (lambda b: b.get_model(with_star=False)) if aligns else (lambda b: b.get_model()),
            lambda b: make(b._model_type, b._params),
            lambda b: b._path if b._path.startswith("https") else f"models/{b._path}",
        )
    if isinstance(bundle, kinds.RNNTBundle):
        return _Recipe(
            "transducer", lambda b: b._get_model(), lambda b: b._rnnt_factory_func(),
            lambda b: b._rnnt_path,
        )  # fmt: skip
    if isinstance(bundle, kinds.Tacotron2TTSBundle):
        return _Recipe(
            "synthesis", lambda b: b.get_tacotron2(),
            lambda b: models.Tacotron2(**b._tacotron2_params),
            lambda b: f"models/{b._tacotron2_path}",
        )  # fmt: skip
    if isinstance(bundle, kinds.SourceSeparationBundle):
        return _Recipe(
            "separation", lambda b: b.get_model(), lambda b: b._model_factory_func(),
            lambda b: b._model_path,
        )  # fmt: skip
    objective = isinstance(bundle, kinds.SquimObjectiveBundle)
    base = models.squim_objective_base if objective else models.squim_subjective_base
    return _Recipe(
        "quality", lambda b: b.get_model(), lambda b: base(), lambda b: f"models/{b._path}"
    )


def _drop_unused_classes(bundle: Any, weights: dict[str, Tensor], model: nn.Module) -> None:
    """Drop classes that some of torchaudio's files have and its models leave out."""
    axes = getattr(bundle, "_remove_aux_axis", ())
    own = model.state_dict().get("aux.weight")
    given = weights.get("aux.weight")
    if axes and own is not None and given is not None and len(given) == len(own) + len(axes):
        pipelines._wav2vec2.utils._remove_aux_axes(weights, axes)


def _fit(model: nn.Module, weights: dict[str, Tensor], path: str, name: str) -> None:
    own = model.state_dict()
    wrong = [f"{k} is missing" for k in own if k not in weights]
    wrong += [f"{k} is unknown" for k in weights if k not in own]
    wrong += [
        f"{k} is {tuple(v.shape)}, expected {tuple(own[k].shape)}"
        for k, v in weights.items()
        if k in own and v.shape != own[k].shape
    ]
    if wrong:
        raise ConfigError(
            f"{path} does not fit {name} of torchaudio {torchaudio.__version__}: {wrong[0]}"
            + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        )
    model.load_state_dict(weights, strict=True)
