"""`LoRAConfig`: everything that describes one adapter, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict, get_type_hints

from typing_extensions import Unpack

from lora_lightning.errors import ConfigError
from lora_lightning.lora.initialisation import METHODS
from lora_lightning.lora.rank_rules import RULES
from lora_lightning.lora.values import (
    check_choice,
    check_count,
    check_number,
    check_plain,
    is_real,
    is_whole,
    keyed,
    patterns,
    plain,
)
from lora_lightning.registry import unknown

SCALING_RULES = ("alpha/r", "alpha/sqrt(r)")
LARGEST_ALPHA = 1e6
NOMINAL_RANK = 8  # at which a rule's rank has the scaling that a fixed rank has
USUAL_RULE = "explained-variance"  # what rank="auto" was


@dataclass
class LoRAConfig:
    r"""One low-rank adapter: where it sits, how large it is, and what else trains with it.

    An adapted weight is :math:`W + s\,B A` with :math:`A \in R^{r \times in}`,
    :math:`B \in R^{out \times r}` and the scaling :math:`s` (Hu et al. 2021,
    "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685).

    Args:
        rank: Inner dimension r of the factors, at least 1. Or a rule that gives each layer its
            own, from the target's data (see `lora_lightning.choose_ranks`):
            ``"explained-variance"`` (as many directions as hold `rank_energy` of the layer's
            inputs' variance), ``"effective-rank"`` or ``"hard-threshold"``. ``alpha/r`` is then
            :math:`\alpha/\sqrt{8r}`: that of rank 8 at rank 8, and first steps of the same size at
            every other rank (as in arXiv:2312.03732).
        rank_energy: Part of the variance that "explained-variance" asks for, in (0, 1].
        max_rank: With a rule: the most that a layer gets.
        parameter_budget: With a rule: the most numbers that the factors may hold together,
            dealt out where they explain most. ``None``: no limit.
        prune_to: Mean rank to which `LoRACallback` lowers the ranks while it trains, dropping
            the directions that matter least, of all layers together (after Zhang et al. 2023,
            "AdaLoRA", arXiv:2303.10512; see `data_driven.prune`). ``None``: none is dropped.
        alpha: Numerator of the scaling. Above 0, at most 1e6.
        scaling: ``"alpha/r"``, or ``"alpha/sqrt(r)"`` (rank-stabilised, Kalajdzievski 2023,
            arXiv:2312.03732), which keeps the step size when the rank grows.
        dropout: Probability of dropping an input of A while training, in [0, 1). Where the
            layer reads an effective weight, whole input features are dropped, one mask a forward.
        target_modules: ``"auto"`` (the family's table, else by structure; never the classifier),
            ``"all"`` (every adaptable layer), or a list of names, globs, ``re:`` regular
            expressions and ``type:`` class names. See `lora_lightning.model.patterns`.
        exclude_modules: Same language; what it matches is left alone.
        blocks: Indices into the model's outermost list of blocks (negative ones count from
            the end); only layers inside these blocks are adapted. ``None``: all.
        rank_pattern: Pattern to rank, for layers that want another one; the last match wins.
        alpha_pattern: Pattern to alpha, likewise.
        clamp_rank: Where a layer is too small for the rank, use the largest that it allows
            (the report shows it) instead of raising.
        trainable: What trains in full besides the factors: ``"head"`` (the classifier, where
            the model has one), ``"norms"``, ``"biases"``, or names, globs and ``re:`` patterns
            of modules or parameters.
        dora: Learn each output row's magnitude apart from its direction (Liu et al. 2024,
            "DoRA", arXiv:2402.09353).
        freeze_a: Train B only, with A fixed at random (Zhang et al. 2023, "LoRA-FA",
            arXiv:2308.03303).
        xs: Train a core R (r, r) alone, between frozen singular vectors of the weight (Bałazy et
            al. 2024, "LoRA-XS", arXiv:2405.17604): a file of about r² numbers a layer. Ranks may
            be larger then. Not together with `freeze_a` or another `init`.
        init: The starting factors: ``"zero"``, ``"orthogonal"``; from the weight ``"pissa"``,
            ``"milora"``, ``"olora"``; from the target's inputs ``"eva"``, ``"activation-nmf"``,
            ``"corda"``; from its labels or pseudo-labels ``"lora-ga"``. See
            `lora_lightning.lora.initialisation`. Each leaves the function at the start as it is.
        seed: Seed of the starting factors. ``None``: one draw from torch's global generator,
            so that ``seed_everything`` decides.

    Raises:
        ConfigError: a value is out of range; the message names key, value and correction.
    """

    rank: int | str = 8
    alpha: float = 16.0
    scaling: str = "alpha/r"
    dropout: float = 0.0
    target_modules: Any = "auto"
    exclude_modules: Any = field(default_factory=list)
    blocks: list[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rank_energy: float = 0.5
    max_rank: int = 32
    parameter_budget: int | None = None
    prune_to: float | None = None
    clamp_rank: bool = False
    trainable: Any = field(default_factory=lambda: ["head"])
    dora: bool = False
    freeze_a: bool = False
    xs: bool = False
    init: str = "zero"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.rank == "auto":
            why = (
                f'rank="auto" is now called rank="{USUAL_RULE}", after what it does; take rank=8, '
                "than which it was no better on the mean of four recipes (docs/rank.md)"
            )
            warnings.warn(why, FutureWarning, stacklevel=3)
            self.rank = USUAL_RULE
        self.target_modules = patterns("target_modules", self.target_modules)
        self.exclude_modules = patterns("exclude_modules", self.exclude_modules)
        self.trainable = patterns("trainable", self.trainable)
        alphas = {"alpha": self.alpha, **keyed("alpha_pattern", self.alpha_pattern)}
        for key, alpha in alphas.items():
            if not is_real(alpha) or not 0 < alpha <= LARGEST_ALPHA:
                raise ConfigError(
                    f"{key} must be a number above 0, got {alpha!r}; at most {LARGEST_ALPHA:g}"
                )
        check_number("dropout", self.dropout, "[0, 1)")
        check_choice("scaling", self.scaling, SCALING_RULES)
        check_choice("init", self.init, METHODS)
        self._check_ranks()
        if not self.target_modules:
            raise ConfigError('target_modules is empty; "auto" lets the library choose')
        self._check_flags()
        check_plain(self.to_dict())

    def _check_ranks(self) -> None:
        given = {"max_rank": self.max_rank, **keyed("rank_pattern", self.rank_pattern)}
        if self.parameter_budget is not None:
            given["parameter_budget"] = self.parameter_budget
        for key, rank in given.items():
            check_count(key, rank)
        known = self.rank in RULES if self.by_rule else is_whole(self.rank) and int(self.rank) > 0
        if not known:
            raise ConfigError(
                f"rank must be a whole number of at least 1, got {self.rank!r}; or a rule by which "
                f"the target's data decide: {', '.join(RULES)}"
            )
        if not self.by_rule and self.parameter_budget is not None:
            raise ConfigError(
                f"parameter_budget limits a rule such as {USUAL_RULE!r}; rank is {self.rank}"
            )
        if self.prune_to is not None:
            self._check_pruning(self.prune_to)
        check_number("rank_energy", self.rank_energy, "(0, 1]")

    def _check_pruning(self, to: float) -> None:
        if not is_real(to) or not 1 <= to < math.inf:
            raise ConfigError(f"prune_to is a mean rank of at least 1, got {to!r}")
        if not self.by_rule and to >= int(self.rank):
            raise ConfigError(
                f"prune_to={to} is no less than rank={self.rank}: begin with a larger rank"
            )
        if METHODS[self.init].moves:
            raise ConfigError(
                f"prune_to drops directions by making them zero, which those of init={self.init!r} "
                'are not at the start: use init="zero", "orthogonal", "eva" or "activation-nmf"'
            )

    def _check_flags(self) -> None:
        for key in ("dora", "freeze_a", "xs", "clamp_rank"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"{key} must be true or false, got {getattr(self, key)!r}")
        if self.seed is not None:
            check_count("seed", self.seed, 0)
        self._check_xs()
        if self.blocks is None:
            return
        listed = isinstance(self.blocks, Iterable) and not isinstance(self.blocks, (str, Mapping))
        self.blocks = list(self.blocks) if listed else self.blocks
        if not listed or not self.blocks or not all(map(is_whole, self.blocks)):
            raise ConfigError(f"blocks must be a list of whole numbers, got {self.blocks!r}")

    def _check_xs(self) -> None:
        if self.xs and self.freeze_a:
            raise ConfigError(
                "xs=True freezes both factors and trains a core between them; freeze_a=True would "
                "train B. Choose one"
            )
        if self.xs and (self.by_rule or self.prune_to is not None):
            raise ConfigError(
                "xs=True trains r × r numbers a layer, whose rank is neither chosen nor pruned: "
                "give a whole number as rank, and leave prune_to out"
            )
        if self.xs and self.init != "zero":
            raise ConfigError(
                f"xs=True takes its frozen factors from the weight and starts its core at zero, "
                f"so init={self.init!r} has nothing to set; leave init out"
            )

    @property
    def by_rule(self) -> bool:
        """Whether a rule chooses each layer's rank."""
        return isinstance(self.rank, str)

    def scale(self, rank: int, alpha: float) -> float:
        """The scaling s of a layer with this rank and alpha."""
        if self.scaling == "alpha/r" and self.by_rule:
            return alpha / math.sqrt(NOMINAL_RANK * rank)
        return alpha / (rank if self.scaling == "alpha/r" else math.sqrt(rank))

    def to_dict(self) -> dict[str, Any]:
        """Plain types only: what an adapter file's header and a checkpoint hold."""
        return dataclasses.asdict(self)

    @classmethod
    def make(
        cls, config: LoRAConfig | Mapping[str, Any] | None = None, **kwargs: Any
    ) -> LoRAConfig:
        """A config from a config, a mapping (also an OmegaConf one) and keyword overrides.

        Raises:
            ConfigError: an unknown key (with the nearest known one), or a bad value.
        """
        if isinstance(config, LoRAConfig):
            given = {f.name: getattr(config, f.name) for f in dataclasses.fields(cls)}
        elif config is None or isinstance(config, Mapping):
            given = plain(config)
        else:
            raise ConfigError(f"expected a LoRAConfig or a mapping, got {type(config).__name__}")
        given.update(kwargs)
        rule = given.pop("rank_rule", None)  # of an older version's files and settings
        if rule is not None and given.get("rank") == "auto":
            given["rank"] = rule
        known = [f.name for f in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise ConfigError(unknown("key", str(key), known))
        return cls(**given)


if TYPE_CHECKING:
    ConfigFields = Any
else:  # keyword arguments as type checkers and LightningCLI understand them
    ConfigFields = Unpack[TypedDict("ConfigFields", get_type_hints(LoRAConfig), total=False)]
