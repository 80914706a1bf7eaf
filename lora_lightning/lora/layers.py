"""Kinds of layers: their weights, and their forwards with an adapter.

Two paths lead to the same output. *Factorised*: ``forward`` adds s·B(Ax) to the base's own output
(`lora_lightning.lora.factorised`). *Effective weight*: the base class's own ``forward`` runs, and
what it reads as its weight is W + s·BA. A class takes the factorised path only where its forward
is known to be torch's own, so that an overridden forward (weight standardisation, "same" padding,
a functional read) is honoured by construction.

A layer is of the kind of the nearest class in its method resolution order. A new kind, here or in
a package of your own:

    @layer_kind(MyLinear)
    def my_forward(self, x): ...  # with self.factors("weight")

    add_layer_kind(MyLayer, tensors=lambda layer: ("weight", "gate_weight"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, jit, nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy

from lora_lightning.lora import factorised, parametrizations
from lora_lightning.lora.precision import is_quantised
from lora_lightning.lora.recurrent import BODY, forget_flat_weights
from lora_lightning.lora.sharding import is_packed
from lora_lightning.lora.spec import matrix_shape

Forward = Callable[[Any, Tensor], Tensor]


def _weight(module: nn.Module) -> tuple[str, ...]:
    return ("weight",)


@dataclass(frozen=True)
class LayerKind:
    """Properties of a kind of layer."""

    tensors: Callable[[Any], tuple[str, ...]] = _weight  # from a layer to the names of its weights
    # From a layer to the reason why it cannot be adapted; ``None``: it can
    refusal: Callable[[Any], str | None] = lambda module: None
    # Its forward with the adapter's product kept in factors; ``None``: the layer's own forward
    # reads the effective weight
    forward: Forward | None = None
    # Those that must not be overridden for `forward` to replace them
    methods: tuple[str, ...] = ("forward",)
    fits: Callable[[Any], bool] = lambda module: True  # whether this layer can take `forward`
    # Further attributes of the adapted subclass of the layer's class
    body: Mapping[str, Any] = field(default_factory=dict)
    # Called with a layer whose class has changed
    refresh: Callable[[Any], None] = lambda module: None
    cls: type[nn.Module] = nn.Module  # the class by which the kind was found


_KINDS: dict[type[nn.Module], LayerKind] = {}


def layer_kind(*classes: type[nn.Module], **fields: Any) -> Callable[[Forward], Forward]:
    """Decorator of a factorised forward: these classes, and subclasses, are a kind of layer.

    `fields` are those of `LayerKind`.
    """

    def add(forward: Forward) -> Forward:
        add_layer_kind(*classes, forward=forward, **fields)
        return forward

    return add


def add_layer_kind(*classes: type[nn.Module], **fields: Any) -> None:
    """`layer_kind` without a decorated forward: the layers' own reads the effective weight."""
    _KINDS.update({cls: LayerKind(**fields, cls=cls) for cls in classes})


def kind_of(cls: type[nn.Module]) -> LayerKind | None:
    """The kind of layers of this class; ``None``: it is not adaptable."""
    return next((_KINDS[c] for c in cls.__mro__ if c in _KINDS), None)


