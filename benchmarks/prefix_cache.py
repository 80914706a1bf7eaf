"""Speed-up of epochs by `PrefixCache`, with a comparison of the loss curves.

    python benchmarks/prefix_cache.py --out
    python benchmarks/prefix_cache.py --models vit_tiny --items 16 --epochs 3

Each network is trained twice by the same Trainer, with and without the cache, from the same seed,
on the same random items in the same shuffled order, with rank 8 in the last third of its blocks;
runs alternate, `--repeats` times. An epoch's seconds are the median over the epochs after the
first. The bound is what an epoch without the cache takes, over that less the prefix's forward
passes, which are timed on their own: no cache of features can do more.
`--look` adds a pass over all items in eval mode after each epoch, as `TransductiveTask` makes.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import machine
import timm
import torch
from cases import wav2vec2
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoRACallback, PrefixCache, inject
from lora_lightning.model.probing import floats
from lora_lightning.runner.progress import quiet_lightning
from lora_lightning.training.prefix_cache.check import Trial
from lora_lightning.training.prefix_cache.store import Inputs

CLASSES = 10
GOAL = 3.0


def images(items: int) -> Tensor:
    return torch.randn(items, 3, 224, 224)


def recordings(items: int) -> Tensor:
    return torch.randn(items, 16_000)


def vision(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES)


class Conformer(nn.Module):
    """Twelve layers of width 144 on 80 features, a frame each 40 ms of 8 seconds."""

    def __init__(self) -> None:
        super().__init__()
        from torchaudio.models import Conformer as Encoder

        self.front = nn.Linear(80, 144)
        self.encoder = Encoder(144, 4, 576, 12, 31)
        self.head = nn.Linear(144, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Frames (B, T, 80) → logits (B, classes)."""
        out, _ = self.encoder(self.front(x), torch.full((len(x),), x.shape[1]))
        logits: Tensor = self.head(out.mean(1))
        return logits


def frames(items: int) -> Tensor:
    return torch.randn(items, 200, 80)


# name → (network, items, what to adapt: the last third of the blocks)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], dict[str, Any]]] = {
    "vit_tiny": (vision("vit_tiny_patch16_224"), images, {"blocks": [8, 9, 10, 11]}),
    "vit_tiny, MLP": (
        vision("vit_tiny_patch16_224"),
        images,
        {"blocks": [8, 9, 10, 11], "target_modules": ["fc1", "fc2"]},
    ),
    "convnext_atto": (
        vision("convnext_atto"),
        images,
        {"target_modules": ["stages.2.blocks.[45].mlp.fc?", "stages.3.blocks.*.mlp.fc?"]},
    ),
    "efficientnet_lite0": (
        vision("tf_efficientnet_lite0"),
        images,
        {"target_modules": ["blocks.[56].*conv_pw*"]},
    ),
    "resnet18": (vision("resnet18"), images, {"target_modules": ["layer4.*.conv?"]}),
    "wav2vec2_base": (lambda: wav2vec2(CLASSES), recordings, {"blocks": [8, 9, 10, 11]}),
    "conformer": (
        Conformer,
        frames,
        {"target_modules": [r"re:encoder\.conformer_layers\.([89]|1\d)\..*ffn.*"]},
    ),
}


