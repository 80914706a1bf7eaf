"""Frequency of harm by adaptation without labels, on targets that are chosen to provoke it.

    python benchmarks/do_no_harm.py --out runs/do_no_harm

Thirteen targets (twelve lights and the source's own) times eight conditions, 104 runs: ten times
as many pictures of one class as of another, 32 pictures, a learning rate ten times too high,
noise, pictures upside down, pictures cut into shuffled tiles, three of ten classes only, and
spectrograms of speech. Each method starts from the same source model. TENT, SHOT, NRC and plain
pseudo-labels stand beside ours, as their papers define them (`benchmarks.rivals`). A run does harm
if it ends more than one point below the source model: on the target's own items, or, where those
have no labels (noise, speech), on the next pictures of that light.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

try:  # from the repository's root, and as a script beside the other
    from benchmarks.rivals import Predictor, evaluated, nrc, pseudo, shot, tent
except ImportError:
    from rivals import Predictor, evaluated, nrc, pseudo, shot, tent

from lora_lightning import LoRACallback, TransductiveTask
from lora_lightning.runner.progress import quiet_lightning
from lora_lightning.speech.data.synthetic.spoken import spoken_set
from lora_lightning.speech.data.synthetic.voices import source_voices
from lora_lightning.vision.classifier import Classifier
from lora_lightning.vision.data.image_domains import ImageDomains
from lora_lightning.vision.data.synthetic.rendered import render_domains, worlds_of

SIZE = 64
CONDITIONS = (
    "imbalance", "few", "rate", "noise", "mirrored", "shuffled", "missing", "modality",
)  # fmt: skip
FIELDS = (
    "method", "target", "condition", "seed", "items", "source_items", "after_items", "source_next",
    "after_next", "seconds", "accepted", "end",
)  # fmt: skip


class Pictures(Dataset[Tensor]):
    """Pictures, augmented or not."""

    def __init__(self, pictures: Tensor, transform: Callable[[Tensor], Tensor]):
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.pictures[index])


class Data:
    """The rendered pictures of a kind of shift, as bytes, and the spectrograms.

    Of each class `learn` pictures of the source are to train on, `adapt` further ones of each
    domain to adapt to, and `test` held out.
    """

    def __init__(
        self, seed: int, cache: str | None, shift: str = "lighting",
        wanted: Sequence[str] | None = None, learn: int = 200, adapt: int = 30, test: int = 20,
    ):  # fmt: skip
        counts = {name: {"train": adapt, "test": test} for name in wanted or worlds_of(shift)}
        counts["source"] = {"train": learn + adapt, "test": test}
        side = ImageDomains(".", size=SIZE).stored_side
        root = render_domains(cache, counts, shift=shift, size=side, seed=seed)
        self.domains = ImageDomains(root, size=SIZE)
        self.domains.setup()
        self.targets = ["source", *self.domains.target]
        self.seed, self.side, self.learn = seed, side, learn

    def get(self, domain: str, split: str) -> tuple[Tensor, Tensor]:
        """Pictures (N, 3, S, S) as bytes, classes (N,); of the source, those it is trained on."""
        return self._of(domain, split, range(self.learn))

    def target(self, domain: str) -> tuple[Tensor, Tensor]:
        """The pictures to adapt to, and their classes."""
        # The last of each of the source's classes are the target that is no other domain.
        first = self.learn if domain == "source" else 0
        return self._of(domain, "train", range(first, 10_000))

    def _of(self, domain: str, split: str, inside: range) -> tuple[Tensor, Tensor]:
        d = self.domains
        items = [i for i in d.items if (i.domain, i.split) == (domain, split)]
        items = [i for i in items if int(i.path.stem) in inside]
        pictures = torch.stack([d._pictures[i.path] for i in items])
        return pictures, torch.tensor([d.classes.index(i.class_name) for i in items])

    def spectrograms(self, count: int, side: int) -> Tensor:
        """Log-mel pictures of speech, (N, 3, side, side)."""
        import torchaudio

        from lora_lightning.speech.data.audio import read_audio

        folder = spoken_set(speakers=source_voices(10), utterances=30, seed=self.seed)
        mel = torchaudio.transforms.MelSpectrogram(16000, n_mels=side)
        found = []
        for path in sorted(folder.glob("*/*.flac"))[:count]:
            logs = (mel(read_audio(path, 16000)) + 1e-6).log()
            grey = (logs - logs.min()) / (logs.max() - logs.min()) * 255
            found.append(F.interpolate(grey[None, None], (side, side))[0].expand(3, -1, -1))
        return torch.stack(found).to(torch.uint8)


def stressed(
    data: Data, domain: str, condition: str, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """The target under a condition; None in place of classes where there are none."""
    pictures, classes = data.target(domain)
    count = int(classes.max()) + 1
    order = torch.randperm(count, generator=generator).tolist()
    if condition == "imbalance":
        sizes = [round(30 * 10 ** (-k / (count - 1))) for k in range(count)]
        keep = [(classes == c).nonzero()[:n, 0] for c, n in zip(order, sizes, strict=True)]
    elif condition == "missing":
        keep = [(classes == c).nonzero()[:, 0] for c in order[:3]]
    elif condition == "few":
        keep = [torch.randperm(len(classes), generator=generator)[:32]]
    else:
        keep = [torch.arange(len(classes))]
    chosen = torch.cat(keep)
    pictures, classes = pictures[chosen], classes[chosen]
    if condition == "noise":
        noise = torch.randint(0, 256, pictures.shape, generator=generator, dtype=torch.uint8)
        return noise, None
    if condition == "modality":
        return data.spectrograms(len(pictures), data.side), None
    if condition == "mirrored":
        pictures = pictures.flip(2)
    if condition == "shuffled":
        pictures = torch.stack([_shuffled(p, generator) for p in pictures])
    return pictures, classes


def _shuffled(picture: Tensor, generator: torch.Generator, tiles: int = 4) -> Tensor:
    side = picture.shape[1] // tiles
    cut = picture[:, : side * tiles, : side * tiles]
    parts = cut.unfold(1, side, side).unfold(2, side, side).flatten(1, 2)
    parts = parts[:, torch.randperm(tiles**2, generator=generator)].unflatten(1, (tiles, tiles))
    found = picture.clone()
    found[:, : side * tiles, : side * tiles] = parts.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
    return found


# ---- methods: (model, unaugmented items, transform, learning-rate factor) → predict(pictures)


def ours(model: nn.Module, data: Data, pictures: Tensor, factor: float, out: Path) -> Any:
    """Information maximisation on factors, with the guard."""
    d = data.domains
    task = TransductiveTask(
        model,
        Pictures(pictures, d.test_transform),
        training=Pictures(pictures, d.train_transform),
        learning_rate=2e-3 * factor,
    )
    fit(task, out)
    return evaluated(model), task.rounds_


def fit(task: TransductiveTask, out: Path, epochs: int = 4, verify: bool = True) -> None:
    """Train the factors of `task` in what "auto" names, as recipes do without labels."""
    adapter = LoRACallback(
        rank=4,
        alpha=8.0,
        trainable=[],
        verify=verify,
        output_dir=out,
        log_spectrum=False,
    )
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[adapter],
    )  # fmt: skip
    with quiet_lightning():
        trainer.fit(task)


def rival(method: Callable[..., Predictor]) -> Callable[..., Any]:
    """One of `benchmarks.rivals`, called as `ours` is."""

    def called(model: nn.Module, data: Data, pictures: Tensor, factor: float, out: Path) -> Any:
        d = data.domains

        def views(index: Tensor) -> Tensor:
            return torch.stack([d.train_transform(p) for p in pictures[index]])

        return method(model, d.test_transform(pictures), views, factor), None

    return called


METHODS = {
    "ours": ours, "TENT": rival(tent), "SHOT": rival(shot), "NRC": rival(nrc),
    "pseudo-labels": rival(pseudo),
}  # fmt: skip


def source_model(
    data: Data, path: Path, epochs: int = 16, model: Any = None, rate: float = 4e-3
) -> Any:
    """A small network (or `model`) trained on the source, kept beside the results."""
    model = timm.create_model("test_resnet", num_classes=10) if model is None else model
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    d = data.domains
    pictures, classes = data.get("source", "train")

    class Labelled(Pictures):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index), int(classes[index])

    loader = DataLoader(Labelled(pictures, d.train_transform), 64, shuffle=True, drop_last=True)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with quiet_lightning():
        trainer.fit(Classifier(model, rate, 0.01, 0.1), loader)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def accuracy(predict: Predictor, pictures: Tensor, classes: Tensor) -> float:
    """In percent."""
    return 100 * float((predict(pictures).argmax(1) == classes).double().mean())


def main() -> None:
    """Run what the arguments choose; a line of the CSV each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/do_no_harm"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS))
    parser.add_argument("--targets", nargs="+")
    parser.add_argument("--cache", help="folder for the rendered pictures")
    given = parser.parse_args()
    seed_everything(given.seed, verbose=False)
    data = Data(given.seed, given.cache)
    source = source_model(data, given.out / f"source-{given.seed}.pt")
    path = given.out / f"runs-{given.seed}-{'-'.join(given.methods)}.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        for domain in given.targets or data.targets:
            nexts = data.domains.test_transform(data.get(domain, "test")[0])
            next_classes = data.get(domain, "test")[1]
            for condition in given.conditions:
                generator = torch.Generator().manual_seed(given.seed)
                pictures, classes = stressed(data, domain, condition, generator)
                items = data.domains.test_transform(pictures)
                before = evaluated(source)
                row: dict[str, Any] = {
                    "target": domain, "condition": condition, "seed": given.seed,
                    "items": len(pictures), "source_next": accuracy(before, nexts, next_classes),
                }  # fmt: skip
                if classes is not None:
                    row["source_items"] = accuracy(before, items, classes)
                for method in given.methods:
                    seed_everything(given.seed, verbose=False)
                    model = copy.deepcopy(source)
                    start = time.perf_counter()
                    factor = 10.0 if condition == "rate" else 1.0
                    after, rounds = METHODS[method](model, data, pictures, factor, given.out)
                    seconds = time.perf_counter() - start
                    row |= {"method": method, "seconds": round(seconds, 2)}
                    if classes is not None:
                        row["after_items"] = accuracy(after, items, classes)
                    row["after_next"] = accuracy(after, nexts, next_classes)
                    row["accepted"] = "" if rounds is None else rounds.accepted_
                    row["end"] = "" if rounds is None else rounds.termination_condition_
                    table.writerow(row)
                    file.flush()
                    print(
                        " ".join(
                            str(round(v, 1) if isinstance(v, float) else v) for v in row.values()
                        ),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
