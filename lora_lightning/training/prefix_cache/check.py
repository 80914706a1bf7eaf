"""Finding the cut, checking that forwards with stored features are the same, and still are."""

from __future__ import annotations

import zlib
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lora_lightning.errors import ConfigError
from lora_lightning.linalg.torch_settings import forked_rng, rng_states, rounding, set_seed
from lora_lightning.lora.adapted_module import AdaptedModule
from lora_lightning.lora.module_tree import join, walk
from lora_lightning.model.probing import difference, floats, preserved
from lora_lightning.training.prefix_cache.cut import Cut, Run, Stop, intercepted
from lora_lightning.training.prefix_cache.store import CONSTANTS, Inputs


def find_cut(root: nn.Module, inputs: Inputs, eval_prefix: bool) -> Cut:
    """The innermost cut that passes the checks, or `ConfigError`; modes and random numbers stay."""
    problem = f"this forward of {type(root).__name__} uses nothing that is trained"
    with torch.inference_mode(False), torch.no_grad(), forked_rng(0):
        for path in _around_first_trained(root, inputs.rows(range(inputs.size))):
            cut = Cut(root, path, eval_prefix)
            try:
                with preserved(root):
                    problem = _problem(cut, inputs)
            except Exception as error:  # whatever a model may say to NaN, or to other items
                problem = f"a trial forward ended in {type(error).__name__}: {error}"
            torch.clear_autocast_cache()  # casts made here know no gradient
            if not problem:
                return cut
    raise ConfigError(f"PrefixCache: {problem}. Switch that off, or leave PrefixCache out")


