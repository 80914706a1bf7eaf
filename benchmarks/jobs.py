"""Many speakers: one after the other against several at once; the driver's memory as they grow.

    python benchmarks/jobs.py                  # 64 speakers, jobs 1 and 2; 64 and 2,000 tasks
    python benchmarks/jobs.py --engine ray
    python benchmarks/jobs.py --speakers 4 --tasks 8 32 --no-save

*speakers*: ``lora-lightning adapt-speaker`` on a tiny recogniser and four recordings of noise each,
in a process of its own, with one thread per task; the files of all runs are compared byte by byte.
*tasks*: `run_tasks` with a function that does nothing, and items and a base of the same size as
those of the speakers: the driver's peak of resident memory (``ru_maxrss``), in a fresh process.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import save, setting

SPEECH = {"n_mels": 20, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24}
UTTERANCES = 4


def speakers(folder: Path, count: int) -> None:
    """A tiny recogniser, and speakers of noise who say the same words."""
    import soundfile
    import torch

    from lora_lightning.speech.data.manifests import write_manifest
    from lora_lightning.speech.data.utterances import Utterance
    from lora_lightning.speech.tasks.recognisers import ConformerCTC, save_recogniser

    torch.manual_seed(0)
    save_recogniser(ConformerCTC(**SPEECH, kernel_size=7, channels=4), folder / "base.safetensors")
    said = []
    for i in range(UTTERANCES * count):
        path = folder / f"{i}.wav"
        soundfile.write(path, torch.randn(16000).div(10).numpy(), 16000)
        said.append(Utterance(path, "turn on the light", speaker=f"speaker{i % count}"))
    write_manifest(folder / "said.jsonl", said)


def adapted(folder: Path, jobs: int, engine: str) -> tuple[float, dict[str, bytes]]:
    """Seconds of a command, and the files that it wrote."""
    out = folder / f"out-{jobs}"
    command = [sys.executable, "-m", "lora_lightning.cli", "adapt-speaker", "--accelerator", "cpu",
               "--model", folder / "base.safetensors", "--enroll", folder / "said.jsonl",
               "--steps", "20", "--held-out", "0", "--out", out]  # fmt: skip
    if jobs > 1:
        command += ["--jobs", str(jobs), "--engine", engine]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    return time.perf_counter() - start, {p.name: p.read_bytes() for p in out.iterdir()}


def nothing(base: Any, item: Any) -> bytes:
    """A task."""
    return bytes(2000)


def memory(count: int, engine: str) -> None:
    """Print the driver's peak in MiB for so many tasks."""
    from lora_lightning.runner.jobs import Jobs
    from lora_lightning.runner.tasks import run_tasks

    def items() -> Iterator[bytes]:
        for _ in range(count):
            yield bytes(2000)

    done = sum(1 for d in run_tasks(nothing, items(), bytes(500_000), Jobs(2, engine)) if d.value)
    assert done == count
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak(count: int, engine: str) -> float:
    """Of `memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory", str(count), "--engine", engine]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(said.split()[-1])


def main() -> None:
    """Write and print the rows; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--speakers", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--engine", default="processes")
    parser.add_argument("--tasks", type=int, nargs="*", default=[64, 2000])
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    if arguments.memory is not None:
        return memory(arguments.memory, arguments.engine)
    rows: list[dict[str, Any]] = []

    def row(**measured: Any) -> None:
        rows.append({"engine": arguments.engine, "jobs": "", "tasks": "", "seconds": "",
                     "driver_mib": "", **measured})  # fmt: skip
        print(rows[-1], flush=True)

    for count in arguments.tasks:
        row(jobs=2, tasks=count, driver_mib=round(peak(count, arguments.engine), 1))
    if arguments.speakers:
        with tempfile.TemporaryDirectory() as folder:
            speakers(Path(folder), arguments.speakers)
            found = {n: adapted(Path(folder), n, arguments.engine) for n in (1, arguments.jobs)}
        assert found[1][1] == found[arguments.jobs][1], "the files differ"
        for jobs, (seconds, _) in found.items():
            row(jobs=jobs, tasks=arguments.speakers, seconds=round(seconds, 1))
        print(f"{found[1][0] / found[arguments.jobs][0]:.2f} times the speed of one job")
    if not arguments.no_save:
        print(save("jobs", rows, setting("ray")))
    return None


if __name__ == "__main__":
    main()
