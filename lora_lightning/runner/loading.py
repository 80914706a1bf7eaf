"""Recipes: a commented YAML file, checked against a typed configuration, and run.

A recipe is a folder with a ``recipe.yaml`` and a README. Its key ``kind`` names the code that
runs it (`KINDS`), which brings the typed configuration too. Values come from three places,
the later ones over the earlier: the configuration's defaults, recipe.yaml, ``key=value``.
"""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from lora_lightning.errors import ConfigError
from lora_lightning.registry import Registry, unknown
from lora_lightning.runner.jobs import SERIAL, Jobs
from lora_lightning.runner.setting_tree import explained, inside_free, leaves, misfit, refuse_calls
from lora_lightning.runner.setting_tree import settings as settings

if TYPE_CHECKING:
    from lora_lightning.report.results import Run


class Kind(NamedTuple):
    """A kind of run, imported only where it is needed: "module:name" of its `RunConfig` and of its
    `Experiment`; or those themselves.
    """

    config: str | type
    experiment: str | type


KINDS: Registry[Kind] = Registry("kind")
for _kind, _config, _experiment in (
    ("classification", "vision.settings:Config", "vision.recipe:Classification"),
    ("pose", "vision.settings:PoseConfig", "vision.pose_recipe:PoseEstimation"),
    ("speech", "speech.settings:Config", "speech.experiment:Recognition"),
    ("translation", "text.settings:Config", "text.experiment:Translating"),
):
    KINDS.register(_kind)(Kind(f"lora_lightning.{_config}", f"lora_lightning.{_experiment}"))

_PACKAGE = Path(__file__).parents[1]


