"""`inject`: put an adapter with its factors on every target of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lora_lightning.errors import AdapterError, AdapterExistsError, ConfigError, TargetError
from lora_lightning.lora import layers
from lora_lightning.lora.adapted_module import adapt, raw_tensor
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.initialisation import METHODS
from lora_lightning.lora.sharding import BEFORE
from lora_lightning.lora.spec import FactorSpec, matrix_shape
from lora_lightning.lora.values import check_adapter_name
from lora_lightning.lora.xs import check_weights
from lora_lightning.model import eval_caches, lending, state_dict, switching
from lora_lightning.model import state as states
from lora_lightning.model.calling import Forward
from lora_lightning.model.fingerprint import fingerprint
from lora_lightning.model.injection_report import InjectionReport, Row
from lora_lightning.model.left_out import noted
from lora_lightning.model.owned_tensors import all_extras, chosen, snapshot
from lora_lightning.model.patterns import Target
from lora_lightning.model.state import ModelState, state_of
from lora_lightning.model.targets import select
from lora_lightning.model.undo import all_or_nothing
from lora_lightning.model.view import View
from lora_lightning.model.wrapped_keys import look_through


def inject(
    model: nn.Module,
    config: LoRAConfig | Mapping[str, Any] | None = None,
    *,
    name: str = "default",
    freeze: bool = True,
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    loss: Forward | None = None,
    **kwargs: Any,
) -> InjectionReport:
    r"""Put an adapter on `model`, in place, and make it the active one.

    Each chosen weight W becomes :math:`W + s\,BA` wherever it is read or used; with B = 0 at
    the start the output is the base's, bit for bit. Keys of the base's state dict stay.

    Args:
        model: Any module; a timm backbone, a torchaudio model, a LightningModule's network.
        config: A `LoRAConfig`, a mapping of its fields, or nothing.
        name: Name of the adapter: letters, digits, ``_`` and ``-``.
        freeze: Let only the factors and the parameters that `trainable` names require a gradient.
        data: Batches of the target, for a rule as `rank` and for a data-driven `init`; see
            `choose_ranks` and `start_from_data`, as for `forward` and `loss`. With both they are
            iterated over twice.
        forward: From (model, batch): runs the model once.
        loss: From (model, batch) to a scalar.
        **kwargs: Fields of `LoRAConfig`, over those in `config`.

    Returns:
        The report: what was adapted, how, at which rank. Injecting the same configuration
        under the same name again changes nothing and returns the first report.

    Raises:
        ConfigError: a bad value, or a rank larger than a layer allows.
        TargetError: a target matches nothing or cannot be adapted.
        AdapterExistsError: the name is taken by another configuration.
    """
    config = LoRAConfig.make(config, **kwargs)
    needs = METHODS[config.init].needs
    if data is None and (needs != "nothing" or config.by_rule):
        why = (
            f'rank="{config.rank}" looks at the inputs of the layers on the target'
            if config.by_rule
            else f"init={config.init!r} starts from the target's {needs}"
        )
        raise ConfigError(
            f"{why}: pass data=, its batches; LoRACallback takes those that it trains on"
        )
    before = state_of(model)
    new = before is None or name not in before.configs
    report = place(model, config, name, freeze)
    if new and data is not None:
        from lora_lightning.model.data_driven.initialise import start_from_data
        from lora_lightning.model.data_driven.rank_choice import choose_ranks

        try:
            if config.by_rule:
                report = choose_ranks(model, data, name, forward=forward)
            if needs != "nothing":
                start_from_data(model, data, name, forward=forward, loss=loss)
        except BaseException:
            switching.remove(model, name)
            raise
    return report


@lending.one_at_a_time
def place(model: nn.Module, config: LoRAConfig, name: str, freeze: bool = True) -> InjectionReport:
    """`inject` without the data-driven steps."""
    if config.xs and not freeze:
        raise ConfigError(
            "xs=True needs a frozen base: what stands around its core is computed from the base's "
            "weights, which freeze=False lets train. Leave freeze at True, or xs at False"
        )
    look_through(model)
    view = View(model)
    state = check_free(view, name)
    if name in state.configs:
        if state.configs[name] == config:
            return state.reports[name]
        raise AdapterExistsError(
            f"adapter {name!r} exists with another configuration; remove(model, {name!r}) first "
            "or choose another name"
        )
    targets = select(view, config)
    specs = _specs(targets, config)
    adapted = {t.path for t in targets}
    whole = [n for n in chosen(view, state, config.trainable) if n not in adapted]
    if config.xs:
        trained = {*whole, *all_extras(view, state)} - adapted
        weights = {t.path: raw_tensor(t.module, t.tensor) for t in targets}
        check_weights(weights, {n: view.tensors[n] for n in trained})
    report = report_of(view, name, _rows(targets, specs), whole)
    report = noted(report, view, config)
    with all_or_nothing(view, name):
        _put(name, targets, specs)
        register(view, state, config, report, freeze)
        if config.by_rule:
            state.unranked.add(name)
        if METHODS[config.init].needs != "nothing":
            state.unstarted.add(name)
        switching.activate(view, state, name)
        if freeze:
            switching.freeze(view, state)
    return report


def check_free(view: View, name: str) -> ModelState:
    """The state to register an adapter of this name in; raises where that is impossible."""
    check_adapter_name(name)
    state = state_of(view.model)
    lending.check_home(view, f"putting adapter {name!r} on the model")
    if state is None or name not in state.configs:
        view.check_whole(f"putting adapter {name!r} on the model", BEFORE)
    if state is None:
        inner = [n for n, m in view.modules if state_of(m)]
        if inner:
            raise AdapterError(
                f"{inner[0]!r} inside this model has adapters; inject into that module"
            )
        states.check_whole(view)
        return ModelState()
    view.check_unmerged("adding an adapter")
    return state


def _specs(targets: list[Target], config: LoRAConfig) -> dict[str, FactorSpec]:
    """Sizes of every pair of factors, all checked before the model is touched."""
    seed = int(torch.randint(2**31, (), device="cpu")) if config.seed is None else config.seed
    specs, too_large = {}, {}
    for target in targets:
        rank = _last_match(config.rank_pattern, target, config.rank)
        alpha = _last_match(config.alpha_pattern, target, config.alpha)
        largest = layers.largest_rank(raw_tensor(target.module, target.tensor), target.bare)
        if isinstance(rank, str):  # a rule: the most that it may get
            rank = min(config.max_rank, largest)
        elif rank > largest and config.clamp_rank:
            rank = largest
        elif rank > largest:
            too_large[target.path] = (rank, largest)
        specs[target.path] = FactorSpec(
            rank, alpha, config.scale(rank, alpha), config.dropout, config.dora, config.freeze_a,
            config.init, seed, target.path, METHODS[config.init].moves, config.xs,
        )  # fmt: skip
    if too_large:
        lines = "\n".join(f"  {p}: rank {r}, at most {m}" for p, (r, m) in too_large.items())
        raise ConfigError(
            f"rank is larger than these layers allow:\n{lines}\nlower rank, set rank_pattern for "
            "them, exclude them, or set clamp_rank=True to use the largest that fits"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(t.hit_by(pattern) for t in targets):
                raise TargetError(f"{key}: {pattern!r} matches none of the adapted layers")
    return specs


def _last_match(patterns: Mapping[str, Any], target: Target, default: Any) -> Any:
    found = [v for p, v in patterns.items() if target.hit_by(p)]
    return found[-1] if found else default


def _put(name: str, targets: list[Target], specs: dict[str, FactorSpec]) -> None:
    per_module: dict[tuple[int, bool], tuple[nn.Module, dict[str, FactorSpec]]] = {}
    for t in targets:
        _, tensors = per_module.setdefault((id(t.module), t.bare), (t.module, {}))
        tensors[t.tensor] = specs[t.path]
    for (_, bare), (module, tensors) in per_module.items():
        adapt(module, name, tensors, bare)


def register(
    view: View,
    state: ModelState,
    config: LoRAConfig,
    report: InjectionReport,
    freeze: bool,
    base: dict[str, str] | None = None,
) -> None:
    """Register a new adapter, whose factors are on the model already, in the model's state.

    `base` is the base's fingerprint without the report's extras, where it is known already.
    """
    if not state.configs:
        state.required_grad = {n: p.requires_grad for n, p in view.parameters.items()}
        states.attach(view.model, state)
        state_dict.register(view.model)
    state.cachers = eval_caches.cachers(view.modules)
    state.packers = eval_caches.packers(view.modules)
    state.enter(report.name, config, report)
    state.frozen = freeze
    snapshot(view, state)
    owned = all_extras(view, state)
    if base is None or owned != set(report.extras):
        base = fingerprint(view, owned)
    state.fingerprint = base


def _rows(targets: list[Target], specs: dict[str, FactorSpec]) -> Iterable[Row]:
    for t in targets:
        spec, kind = specs[t.path], layers.base_class(t.module).__name__
        path = "effective" if t.bare else layers.path_of(t.module)
        shape = matrix_shape(tuple(raw_tensor(t.module, t.tensor).shape), t.bare)
        size = spec.trained(*shape)
        yield Row(t.name, t.tensor, kind, path, spec.rank, spec.alpha, size, shape)


def report_of(view: View, name: str, rows: Iterable[Row], whole: Iterable[str]) -> InjectionReport:
    """The report of an adapter with these rows that trains the tensors `whole` in full."""
    # Tied parameters count once.
    total = sum({id(p): p.numel() for p in view.parameters.values()}.values())
    extras = {n: view.tensors[n].numel() for n in whole}
    return InjectionReport(name, tuple(rows), extras, total)
