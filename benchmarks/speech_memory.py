"""Memory over an epoch of `SpeechData`, with a file that is damaged on the way.

    python benchmarks/speech_memory.py                 # 1 hour of sound, without a model
    python benchmarks/speech_memory.py --hours 0.2 --trainer --out

Makes synthetic recordings of 1 to 15 seconds, FLAC and WAV by turns, in a temporary folder;
checks them, damages the one in the middle, and goes through one epoch. The resident memory of
this process and its workers is read at each 5 %. Reported: the table, the growth after the first
10 % (in which the waveforms that are kept, `--cache-mb`, have their part), and how many lines
were printed for the damaged file. Goals: under 30 MB, one line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import soundfile
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lora_lightning.speech.data.audio import checked
from lora_lightning.speech.data.speech_data import SpeechData
from lora_lightning.speech.data.utterances import AudioBatch, Utterance

RATE = 16000
GOAL_MB = 30.0
STEP = 5  # percent between two readings
WARM = 10  # percent after which memory is to stay as it is


def make(folder: Path, hours: float, seed: int = 0) -> list[Utterance]:
    """Sums of sines in noise, 1 to 15 s each, until there are so many hours."""
    rng, left, found = np.random.default_rng(seed), 3600 * hours, []
    while left > 0:
        seconds = rng.uniform(1, 15)
        t = np.arange(int(seconds * RATE)) / RATE
        tones = sum(np.sin(2 * np.pi * hertz * t) for hertz in rng.uniform(80, 4000, 4))
        sound = 0.05 * tones + rng.normal(0, 0.02, len(t))
        path = folder / f"{len(found):05d}.{('flac', 'wav')[len(found) % 2]}"
        soundfile.write(path, sound, RATE, subtype="PCM_16")
        found.append(Utterance(path))
        left -= seconds
    return found


class Memory:
    """Resident megabytes at each 5 % of an epoch."""

    def __init__(self, batches: int):
        self.batches, self.done = batches, 0
        self.readings: list[tuple[int, float]] = [(0, resident_mb())]

    def tick(self) -> None:
        """Count a batch."""
        self.done += 1
        percent = 100 * self.done // self.batches // STEP * STEP
        if percent > self.readings[-1][0]:
            self.readings.append((percent, resident_mb()))

    def growth(self) -> float:
        """Most that was ever held after the first 10 %, above what was held then."""
        later = [mb for percent, mb in self.readings if percent >= WARM]
        return max(later) - later[0]


def resident_mb() -> float:
    """Megabytes that this process and its workers hold now; what they share counts for each."""
    own = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in own)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Small(LightningModule):
    """A convolution that learns to predict loudness: something for a Trainer to do."""

    def __init__(self, memory: Memory):
        super().__init__()
        self.memory = memory
        self.layers = nn.Sequential(nn.Conv1d(1, 16, 400, 160), nn.ReLU(), nn.Conv1d(16, 1, 1))

    def training_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        """Mean square of the prediction."""
        self.memory.tick()
        out: Tensor = self.layers(batch.waveforms[:, None])
        return (out - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@contextlib.contextmanager
def printed() -> Iterator[list[str]]:
    """The lines that are written to standard error meanwhile."""
    lines: list[str] = []
    held = io.StringIO()
    with contextlib.redirect_stderr(held):
        yield lines
    lines += held.getvalue().splitlines()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the recordings, go through them, return every figure."""
    with tempfile.TemporaryDirectory() as folder:
        items, skipped = checked(make(Path(folder), options.hours))
        assert not skipped
        data = SpeechData(items, num_workers=options.workers, cache_mb=options.cache_mb)
        bad = items[len(items) // 2].path
        bad.write_bytes(bad.read_bytes()[:20])
        memory = Memory(len(data.train_dataloader()))
        start = time.perf_counter()
        with printed() as lines:
            epoch(data, memory, options)
        return {
            "seconds": time.perf_counter() - start,
            "files": len(items),
            "hours": sum(item.seconds for item in items) / 3600,
            "batches": [memory.done, memory.batches],
            "readings_mb": memory.readings,
            "growth_mb": memory.growth(),
            "lines_for_damaged_file": sum(bad.name in line for line in lines),
        }


def epoch(data: SpeechData, memory: Memory, options: argparse.Namespace) -> None:
    """One pass over the training loader, by hand or by a Trainer."""
    if not options.trainer:
        for _ in data.train_dataloader():
            memory.tick()
        return
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    ).fit(Small(memory), datamodule=data)


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """Versions, hardware and what was asked for."""
    own = ("workers", "cache_mb", "trainer")
    return machine.setting("soundfile") | {name: getattr(options, name) for name in own}


def show(found: dict[str, Any]) -> None:
    """The table, then the goals."""
    print(f"{found['hours']:.2f} h, {found['files']} files, {found['seconds']:.1f} s")
    print(f"{'percent':>8s} {'resident MB':>12s}")
    for percent, mb in found["readings_mb"]:
        print(f"{percent:8d} {mb:12.1f}")
    done, of = found["batches"]
    for text, value, met in (
        (f"growth after {WARM} %: under {GOAL_MB:.0f} MB", f"{found['growth_mb']:.1f} MB",
         found["growth_mb"] < GOAL_MB),
        ("one line for the damaged file", found["lines_for_damaged_file"],
         found["lines_for_damaged_file"] == 1),
        ("every batch came", f"{done} of {of}", done == of),
    ):  # fmt: skip
        print(f"goal, {text}: {'met' if met else 'MISSED'} ({value})")


def main() -> None:
    """Measure, show, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=1.0, help="of sound (default 1)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load (default 0)")
    parser.add_argument("--cache-mb", type=float, default=16.0, help="of waveforms (default 16)")
    parser.add_argument("--trainer", action="store_true", help="train a small module meanwhile")
    parser.add_argument("--out", action="store_true", help="write a dated JSON")
    options = parser.parse_args()
    found = {**setting(options), **measure(options)}
    show(found)
    if options.out:
        path = machine.dated(found["date"], "speech-memory", ".json")
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"saved {path}")


if __name__ == "__main__":
    main()
