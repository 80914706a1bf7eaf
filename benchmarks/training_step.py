"""What does an adapter cost above the frozen model? A training step, memory, and inference.

    python benchmarks/training_step.py                        # all models, about 25 minutes
    python benchmarks/training_step.py --models vit_tiny --rounds 5
    python benchmarks/training_step.py --out                  # writes a dated CSV

The floor is the frozen model: its forward pass, and the backward pass for activations from the
output down to the first adapted layer, without any weight's gradient. Above it: this library,
PEFT with the same layers and rank (extra `bench`), and full fine-tuning; a step of these three
holds AdamW's step as well. All run in one process, in turns, on the same batch; reported are the
medians over rounds of each round's ratio to the floor, with the quartiles. `saved` is what the
graph holds between forward and backward, parameters and input left out; `peak` is the largest
resident size of a process that does nothing but five steps, less that of one that stops before
them. Inference is in eval mode, without gradients, over the base's.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.metadata
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from startup import setting
from torch import Tensor, nn

import lora_lightning
from lora_lightning import inject, merge

RESULTS = Path(__file__).parent / "results"
VARIANTS = ("floor", "ours", "ours, frozen A", "peft", "full")


@dataclass(frozen=True)
class Case:
    """A model, a batch, and the layers that are adapted, as a regular expression."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    layers: str
    out: Callable[[Any], Tensor] = lambda y: y


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10)

    return build


def _wav2vec2() -> nn.Module:
    from torchaudio.models import wav2vec2_base

    return wav2vec2_base(
        encoder_projection_dropout=0.0,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_drop=0.0,
    )


class _Conformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torchaudio.models import Conformer

        self.body = Conformer(256, 4, 1024, 8, 31)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x, torch.full((len(x),), x.shape[1]))[0]
        return out


def _pictures(count: int, size: int = 224) -> Callable[[], Tensor]:
    return lambda: torch.rand(count, 3, size, size)


VIT = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
CASES = {
    "vit_tiny": Case(_timm("vit_tiny_patch16_224"), _pictures(16), VIT),
    "vit_small": Case(_timm("vit_small_patch16_224"), _pictures(8), VIT),
    "convnext_atto": Case(_timm("convnext_atto"), _pictures(16), r".*\.mlp\.fc[12]"),
    "efficientnet_lite0": Case(
        _timm("tf_efficientnet_lite0"),
        _pictures(16),
        r"blocks\..*\.(conv_pw|conv_pwl)",
    ),
    "wav2vec2_base": Case(
        _wav2vec2,
        lambda: torch.randn(4, 32000),
        r".*layers\.\d+\.(attention\.\w+_proj|feed_forward\.\w+_dense)",
        lambda y: y[0],
    ),
    "conformer": Case(
        _Conformer, lambda: torch.randn(8, 400, 256), r".*\.ffn[12]\.sequential\.[14]"
    ),
}


def names(model: nn.Module, case: Case) -> list[str]:
    """The layers that are adapted."""
    return [n for n, _ in model.named_modules() if re.fullmatch(case.layers, n)]


def variant(name: str, case: Case, rank: int, dropout: float) -> nn.Module:
    """The model as this variant trains it; the same weights for all."""
    torch.manual_seed(0)
    model = case.build()
    layers = names(model, case)
    if name == "floor":
        model.requires_grad_(False)
        model.get_submodule(layers[0]).register_forward_pre_hook(
            lambda _, args: (args[0].detach().requires_grad_(torch.is_grad_enabled()),)
        )
    elif name.startswith("ours"):
        frozen = name.endswith("frozen A")
        inject(
            model,
            rank=rank,
            alpha=rank,
            target_modules=layers,
            trainable=[],
            dropout=dropout,
            freeze_a=frozen,
        )
    elif name == "peft":
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, lora_dropout=dropout)
        inject_adapter_in_model(config, model)
    return freeze_statistics(model.train())


def freeze_statistics(model: nn.Module) -> nn.Module:
    """BatchNorm in eval mode and dropout off, in every variant."""
    for path, module in model.named_modules():
        if "BatchNorm" in type(module).__name__ or (
            isinstance(module, nn.Dropout) and "lora" not in path  # PEFT's own
        ):
            module.eval()
    return model


