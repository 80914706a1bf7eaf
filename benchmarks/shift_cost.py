"""Seconds of `shift` for 2,000 pictures, forward passes included; goal: under 20.

python benchmarks/shift_cost.py
python benchmarks/shift_cost.py --model tf_efficientnet_lite0 --size 112 --threads 2
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import timm
import torch

from lora_lightning import SourceStatistics, shift


def main() -> None:
    """Time it once cold (scikit-learn is imported), then again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    model = timm.create_model(given.model, num_classes=10)
    pictures = torch.rand(given.items, 3, given.size, given.size)
    with tempfile.TemporaryDirectory() as folder:
        path = SourceStatistics.of(model, torch.rand(1000, 3, given.size, given.size)).save(
            Path(folder) / "source_statistics.safetensors"
        )
        print(f"{given.model}, {given.size} px, {given.threads} threads; the source's file takes "
              f"{path.stat().st_size / 1e6:.2f} MB")  # fmt: skip
        for run in range(given.runs):
            wall, processor = time.perf_counter(), time.process_time()
            shift(model, path, pictures)
            print(f"{given.items} pictures, run {run}: {time.perf_counter() - wall:.1f} s, "
                  f"{time.process_time() - processor:.1f} s of processor time")  # fmt: skip


if __name__ == "__main__":
    main()