def _around_first_trained(root: nn.Module, inputs: Inputs) -> list[str]:
    """Members of lists, innermost first, that run when the first trained module is called."""
    paths = {module: path for path, module in walk(root) if path}
    running: list[str] = []

    def around(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        running.append(paths[module])
        if _trained(module):
            raise Stop
        out = forward(*args, **kwargs)
        running.pop()
        return out

    try:
        with preserved(root), intercepted(paths, around):
            root.forward(*inputs.args, **inputs.kwargs)
    except Stop:
        lists = {p for p, m in walk(root) if isinstance(m, (nn.Sequential, nn.ModuleList))}
        return [p for p in running[::-1] if p.rpartition(".")[0] in lists] or running[:1]
    return []


def _trained(module: nn.Module) -> bool:
    attention = isinstance(module, nn.MultiheadAttention)  # which calls none of its children
    own = module.parameters() if attention else module._parameters.values()
    factors = module.lora.parameters() if isinstance(module, AdaptedModule) else ()
    return any(p is not None and p.requires_grad for p in (*own, *factors))


class Trial:
    """A forward for a look: what the block is given, the outputs, the generator's state."""

    def __init__(self, cut: Cut, inputs: Inputs, seed: int = 0, stop: bool = False, **options: Any):
        def keep(given: list[Any]) -> None:
            self.given = tree_map_only(Tensor, torch.clone, given)
            if stop:
                raise Stop

        set_seed(seed)
        self.run, self.out = Run(keep, **options), []
        with suppress(Stop), cut.running(self.run):
            out = cut.root.forward(*inputs.args, **inputs.kwargs)
            self.out = [*floats(out), *tree_leaves(out)]  # integers too, dataclasses too
        self.drawn = rng_states()
        if not self.run.entered:
            raise cut.astray()


def _problem(cut: Cut, inputs: Inputs) -> str:
    """Why the cut cannot be used, by forwards with, without and with other items."""
    size = inputs.size
    batch, more = inputs.rows(range(size)), inputs.rows([0, *range(size)])  # the longest stays
    if (first := more.leaves[more.batched[0]]).is_floating_point():
        first[0] *= 8  # so that a scale taken from the batch is another
    plain = Trial(cut, batch)
    if batch.keys() != inputs.keys():
        return "the model writes into its input, of which it should take a copy"
    behind = {m for module in plain.run.late for m in module.modules()} - plain.run.early
    cut.before = [(p, m) for p, m in cut.before if m not in behind]
    if why := obstacle(cut):
        return why
    with preserved(cut.root), torch.enable_grad():
        cut.root.eval()
        other = Trial(cut, more, seed=1, stop=True)
    if any(isinstance(x, Tensor) and x.requires_grad for x in other.given):
        return f"something that is trained has a say in what {cut.path} is given (a table?)"
    pairs = list(zip(plain.given, other.given, strict=True))
    cut.dims = [_dim(x, y, size) for x, y in pairs]
    weights = [p for m, *_ in plain.run.layout[:-1] for p in m.parameters() if p.ndim > 1]
    if not weights or all(dim is None for dim in cut.dims):
        return f"no layer comes before {cut.path}, the first block that is trained"
    records, also = cut.split(plain.given, size), cut.split(other.given, size + 1)
    shared = all(same([x], [y]) for (x, y), d in zip(pairs, cut.dims, strict=True) if d is None)
    again = Trial(cut, batch, seed=1, stop=True)
    steady = all(map(torch.equal, floats(plain.given), floats(again.given)))
    if not steady or not shared or not all(map(same, records, also[1:])):
        cure = "" if cut.eval_prefix else " (PrefixCache(eval_prefix=True) computes it there)"
        return (
            f"what {cut.path} is given for an item is random, is another in eval mode{cure}, or "
            "depends on the other items (batch statistics, or a batch dimension that is not the "
            "first)"
        )
    served = Trial(cut, batch, records=records, layout=plain.run.layout)
    if not all(map(torch.equal, plain.drawn, served.drawn)):
        return "modules before the first trained block draw random numbers"
    if same([*plain.given, *plain.out], [*served.given, *served.out]):
        return ""
    return (
        "the model's output is another with stored features, as what comes before the cut is used "
        "past it as well (skip connections, feature pyramids, a tensor left in an attribute)"
    )


def _dim(value: Any, other: Any, size: int) -> int | None:
    if not isinstance(value, Tensor) or value.ndim != other.ndim:
        return None
    pairs = enumerate(zip(value.shape, other.shape, strict=True))
    growing = [i for i, (a, b) in pairs if a * (size + 1) == b * size]  # with one item more
    return growing[0] if len(growing) == 1 else None


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether tensors are the same, on any device, but for rounding: half the digits must agree.

    Digits of the products: features in float32 have fewer under autocast, or TF32.
    """
    for x, y in [pair for pair in zip(a, b, strict=True) if isinstance(pair[0], Tensor)]:
        comparable = x.is_floating_point() and (x.shape, x.dtype) == (y.shape, y.dtype)
        most = rounding(x) ** 0.5 if comparable else 0.0
        y = y.to(x.device)
        if not torch.equal(x, y) and not (comparable and difference([y], [x]) <= most):
            return False
    return True


def obstacle(cut: Cut) -> str:
    """What is random, moves or is looked at before a cut; "" where nothing is."""
    for path, module in cut.around:
        state = vars(module)
        if any("checkpoint" in name and value is True for name, value in state.items()):
            return f"activations of {path or 'the model'} are checkpointed"
        if module.training and state.get("layer_drop"):
            return f"{join(path, 'layer_drop')} drops whole layers at random"
    for path, module in (*cut.before, *cut.around[1:]):
        before = [type(h).__module__ for h in module._forward_pre_hooks.values()]
        if module._forward_hooks or not all(name.startswith("torch.nn.utils") for name in before):
            return f"{path} has a hook, which would see no features"
    for path, module in () if cut.eval_prefix else cut.before:
        rate = vars(module).get("p" if "Dropout" in type(module).__name__ else "drop_prob")
        why = f"drops with probability {rate:g}" if rate else ""
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            why = "is in training mode: its statistics move"
        if why and module.training:
            kind = type(module).__name__
            return f"{path} ({kind}) {why}: PrefixCache(eval_prefix=True) computes it in eval mode"
    return ""


class Watch:
    """Notes what features depend on: weights, classes, adapters, attributes before the cut."""

    def __init__(self, cut: Cut):
        self._modules = [m for _, m in (*cut.before, *cut.around)]
        self._before = cut.before
        self._training = {m for m in self._modules if m.training}  # the check saw eval mode too
        self._noted, self._sums, self._differs = self._now(), self._checksums(), False

    def changed(self, look: bool) -> bool:
        """Whether anything is another; `look` at values: ``.data``, fused steps do not count."""
        structure, versions = self._now()
        if look or versions != self._noted[1] or any(x.grad is not None for x in self._frozen()):
            self._noted, self._differs = (self._noted[0], versions), self._checksums() != self._sums
        return self._differs or structure != self._noted[0]

    def _frozen(self) -> list[Tensor]:
        tables = (t for m in self._modules for t in (m._parameters, m._buffers))
        return [x for t in tables for x in t.values() if x is not None and not x.requires_grad]

    def _now(self) -> tuple[Any, Any]:
        tensors, plain = self._frozen(), [item for _, m in self._before for item in vars(m).items()]
        kinds = [(type(m), vars(m).get("lora_active"), *m._modules.values()) for m in self._modules]
        numbers = [(n, x) for n, x in plain if isinstance(x, CONSTANTS) and n != "training"]
        unseen = {m for m in self._modules if m.training} - self._training
        structure = kinds, numbers, unseen, [(x.dtype, x.device, x.shape) for x in tensors]
        return structure, [(id(x), x.data_ptr(), x.is_inference() or x._version) for x in tensors]

    def _checksums(self) -> list[int]:
        rows = (x.detach().cpu().contiguous().reshape(-1) for x in self._frozen())
        return [zlib.crc32(bytes(x.view(torch.uint8).numpy())) for x in rows]