def stepper(model: nn.Module, case: Case, batch: Tensor) -> Callable[[], None]:
    """One training step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        case.out(model(batch)).square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def saved_bytes(model: nn.Module, case: Case, batch: Tensor) -> int:
    """What the graph of a forward pass holds, parameters, buffers and the batch left out."""
    own = [*model.parameters(), *model.buffers(), batch]
    known = {t.untyped_storage().data_ptr() for t in own}
    loss = case.out(model(batch)).square().mean()
    todo, seen, total = [loss.grad_fn], set(), 0
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
        kept = [getattr(node, a) for a in dir(node) if a.startswith("_saved_")]
        kept += list(getattr(node, "saved_tensors", ()))
        for tensor in kept:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                known.add(tensor.untyped_storage().data_ptr())
                total += tensor.untyped_storage().nbytes()
    return total


def _peak(name: str, key: str, rank: int, threads: int, steps: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    case = CASES[key]
    model, batch = variant(name, case, rank, 0.0), case.batch()
    step = stepper(model, case, batch)
    for _ in range(steps):
        step()
    # Not getrusage's: it starts from what the parent process had.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    queue.put(1024 * int(re.findall(r"VmHWM:\s*(\d+)", status)[0]))


def peak_bytes(name: str, key: str, rank: int, threads: int) -> int:
    """Of the steps alone."""
    context = multiprocessing.get_context("spawn")
    found = []
    for steps in (0, 5):
        queue = context.Queue()
        process = context.Process(target=_peak, args=(name, key, rank, threads, steps, queue))
        process.start()
        found.append(queue.get())
        process.join()
    return found[1] - found[0]


def in_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round; the order turns, so that nobody always follows another."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(rounds + 1):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            start = time.perf_counter()
            steps[name]()
            if number:  # the first round warms up
                found[name].append(time.perf_counter() - start)
    return found


def inference(case: Case, batch: Tensor, rank: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a forward pass by the base, unmerged and merged adapters."""
    torch.manual_seed(0)
    base = case.build().eval()
    models = {"base": base, "ours": variant("ours", case, rank, 0.0).eval()}
    models["ours merged"] = copy.deepcopy(models["ours"])
    merge(models["ours merged"])
    if "peft" in available():
        models["peft"] = variant("peft", case, rank, 0.0).eval()
    with torch.no_grad():
        return in_turns({n: lambda m=m: m(batch) for n, m in models.items()}, rounds)


def available() -> tuple[str, ...]:
    """The variants that can be measured here."""
    try:
        importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return tuple(v for v in VARIANTS if v != "peft")
    return VARIANTS


def ratios(times: dict[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Lower quartile, median, upper quartile of each round's ratio to the base's."""
    found = {}
    for name, own in times.items():
        each = [a / b for a, b in zip(own, times[base], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4)
        found[name] = (low, middle, high)
    return found


def measure(key: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one model."""
    case, rows = CASES[key], []
    batch = case.batch()
    variants = [v for v in available() if v in given.variants]
    models = {v: variant(v, case, given.rank, given.dropout) for v in variants}
    times = in_turns({v: stepper(m, case, batch) for v, m in models.items()}, given.rounds)

    def say(what: str, name: str, value: float, low: float = 0, high: float = 0) -> None:
        rows.append(
            {"model": key, "measure": what, "variant": name, "value": round(value, 4),
             "lower": round(low, 4), "upper": round(high, 4)}
        )  # fmt: skip
        print(f"{key:20} {what:14} {name:12} {value:9.3f}   {low:.3f} to {high:.3f}", flush=True)

    for name, (low, middle, high) in ratios(times, "floor").items():
        say("step", name, middle, low, high)
        say("step, ms", name, 1e3 * statistics.median(times[name]))
    for name, model in models.items():
        say("saved, MiB", name, saved_bytes(model, case, batch) / 2**20)
    del models
    if given.inference:
        for name, (low, middle, high) in ratios(
            inference(case, batch, given.rank, given.rounds), "base"
        ).items():
            say("inference", name, middle, low, high)
    if given.peak:
        for name in variants:
            say("peak, MiB", name, peak_bytes(name, key, given.rank, given.threads) / 2**20)
    return rows


def main() -> None:
    """Measure and print; with --out, keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-inference", dest="inference", action="store_false")
    parser.add_argument("--no-peak", dest="peak", action="store_false")
    parser.add_argument("--no-recompute", dest="recompute", action="store_false")
    parser.add_argument("--out", action="store_true", help="write a dated CSV")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(
        f"torch {torch.__version__}, {given.threads} threads, rank {given.rank}, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    rows = []
    with lora_lightning.fused(recompute=given.recompute):
        for key in given.models:
            rows += measure(key, given)
    if given.out:
        options = ("rank", "dropout", "threads", "rounds")
        write("training-step", rows, {name: getattr(given, name) for name in options})


def write(name: str, rows: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """A dated CSV whose columns tell options, versions and hardware."""
    where = {**options, **setting("torchaudio", "peft")}
    path = RESULTS / f"{where['date']}-{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        writer.writerows([{**row, **where} for row in rows])
    print(path)


if __name__ == "__main__":
    main()
