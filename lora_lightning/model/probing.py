"""Running a model to examine it, and restoring its state afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.linalg.torch_settings import forked_rng, rounding, without_cudnn
from lora_lightning.lora.adapted_module import located, raw_tensor
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.precision import floating
from lora_lightning.lora.sharding import assign, whole
from lora_lightning.model.calling import Forward, call

# Attributes by which timm and torchaudio drop whole paths or layers at random.
_RATES = ("drop_prob", "layer_drop", "drop_path_rate", "drop_rate")


# Rounding error of a product → largest accepted difference, relative to the largest output.
_ACCEPTED = [(torch.finfo(torch.float64).eps, 1e-9), (torch.finfo(torch.float32).eps, 1e-4)]


def run(
    model: nn.Module, batch: Any, seed: int = 0, forward: Forward | None = None, whole: bool = False
) -> list[Tensor]:
    """The floating-point outputs of one forward (`whole`: all), random numbers drawn from `seed`.

    `batch` is called as `lora_lightning.model.calling` says, or by `forward`.
    """
    with forked_rng(seed):
        return list(floats((forward or call)(model, batch), whole))


def floats(output: Any, whole: bool = False) -> Iterator[Tensor]:
    """Every floating-point tensor in a model's output, complex ones as pairs of reals.

    With `whole`, integers and texts too.
    """
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
        elif output.is_complex():
            yield torch.view_as_real(output)
        elif whole:
            yield output.double()
    elif whole and isinstance(output, (str, int, float)):
        yield torch.tensor([float(ord(c)) for c in str(output)], device="cpu")
    else:
        for part in _parts(output):
            yield from floats(part, whole)


def _parts(output: Any) -> Iterable[Any]:
    if isinstance(output, Mapping):
        return output.values()
    if isinstance(output, (tuple, list, Iterator)):
        return output
    if isinstance(output, (type, nn.Module)):
        return ()
    if dataclasses.is_dataclass(output):
        return [getattr(output, f.name) for f in dataclasses.fields(output)]
    owns = [vars(c).get("__slots__", ()) for c in type(output).__mro__]
    slots = [s for own in owns for s in ([own] if isinstance(own, str) else own)]
    found = [*getattr(output, "__dict__", {}).values(), *(getattr(output, s, None) for s in slots)]
    return [x for x in found if isinstance(x, (Tensor, list, tuple, Mapping))]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore modes, buffers, gradients and what is trained at the end of the block."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    for parameter, *_ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, value in buffers:
            buffer.data.copy_(value)
        for parameter, gradient, trained in parameters:
            parameter.grad = gradient
            parameter.requires_grad_(trained)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the block; `preserved` otherwise."""
    with preserved(model):
        model.eval()
        yield


@contextmanager
def without_cudnns_rnn(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block cuDNN is off if any of these modules is a recurrent layer.

    Of cuDNN's no product can be observed, and there is no backward pass in eval mode.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in modules)
    with without_cudnn() if recurrent else nullcontext():
        yield


@contextmanager
def training_only(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block exactly these parameters require a gradient."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def without_noise(model: nn.Module, training: bool) -> Iterator[None]:
    """Training (or eval) mode without dropout, stochastic depth or updates of statistics."""
    modes = [(m, m.training) for m in model.modules()]
    model.train(training)
    rates = []
    for module in model.modules():
        if isinstance(module, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)):
            module.eval()
        for key in _RATES:
            rate = module.__dict__.get(key)
            if isinstance(rate, float):
                rates.append((module, key, rate))
                setattr(module, key, 0.0)
    try:
        yield
    finally:
        for module, key, rate in rates:
            setattr(module, key, rate)
        for module, mode in modes:
            module.training = mode


def loss_in_eval(model: nn.Module, step: Callable[[], Any]) -> Any:
    """The loss that `step` computes with `model`, in eval mode.

    Where that gives none, as of a detector, which computes losses in training mode alone, in that
    mode, without noise.
    """
    try:
        loss = step()
    except Exception:  # of decisions, where it expects losses or logits, a step may say anything
        loss = None
    if isinstance(loss, Tensor) and (loss.requires_grad or not torch.is_grad_enabled()):
        return loss
    with without_noise(model, training=True):
        return step()


@contextmanager
def randomised(model: nn.Module, factors: dict[str, Factors]) -> Iterator[None]:
    """Within the block factors are random, their product about a tenth of each weight."""
    kept = {p: {k: v.detach().clone() for k, v in f.named_parameters()} for p, f in factors.items()}
    flags = [(p, p.requires_grad) for f in factors.values() for p in f.parameters()]
    try:
        for f in factors.values():
            f.require_grad()
        randomise(model, factors, seed=0)
        yield
    finally:
        with torch.no_grad():
            for path, f in factors.items():
                for key, parameter in f.named_parameters():
                    parameter.data.copy_(kept[path][key])
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        torch.clear_autocast_cache()


@torch.no_grad()
def randomise(model: nn.Module, factors: dict[str, Factors], seed: int, part: float = 0.1) -> None:
    """Draw all factors again, each ΔW scaled to this part of its weight's norm."""
    generator = torch.Generator().manual_seed(seed)
    torch.clear_autocast_cache()  # it holds casts of what they were
    for path, f in factors.items():
        raw = floating(whole(raw_tensor(*located(model, path))))
        for parameter in f.matrices():
            drawn = torch.randn(parameter.shape, generator=generator, device="cpu")
            assign(parameter, drawn)
        size = f.delta(raw.shape).norm()
        norm = raw.norm() if raw.any() else raw.new_tensor(0.1 * raw.numel() ** 0.5)
        goal = part * norm
        if size > 0:
            assign(parameter, whole(parameter) * (goal.to(size.device) / size))
        if f.magnitude is not None:
            drawn = torch.rand(f.magnitude.shape, generator=generator, device="cpu")
            assign(f.magnitude, whole(f.magnitude) * (1 + 0.05 * drawn.to(f.magnitude.device)))


@contextmanager
def roundings(modules: Iterable[nn.Module]) -> Iterator[list[float]]:
    """The relative rounding errors of these modules' products, in whatever autocast they run."""
    found: list[float] = []

    def note(module: nn.Module, inputs: Any) -> None:
        found.extend(rounding(p) for p in module.parameters() if p.is_floating_point())

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def accepted(model: nn.Module, outputs: Iterable[Tensor], known: Iterable[float]) -> float:
    """The largest `difference` of outputs that rounding explains.

    A bfloat16 model may well give float32: what its parameters are in counts too, and what is known
    of its layers.
    """
    tensors = [t for t in (*outputs, *model.parameters()) if t.is_floating_point()]
    coarsest = max([*known, *map(rounding, tensors)], default=0.0)
    return next((limit for eps, limit in _ACCEPTED if coarsest <= eps), 5e-2)


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest |a − b| over the outputs, relative to the largest |b| of the same output.

    Where both are infinite alike (HuBERT's masked logits) they do not differ; of other numbers or
    shapes they differ without limit.
    """
    if [x.shape for x in a] != [y.shape for y in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.numel():
            size = y.detach().abs()
            finite = size.masked_fill(size.isinf(), 0.0).max()
            scale = finite.clamp_min(torch.finfo(y.dtype).tiny)
            error = float(((x - y).masked_fill(x == y, 0.0).abs().max() / scale).detach())
            worst = error if error > worst or error != error else worst
    return worst
