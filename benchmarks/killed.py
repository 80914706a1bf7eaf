"""Runs that are killed, 40 times: no damaged file, and results equal to those of one left alone.

    python benchmarks/killed.py              # ten kills of each of four runs
    python benchmarks/killed.py --kills 1 --no-save

*recipe*: ``lora-lightning run lighting`` in miniature, two seeds. *adapt-speaker*: six speakers of
one recogniser. *fit*: a Trainer with `LoRACallback` and a checkpoint after each epoch, resumed by
``ckpt_path=``. *save*: `save_adapter` to one path, again and again. Each is a process of its own,
killed (``SIGKILL``) at a random moment between its first file and its end; every file it has left
is read, and the same command is given again. Counted: files that cannot be read or hold anything
but a complete state, and results that differ from those of the run that was left alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from machine import save as save_figures
from machine import setting

EPOCHS = 6
IMPORTED = ("lightning.pytorch", "timm", "torchaudio", "soundfile", "lora_lightning.vision.recipe",
            "lora_lightning.speech.speakers")  # fmt: skip
TINY = (
    "model.name=test_efficientnet", "model.imagenet=none", "data.size=32", "data.batch_size=8",
    "data.render.source_train=4", "data.render.source_test=2", "data.render.target_train=2",
    "data.render.target_test=2", "data.target=[dim-3]", "seeds=[0,1]", "lora.rank=1",
    "train.source.epochs=2", "train.source.least_steps=0", "train.lora.epochs=1",
    "train.full.epochs=1", "train.label_free.epochs=1", "train.label_free.least_steps=0",
    "accelerator=cpu",
)  # fmt: skip


def recogniser(folder: Path) -> None:
    """A tiny recogniser, and six speakers of noise who say the same words."""
    import soundfile

    from lora_lightning.speech.data.manifests import write_manifest
    from lora_lightning.speech.data.utterances import Utterance
    from lora_lightning.speech.tasks.recognisers import ConformerCTC, save_recogniser

    torch.manual_seed(0)
    sizes = {"n_mels": 20, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24}
    save_recogniser(ConformerCTC(**sizes, kernel_size=7, channels=4), folder / "base.safetensors")
    said = []
    for i in range(24):
        path = folder / f"{i}.wav"
        soundfile.write(path, torch.randn(16000).div(10).numpy(), 16000)
        said.append(Utterance(path, "turn on the light", speaker=f"speaker{i % 6}"))
    write_manifest(folder / "said.jsonl", said)


def fit(out: Path) -> None:
    """A fit that resumes from its last checkpoint, if there is one; the order is the epoch's."""
    import timm
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    from lora_lightning import LoRACallback
    from lora_lightning.vision.classifier import Classifier

    seed_everything(0, verbose=False)
    module = Classifier(timm.create_model("test_vit", img_size=32, num_classes=4))
    pictures = TensorDataset(torch.randn(128, 3, 32, 32), torch.arange(128) % 4)
    order = DistributedSampler(pictures, num_replicas=1, rank=0, seed=0)
    last = out / "last.ckpt"
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=[
            LoRACallback(rank=4, output_dir=out / "adapters"),
            ModelCheckpoint(dirpath=out, save_last=True, save_top_k=0),
        ],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(pictures, batch_size=8, sampler=order)
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None)


def saves(out: Path) -> None:
    """The state k, in which every factor is k, for k = 1 to 300."""
    import timm

    from lora_lightning import inject, save_adapter

    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    inject(model, rank=4)
    for k in range(1, 301):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(k)
        save_adapter(model, out / "state.safetensors")


def works(files: Path) -> dict[str, Callable[[Path], object]]:
    """What each run does, in the folder in which it writes."""
    speak = ["adapt-speaker", "--model", files / "base.safetensors", "--enroll",
             files / "said.jsonl", "--steps", 3, "--accelerator", "cpu", "--out"]  # fmt: skip
    return {
        "recipe": lambda out: command("run", "lighting", *TINY, f"out={out}"),
        "adapt-speaker": lambda out: command(*speak, out),
        "fit": fit,
        "save": saves,
    }


