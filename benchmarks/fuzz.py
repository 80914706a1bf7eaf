"""Mutated files, through every way in which files are read.

    python benchmarks/fuzz.py                # 3,000 adapter files and 300 recogniser's files
    python benchmarks/fuzz.py --files 300 --recognisers 0 --no-save

Each adapter file is a real one in which one thing was changed: bits, bytes, its length, a value of
the header (of another type, out of range, not finite, repeated 20,000 times, removed), a tensor
(NaN, infinite, of another type or shape, removed, added, renamed), or the container around them.
Half of the changes to header and tensors are *signed*, with the checksum that belongs to them, as
of somebody who means harm; what they say is checked all the same. Each goes through `load_adapter`
(onto a base, and in another adapter's place), `AdapterBank`, ``inspect``, and ``merge`` or
``transcribe`` as the command line runs them.

Counted: exceptions that are not ours; models that a refused file has changed, in any bit; accepted
files of damaged data (without a valid signature, and with another output than the original's; with
NaN or infinity in any case); the slowest call, in processor time; the most memory above that before
the first file. Goal: 0, 0, 0, under 5 s, under 1 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import random
import resource
import sys
import tempfile
import time
import wave
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from machine import save as save_figures
from machine import setting
from mutants import Files
from torch import nn

from lora_lightning import AdapterBank, inject, load_adapter, save_adapter
from lora_lightning.cli import main as command
from lora_lightning.errors import LoRALightningError
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.recognisers import (
    ConformerCTC,
    load_recogniser,
    save_recogniser,
)


class Fuzz:
    """Calls on mutants, and what came of them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.slowest = (0.0, "")  # seconds of the processor, and of what
        self.faults: list[str] = []
        self._memory = _peak()

    @property
    def memory(self) -> float:
        """Most megabytes above those at the start."""
        return _peak() - self._memory

    def row(self) -> dict[str, Any]:
        """The figures."""
        kinds = ("files", "calls", "accepted", "foreign exceptions", "changed models")
        return {
            **{kind: self.counts[kind] for kind in (*kinds, "accepted damage")},
            "slowest call, s": round(self.slowest[0], 2),
            "which": self.slowest[1],
            "memory, MB": round(self.memory),
        }

    def call(self, what: str, mutant: str, work: Callable[[], Any]) -> bool:
        """Whether it was accepted."""
        start, accepted = time.process_time(), False
        try:
            accepted = work() in (None, 0) or True
        except LoRALightningError:
            pass
        except BaseException as error:
            self.fault("foreign exceptions", f"{what}, {mutant}: {error!r:.300}")
            if isinstance(error, KeyboardInterrupt):
                raise
        self.slowest = max(self.slowest, (time.process_time() - start, f"{what}, {mutant}"))
        self.counts["calls"] += 1
        self.counts["accepted"] += accepted
        return accepted

    def fault(self, kind: str, text: str) -> None:
        """Count one, and keep what it was."""
        self.counts[kind] += 1
        self.faults.append(f"{kind}: {text}")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def exactly(model: nn.Module) -> list[Any]:
    """The model's keys, values, flags and classes."""
    found: list[Any] = [[type(m).__name__ for m in model.modules()]]
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, value in values.items():
        found.append((key, value.requires_grad, value.detach().reshape(-1).view(torch.uint8).sum()))
    return found


class Quiet(contextlib.ExitStack):
    """No output of the command line."""

    def __enter__(self) -> Quiet:
        super().__enter__()
        self.enter_context(contextlib.redirect_stdout(io.StringIO()))
        self.enter_context(contextlib.redirect_stderr(io.StringIO()))
        return self


def cli(*arguments: object) -> int:
    """A command; an error of ours is raised, as its exit code says."""
    with Quiet():
        code = command([str(each) for each in arguments])
    if code == 2:
        raise LoRALightningError("said in a sentence")
    return code