class Task(LightningModule):
    """Cross-entropy, and its course."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch; frames are averaged."""
        x, y = batch
        logits = next(floats(self.model(x)))
        if logits.ndim == 3:
            logits = logits.mean(1)
        loss = nn.functional.cross_entropy(logits, y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what is trained."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Clock(Callback):
    """Seconds and processor seconds of each epoch."""

    def __init__(self, items: Tensor, look: int) -> None:
        self.items, self.look = items, look
        self.wall: list[float] = []
        self.processor: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self.start = time.perf_counter(), time.process_time()

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at all items, where that is asked for, and stop the clock."""
        if self.look:
            pl_module.eval()
            for batch in self.items.split(self.look):
                pl_module.model(batch)
            pl_module.train()
        self.wall.append(time.perf_counter() - self.start[0])
        self.processor.append(time.process_time() - self.start[1])


def train(
    name: str, x: Tensor, given: argparse.Namespace, cache: PrefixCache | None, folder: str
) -> tuple[Clock, list[float]]:
    """One fit: the clock and the losses."""
    make, _, targets = MODELS[name]
    torch.manual_seed(0)
    task = Task(make())
    task.model.train()
    y = torch.arange(len(x)) % CLASSES
    data = DataLoader(TensorDataset(x, y), batch_size=given.batch, shuffle=True)
    clock = Clock(x, 2 * given.batch if given.look else 0)
    adapter = LoRACallback(
        rank=8, seed=0, output_dir=folder, log_spectrum=False, verify=False, **targets
    )
    callbacks = [adapter, *([] if cache is None else [cache]), clock]
    torch.manual_seed(1)
    with quiet_lightning(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            max_epochs=given.epochs, accelerator="cpu", logger=False, callbacks=callbacks,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(task, data)  # fmt: skip
    return clock, task.losses


def compare(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """A row: with and without."""
    torch.manual_seed(2)
    x = MODELS[name][1](given.items)
    without: list[Clock] = []
    with_cache: list[Clock] = []
    worst = 0.0
    with TemporaryDirectory() as folder:
        for _ in range(given.repeats):
            clock, losses = train(name, x, given, None, folder)
            without.append(clock)
            cache = PrefixCache(given.budget, given.folder)
            clock, cached = train(name, x, given, cache, folder)
            with_cache.append(clock)
            worst = max(worst, *(abs(a - b) for a, b in zip(losses, cached, strict=True)))
    prefix = prefix_seconds(name, x, given)
    row: dict[str, Any] = {"model": name, "before": cache.boundary_}
    row |= {"items": cache.items_, "MB": cache.megabytes_, "hit rate": cache.hit_rate_}
    for kind in ("wall", "processor"):
        plain = [s for clock in without for s in getattr(clock, kind)[1:]]
        later = [s for clock in with_cache for s in getattr(clock, kind)[1:]]
        first = [getattr(clock, kind)[0] for clock in with_cache]
        row[f"{kind} s without"], row[f"{kind} s after"] = median(plain), median(later)
        row[f"{kind} s first"] = median(first)
        row[f"{kind} speed-up"] = median(plain) / median(later)
        row[f"{kind} speed-up, least"] = min(plain) / min(later)
        row[f"{kind} bound, least"] = min(plain) / (min(plain) - prefix[kind])
    return row | {"largest difference of losses": worst, "final loss": losses[-1]}


def prefix_seconds(name: str, x: Tensor, given: argparse.Namespace) -> dict[str, float]:
    """What the prefix's forward passes of an epoch take, the least of three times."""
    make, _, targets = MODELS[name]
    model = make().eval()  # no dropout, and BatchNorm as LoRACallback keeps it
    inject(model, rank=8, **targets)
    with PrefixCache(given.budget).attach(model) as cache:
        model(x[: given.batch])
        assert cache._cut is not None
        cut, times = cache._cut, []
        for _ in range(3):
            start = time.perf_counter(), time.process_time()
            for batch in x.split(2 * given.batch) if given.look else ():
                Trial(cut, Inputs((batch,), {}), stop=True)
            for batch in x.split(given.batch):
                Trial(cut, Inputs((batch,), {}), stop=True)
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {"wall": min(t[0] for t in times), "processor": min(t[1] for t in times)}


def setting(given: argparse.Namespace) -> dict[str, Any]:
    """Sizes, versions, hardware."""
    sizes = {name: getattr(given, name) for name in ("batch", "epochs", "repeats", "look")}
    return sizes | {"threads": torch.get_num_threads()} | machine.setting("torchaudio")


def show(row: dict[str, Any]) -> None:
    """A few lines."""
    print(f"{row['model']}: features before {row['before']}, {row['items']} items, "
          f"{row['MB']:.1f} MB, hit rate {row['hit rate']:.0%}")  # fmt: skip
    for kind in ("wall", "processor"):
        print(f"  {kind:9s} {row[f'{kind} s without']:.2f} s an epoch without, "
              f"{row[f'{kind} s first']:.2f} the first, {row[f'{kind} s after']:.2f} later: "
              f"{row[f'{kind} speed-up']:.2f} times as fast (of the least: "
              f"{row[f'{kind} speed-up, least']:.2f}, bound "
              f"{row[f'{kind} bound, least']:.2f})")  # fmt: skip
    met = "met" if row["wall speed-up"] >= GOAL else "MISSED"
    print(f"  goal, {GOAL:g} times: {met}; largest difference of losses "
          f"{row['largest difference of losses']:.1e}", flush=True)  # fmt: skip


def main() -> None:
    """Measure, show, save where asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=1024, help="megabytes")
    parser.add_argument("--folder", default=None, help="store in a file there")
    parser.add_argument("--look", action="store_true", help="an eval pass after each epoch")
    parser.add_argument("--out", action="store_true", help="write a dated CSV to results/")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    where = setting(given)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    rows = []
    for name in given.models:
        rows.append(compare(name, given))
        show(rows[-1])
    if given.out:
        title = "prefix-cache-look" if given.look else "prefix-cache"
        print(f"saved {machine.save(title, rows, where)}")


if __name__ == "__main__":
    main()
