"""Cost of adapting without labels: seconds for 550 pictures of 64 × 64, and the teacher's bytes.

    python benchmarks/label_free_cost.py

Each network adapts five times to the same random pictures, four epochs of batches of 32, with the
guard's checks after each epoch; the first time is left out. Weights lie with channels last, and
freed memory is kept, as ``lora-lightning adapt-images`` has them; ``--plain``: as a program of
one's own. The teacher is the moving average of what is trained; its bytes stand beside those of the
model.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from lightning.pytorch import Trainer, seed_everything

from lora_lightning import LoRACallback, TransductiveTask, inject
from lora_lightning.adaptation.teacher import Teacher
from lora_lightning.model.introspection import classifier_modules
from lora_lightning.runner.memory import keep_freed_memory
from lora_lightning.runner.progress import quiet_lightning

NETWORKS = ("test_resnet", "test_convnext", "tf_efficientnet_lite0")
TEACHERS = ("tf_efficientnet_lite0", "resnet50", "vit_tiny_patch16_224", "convnext_atto")


def seconds(
    name: str,
    pictures: torch.Tensor,
    epochs: int,
    folder: str,
    batch_size: int = 32,
    memory_format: torch.memory_format = torch.contiguous_format,
    **trainer_options: Any,
) -> float:
    """Seconds of one adaptation."""
    seed_everything(0, verbose=False)
    model = timm.create_model(name, num_classes=10).eval().to(memory_format=memory_format)
    with torch.no_grad():  # a trained model has no norms at their zero start, which block gradients
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(1.0)
    task = TransductiveTask(
        model, pictures, batch_norm="target", limits=None, batch_size=batch_size
    )
    adapter = LoRACallback(
        rank=4, alpha=8.0, target_modules="all", exclude_modules=sorted(classifier_modules(model)),
        trainable=[], output_dir=folder, log_spectrum=False,
    )  # fmt: skip
    with quiet_lightning():
        trainer = Trainer(
            max_epochs=epochs, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[adapter],
            **{"accelerator": "cpu", **trainer_options},
        )  # fmt: skip
        start = time.perf_counter()
        trainer.fit(task)
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--plain", action="store_true", help="without those two")
    given = parser.parse_args()
    if not given.plain:
        keep_freed_memory()
    torch.set_num_threads(given.threads)
    pictures = torch.randn(550, 3, 64, 64)
    layout = torch.contiguous_format if given.plain else torch.channels_last
    print(f"550 pictures of 64 x 64, {given.epochs} epochs, {given.threads} threads of "
          f"{os.cpu_count()} cores, torch {torch.__version__}")  # fmt: skip
    with TemporaryDirectory() as folder:
        for name in given.networks:
            times = [
                seconds(name, pictures, given.epochs, folder, memory_format=layout)
                for _ in range(given.repeats + 1)
            ][1:]
            print(f"{name}: median {median(times):.1f} s, {min(times):.1f} to {max(times):.1f}")
    for name in TEACHERS:
        model = timm.create_model(name)
        size = sum(t.nbytes for t in model.state_dict().values())
        inject(model, rank=4, trainable=[])
        teacher = Teacher(model).nbytes
        print(f"{name}: teacher {teacher / 1e3:.0f} kB, {teacher / size:.1%} of the model's bytes")


if __name__ == "__main__":
    main()