def command(*arguments: object) -> None:
    """A command line of ours."""
    from lora_lightning.cli import main

    if code := main([str(each) for each in arguments]):
        raise SystemExit(code)


def content(path: Path) -> Any:
    """What a file holds, without times; raises where it is damaged."""
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        held = load_file(path)
        if path.name == "state.safetensors":
            assert len({v for t in held.values() for v in t.unique().tolist()}) == 1, "mixed states"
        return {key: value.numpy().tobytes() for key, value in held.items()}
    if path.suffix == ".ckpt":
        held = torch.load(path, weights_only=False)["state_dict"]
        tensors = {k: v for k, v in held.items() if isinstance(v, torch.Tensor)}
        return {key: value.numpy().tobytes() for key, value in tensors.items()}
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
        rows = rows if isinstance(rows, list) else [rows]
        return [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return None


def contents(out: Path) -> dict[str, Any]:
    """Of all files with a name that is theirs to keep."""
    return {
        str(path.relative_to(out)): content(path)
        for path in sorted(out.rglob("*"))
        if path.suffix in {".safetensors", ".ckpt", ".json"} and not path.name.startswith(".")
    }


def child(work: Callable[[Path], object], out: Path, said: Any) -> int:
    """The process of a run; what it says goes into a file."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        random.seed()  # as in a process of its own
        numpy.random.seed()  # noqa: NPY002
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        work(out)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(
    work: Callable[[Path], object], out: Path, limit: float = 3600.0
) -> tuple[float, float] | None:
    """Seconds to its first file, and from there to its end; None if killed `limit` after that."""
    start, first = time.perf_counter(), None
    with tempfile.TemporaryFile() as said:
        pid = child(work, out, said)
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            now = time.perf_counter()
            if first is None and any(path.is_file() for path in out.rglob("*")):
                first = now
            if first is not None and now - first > limit:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return None
            time.sleep(0.002)
        if ended[1]:
            said.seek(0)
            raise SystemExit(f"a run failed: {said.read().decode()[-2000:]}")
    end = time.perf_counter()
    return (first or end) - start, end - (first or end)


def killed(name: str, work: Callable[[Path], object], root: Path, kills: int) -> dict[str, Any]:
    """The row of one run."""
    alone = root / name / "alone"
    alone.mkdir(parents=True)
    (_, writing), expected = run(work, alone) or (0, 0), contents(alone)
    row: dict[str, Any] = {
        "run": name,
        "kills": 0,
        "files read": 0,
        "damaged": 0,
        "results differ": 0,
        "litter": 0,
    }
    chance = random.Random(7)
    while row["kills"] < kills:
        out = root / name / "killed"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if run(work, out, chance.uniform(0, writing)):
            continue  # it was faster than the kill
        row["kills"] += 1
        try:
            row["files read"] += len(contents(out))
        except Exception as error:
            row["damaged"] += 1
            print(f"{name}: {error!r:.300}", flush=True)
        run(work, out)
        found = contents(out)
        row["results differ"] += found != expected
        if found != expected:
            wrong = [k for k in {*found, *expected} if found.get(k) != expected.get(k)]
            print(f"{name}: {wrong} differ", flush=True)
        row["litter"] += sum(p.name.startswith(".") for p in out.rglob("*"))
    return row


def main() -> None:
    """Write and print the table; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="of each run")
    parser.add_argument("--only", nargs="*", help="some of the runs")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    for name in IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)  # its threads are no use after a fork
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORA_LIGHTNING_CACHE"] = str(Path(folder) / "cache")
        files = Path(folder) / "files"
        files.mkdir()
        recogniser(files)
        for name, work in works(files).items():
            if not arguments.only or name in arguments.only:
                rows.append(killed(name, work, Path(folder), arguments.kills))
                print(rows[-1], flush=True)
    if not arguments.no_save:
        print(save_figures("killed", rows, setting()))


if __name__ == "__main__":
    main()