def trained(model: nn.Module, path: Path, **options: Any) -> nn.Module:
    """The adapted model, and its file."""
    inject(model, seed=0, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    save_adapter(model, path)
    return model


class Pictures:
    """Adapters of a tiny timm network: load, bank, inspect, merge."""

    def __init__(self, folder: Path, draw: random.Random):
        torch.manual_seed(0)
        self.base = timm.create_model("test_efficientnet", num_classes=3).eval()
        self.weights, self.path = folder / "base.pt", folder / "picture.safetensors"
        torch.save(self.base.state_dict(), self.weights)
        other = copy.deepcopy(self.base)
        trained(other, folder / "other.safetensors", rank=1, name="other", dora=True)
        self.twin = other
        options = {"rank": 2, "target_modules": ["blocks.0.*", "conv_stem"], "trainable": ["head"]}
        source = trained(copy.deepcopy(self.base), self.path, **options)
        source.bn1.running_mean.add_(0.1)
        save_adapter(source, self.path)
        self.x = torch.randn(2, 3, 32, 32)
        self.files = Files(self.path, "lora_lightning", draw)
        with torch.no_grad():
            self.output = source(self.x)

    def run(self, fuzz: Fuzz, kind: str, signed: bool, path: Path) -> None:
        """One mutant through everything."""
        for what, base in (("load", self.base), ("overwrite", self.twin)):
            model = copy.deepcopy(base)
            before = exactly(model)
            name = None if what == "load" else "other"
            work = lambda m=model, n=name: load_adapter(m, path, n, overwrite=True)  # noqa: E731
            if fuzz.call(what, kind, work):
                self._judge(fuzz, f"{what}, {kind}", signed, model)
            elif str(exactly(model)) != str(before):
                fuzz.fault("changed models", f"{what}, {kind}")
        before, bank = exactly(self.base), AdapterBank(self.base, {"a": path})

        def mixed() -> None:
            with torch.no_grad(), bank["a"]:
                self._judge(fuzz, f"bank, {kind}", signed, self.base)

        fuzz.call("bank", kind, mixed)
        if str(exactly(self.base)) != str(before):
            fuzz.fault("changed models", f"bank, {kind}")
        fuzz.call("inspect", kind, lambda: cli("inspect", path))
        out = path.with_name("merged.safetensors")
        arguments = ("--model", "test_efficientnet", "--checkpoint", self.weights, "--out", out)
        fuzz.call("merge", kind, lambda: cli("merge", *arguments, "--adapter", path))

    @torch.no_grad()
    def _judge(self, fuzz: Fuzz, what: str, signed: bool, model: nn.Module) -> None:
        output = model(self.x)
        if not output.isfinite().all():
            fuzz.fault("accepted damage", f"{what}: not finite")
        elif not signed and not torch.allclose(output, self.output, atol=1e-4):
            fuzz.fault("accepted damage", f"{what}: another output")


class Speech:
    """Adapters of a tiny recogniser: load, inspect, transcribe; and files of the recogniser."""

    def __init__(self, folder: Path, draw: random.Random):
        torch.manual_seed(0)
        sizes = {"dim": 16, "num_layers": 1, "ffn_dim": 16, "channels": 2, "sample_rate": 8000}
        model = ConformerCTC(Labels.english(), n_mels=16, num_heads=2, **sizes).eval()
        self.model, self.sound = folder / "model.safetensors", folder / "a.wav"
        save_recogniser(model, self.model)
        with wave.open(str(self.sound), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(draw.randbytes(8000))
        trained(load_recogniser(self.model), folder / "speech.safetensors", rank=1)
        self.files = Files(folder / "speech.safetensors", "lora_lightning", draw)
        self.models = Files(self.model, "recogniser", draw)

    def run(self, fuzz: Fuzz, kind: str, signed: bool, path: Path) -> None:
        """One mutant through everything."""
        model = load_recogniser(self.model)
        before = exactly(model)
        if not fuzz.call("load", kind, lambda: load_adapter(model, path)):
            if str(exactly(model)) != str(before):
                fuzz.fault("changed models", f"load, {kind}")
        elif not all(t.isfinite().all() for t in model.state_dict().values()):
            fuzz.fault("accepted damage", f"load, {kind}: not finite")
        fuzz.call("inspect", kind, lambda: cli("inspect", path))
        arguments = ("--model", self.model, "--adapter", path, self.sound)
        fuzz.call("transcribe", kind, lambda: cli("transcribe", *arguments))

    def run_model(self, fuzz: Fuzz, kind: str, signed: bool, path: Path) -> None:
        """One mutant of the recogniser's own file."""

        def loaded() -> None:
            model = load_recogniser(path)
            if not all(t.isfinite().all() for t in model.state_dict().values()):
                fuzz.fault("accepted damage", f"recogniser, {kind}: not finite")

        fuzz.call("recogniser", kind, loaded)
        fuzz.call("transcribe", kind, lambda: cli("transcribe", "--model", path, self.sound))


def run(files: int, recognisers: int, seed: int, folder: Path) -> Fuzz:
    """Mutants of each sort, through all that reads them."""
    draw = random.Random(seed)
    pictures, speech = Pictures(folder, draw), Speech(folder, draw)
    path = folder / "mutant.safetensors"
    for source, through in ((pictures.files, pictures.run), (speech.files, speech.run)):
        path.write_bytes(source.data)  # what is imported once is not counted
        through(Fuzz(), "none", False, path)
    fuzz = Fuzz()
    for i in range(files + recognisers):
        if i >= files:
            source, through = speech.models, speech.run_model
        elif i % 2:
            source, through = speech.files, speech.run
        else:
            source, through = pictures.files, pictures.run
        try:
            kind, signed, data = source.mutant()
        except Exception as error:  # what cannot be written cannot be read
            fuzz.counts[f"not written: {type(error).__name__}"] += 1
            continue
        path.write_bytes(data)
        through(fuzz, kind, signed, path)
        fuzz.counts["files"] += 1
        if fuzz.counts["files"] % 50 == 0:
            print(fuzz.row(), file=sys.stderr, flush=True)
    return fuzz


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--recognisers", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fuzz = run(options.files, options.recognisers, options.seed, Path(folder))
    row = {**fuzz.row(), "seed": options.seed}
    for line in [*fuzz.faults[:40], *(f"{key}: {value}" for key, value in row.items())]:
        print(line)
    print({k: v for k, v in fuzz.counts.items() if k not in row})
    if not options.no_save:
        print(save_figures("fuzz", [row], setting("safetensors")))
    good = not fuzz.faults and fuzz.slowest[0] < 5 and fuzz.memory < 1000
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