def list_recipes() -> dict[str, Path]:
    """Name → folder of each recipe that comes with the package."""
    # In the wheel they are in the package, in a checkout (editable install) beside it.
    for home in (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes"):
        if home.is_dir():
            return {p.parent.name: p.parent for p in sorted(home.glob("*/recipe.yaml"))}
    return {}


def find_recipe(name: str | Path) -> Path:
    """The recipe.yaml of a recipe's name, of a folder, or the file itself.

    Raises:
        ConfigError: there is no such recipe; names the nearest.
    """
    known = list_recipes()
    if isinstance(name, str) and name in known:
        return known[name] / "recipe.yaml"
    path = Path(name)
    path = path / "recipe.yaml" if path.is_dir() else path
    if path.is_file():
        return path
    nearest = unknown("key", str(name), known).replace("unknown key", "there is no recipe")
    raise ConfigError(f"{nearest} (or the path of a recipe.yaml, or of its folder)")


def load_recipe(name: str | Path) -> DictConfig:
    """The typed configuration of a recipe, with the values of its recipe.yaml.

    Raises:
        ConfigError: no such recipe, a file that is no YAML, an unknown key, a bad value.
    """
    path = find_recipe(name)
    try:
        given = OmegaConf.load(path)
    except Exception as error:  # of PyYAML or OmegaConf; both say where
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{path} must map keys to values")
    kind = given.get("kind")
    if kind not in KINDS:
        raise ConfigError(f"{path}: kind must be one of {', '.join(KINDS)}; got {kind!r}")
    refuse_calls(given, path)
    config = OmegaConf.structured(_imported(KINDS.get(kind).config))
    known = set(settings(config))
    for key in leaves(OmegaConf.to_container(given)):
        if key not in known and not inside_free(key, config):
            raise ConfigError(f"{path}: {unknown('key', key, known)}")
    return _merged(config, str(path), given)


def apply_overrides(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """A copy of `config` with each ``key=value`` applied; values are read as YAML.

    Raises:
        ConfigError: no ``=``, an unknown key (with the nearest known one), or a bad value.
    """
    known = list(settings(config))
    groups = {".".join(k.split(".")[:n]) for k in known for n in range(1, k.count(".") + 1)}

    def parsed(override: str) -> DictConfig:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"expected key=value, got {override!r}")
        if key not in known and key not in groups and not inside_free(key, config):
            raise ConfigError(unknown("key", key, known))
        try:
            return OmegaConf.from_dotlist([override])
        except Exception as error:  # PyYAML's, for a value such as "[1,"
            raise ConfigError(f"{override!r:.200}: the value is no valid YAML") from error

    try:
        return _merged(config, "overrides", *map(parsed, overrides))
    except ConfigError:  # one by one, which takes longer, to say which it is
        for override in overrides:
            config = _merged(config, override, parsed(override))
        return config


def _merged(config: DictConfig, where: str, *given: Any) -> DictConfig:
    try:
        merged = OmegaConf.merge(config, *given)
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except Exception as error:  # also TypeError, where a list meets a number
        raise ConfigError(f"{where}: {explained(error, config, given[-1])}") from error
    if said := misfit(config, plain):  # a list within a list passes the above
        raise ConfigError(f"{where}: {said}")
    assert isinstance(merged, DictConfig)
    return merged


def run_recipe(
    name: str | Path,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    quick: bool = False,
    jobs: Jobs = SERIAL,
) -> Run:
    """Run a recipe; all results are written to its output folder.

    Args:
        name: Name of a recipe, a folder, or a recipe.yaml.
        overrides: ``key=value`` strings.
        out: The output folder, over the configuration's own.
        quick: By the recipe's ``quick`` settings, `overrides` over these; title and notes say so.
        jobs: How many seeds at once, and where.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        ConfigError: a mistake in the settings, or the recipe has no ``quick`` ones.
    """
    recipe = load_recipe(name)
    config = apply_overrides(recipe, [*(_quick(recipe, name) if quick else ()), *overrides])
    given = [*["--quick"] * quick, *overrides]
    if out is not None:
        config.out = str(out)
        given = [*(o for o in given if not o.startswith("out=")), f"out={_as_yaml(config.out)}"]
    from lora_lightning.runner.runner import run

    command = shlex.join(["lora-lightning", "run", str(name), *given])
    titled = config.title != recipe.title
    return run(experiment_of(config), config, command, titled, quick=quick, jobs=jobs)


def _quick(recipe: DictConfig, name: str | Path) -> list[str]:
    if not recipe.quick:
        raise ConfigError(
            f"{find_recipe(name)} has no settings for --quick: list them under its key quick"
        )
    return list(recipe.quick)


def experiment_of(config: DictConfig) -> Any:
    """The `Experiment` that runs a recipe's configuration."""
    return _imported(KINDS.get(config.kind).experiment)


def _as_yaml(text: str) -> str:
    """The text as a value of ``key=value``, quoted where YAML would read something else."""
    read = OmegaConf.from_dotlist([f"out={text}"]).out
    return text if read == text else json.dumps(text)


def _imported(what: str | type) -> Any:
    """The object that "module:name" refers to."""
    if not isinstance(what, str):
        return what
    module, _, name = what.partition(":")
    return getattr(importlib.import_module(module), name)


def sweep_recipe(
    name: str | Path,
    ranks: Sequence[int | str],
    overrides: Sequence[str] = (),
    jobs: Jobs = SERIAL,
) -> Run:
    """Run a recipe's adapter with labels at several ranks; the plot ``ranks.svg`` compares them.

    Args:
        name: See `run_recipe`.
        ranks: Whole numbers, and rules such as ``"explained-variance"``.
        overrides: See `run_recipe`; but for the methods, which are the source model and the adapter
            at each rank.
        jobs: How many ranks at once, and where.

    Raises:
        ConfigError: a rank that is none, or a recipe without an adapter on labels.
    """
    from lora_lightning.lora.config import LoRAConfig

    for rank in ranks:
        LoRAConfig(rank=rank)
    methods = ",".join(["source_only", *(f"lora@{rank}" for rank in ranks)])
    return run_recipe(name, [*overrides, f"methods=[{methods}]"], jobs=jobs)