def tensors_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the weights of an adaptable layer; empty for any other module."""
    kind = kind_of(type(module))
    return () if kind is None else kind.tensors(module)


def refusal(module: nn.Module, tensor: str, weight: Any) -> str | None:
    """The reason why this tensor cannot be adapted, for the user; ``None`` where it can."""
    if has_foreign_lora(module):
        return "it has an attribute 'lora' of its own, where the factors would go"
    if isinstance(module, jit.ScriptModule):
        return "it is compiled TorchScript, whose code cannot change; adapt before scripting"
    if isinstance(module, GraphModule):
        return "it is a traced graph, whose class cannot change; adapt layers within it"
    if is_lazy(weight):
        return "it is lazy and has no shape yet; run one batch through the model first"
    if not isinstance(weight, Tensor):
        return f"it holds no tensor called {tensor!r}"
    if is_packed(weight) and not is_quantised(weight):
        return (
            f"{tensor} is a {type(weight).__name__}, packed by quantisation, say; adapt the model "
            "before it is quantised, and merge then"
        )
    if not weight.is_floating_point():
        return f"{tensor} has dtype {weight.dtype}; factors need a floating-point weight"
    if weight.dim() < 2 or 0 in weight.shape:
        return (
            f"{tensor} has shape {tuple(weight.shape)}, which is no matrix; "
            "to train it in full, list it in `trainable`"
        )
    kind = kind_of(type(module))
    own = None if kind is None else kind.refusal(module)
    return own or parametrizations.refusal(module, tensor)


def has_foreign_lora(module: nn.Module) -> bool:
    """Whether the module has an attribute ``lora`` that is not ours."""
    if "lora_active" in module.__dict__:
        return False
    # Not by `hasattr(module, …)`, which is slow where the attribute is missing.
    return (
        "lora" in module._modules
        or "lora" in module._parameters
        or "lora" in module._buffers
        or "lora" in module.__dict__
        or hasattr(type(module), "lora")
    )


def largest_rank(weight: Tensor, bare: bool) -> int:
    """The full rank of the weight's matrix: a larger one would only waste parameters."""
    return min(matrix_shape(tuple(weight.shape), bare))


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was adapted, or sharded."""
    cls = type(module)  # by the class, since missing attributes of a module are slow
    own = cls.__mro__[getattr(cls, "_orig_cls_mro_index", 0)]  # FSDP2's mixin stands before it
    return getattr(cls, "_adapted_base", own)


def path_of(module: nn.Module) -> str:
    """``"factorised"`` or ``"effective"``: how an adapter on this module is computed."""
    kind = _factorised(base_class(module))
    return "effective" if kind is None or not _fits(module, kind.fits) else "factorised"


def _fits(module: Any, fits: Callable[[Any], bool]) -> bool:
    # A weight that is no parameter is computed by a hook: only the effective path reads it.
    return "weight" in module._parameters and fits(module)


def _factorised(base: type[nn.Module]) -> LayerKind | None:
    """The kind of this class of layers, if its factorised forward can replace theirs."""
    if "weight" in vars(base) or getattr(base, "parametrizations", None) is not None:
        return None  # parametrised: its weight is computed, read it as such
    kind = kind_of(base)
    if kind is None or kind.forward is None:
        return None
    same = all(getattr(base, m) is getattr(kind.cls, m) for m in kind.methods)
    return kind if same else None


def overrides(base: type[nn.Module]) -> dict[str, Any]:
    """Attributes of the adapted subclass of `base` besides its effective tensors."""
    kind = kind_of(base)
    body = {} if kind is None else dict(kind.body)
    kind = _factorised(base)
    return body if kind is None else {**body, "forward": _choose(base, kind)}


def refresh(module: nn.Module) -> None:
    """Update a layer's own references to its weights, after its class has changed."""
    kind = kind_of(type(module))
    if kind is not None:
        kind.refresh(module)


def _choose(base: Any, kind: LayerKind) -> Forward:
    own: Forward = base.forward
    factors_kept: Any = kind.forward
    fits = kind.fits

    def forward(self: Any, input: Tensor) -> Tensor:
        # `_fits`, without the call; whoever kept this method calls it after removing, too.
        acts = self.__dict__.get("lora_active") is not None and "weight" in self._parameters
        out: Tensor = (factors_kept if acts and fits(self) else own)(self, input)
        return out

    return forward


# ---- torch's own layers -----------------------------------------------------------------------


def _renormalises(module: Any) -> str | None:
    if module.max_norm is None:
        return None
    return (
        "max_norm rewrites the weight in every forward, so that there is no fixed base to "
        "adapt; set max_norm=None after renormalising once"
    )


def _bag(module: Any) -> str | None:
    if module.sparse:
        return "sparse=True gives its weight a sparse gradient, which factors cannot take"
    return _renormalises(module)


def _projections(module: Any) -> tuple[str, ...]:
    packed = module.in_proj_weight is not None
    return ("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _recurrent(module: Any) -> tuple[str, ...]:
    return tuple(n for n in module._parameters if n.startswith("weight"))


add_layer_kind(nn.Linear, forward=factorised.linear_forward)
add_layer_kind(
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    forward=factorised.conv_forward,
    methods=("forward", "_conv_forward"),
    fits=lambda module: module.groups == 1,
)
add_layer_kind(nn.Embedding, refusal=_renormalises, forward=factorised.embedding_forward)
add_layer_kind(nn.modules.conv._ConvNd, nn.Bilinear)  # transposed convolutions
add_layer_kind(nn.EmbeddingBag, refusal=_bag)
add_layer_kind(nn.MultiheadAttention, tensors=_projections)
add_layer_kind(nn.RNNCellBase, tensors=_recurrent)
add_layer_kind(nn.RNNBase, tensors=_recurrent, body=BODY, refresh=forget_flat_weights)
