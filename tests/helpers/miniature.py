"""Recipes that run in seconds: small images, few sentences, tiny networks, one epoch."""

import numpy as np
from PIL import Image

TINY = [
    "model.name=test_efficientnet", "model.imagenet=none", "data.size=32", "data.batch_size=8",
    "train.source.epochs=1", "train.source.least_steps=0", "train.lora.epochs=1",
    "train.full.epochs=1", "train.label_free.epochs=1", "train.label_free.least_steps=0",
    "lora.rank=1", "accelerator=cpu",
]  # fmt: skip

TINY_TRANSLATION = [
    "data.registers.source_train=40", "data.registers.target_train=6", "data.test=3", "labelled=2",
    "unlabelled=4", "model.merges=100", "model.dim=8", "model.num_layers=1", "model.num_heads=2",
    "model.ffn_dim=8", "train.source.epochs=1", "train.lora.epochs=1", "train.full.epochs=1",
    "train.label_free.steps=3", "train.label_free.confidence=0", "lora.rank=1", "accelerator=cpu",
]  # fmt: skip


def photos(root, domains=("day", "night"), classes=("cat", "dog"), count=6, split=""):
    """Folders of noise whose mean tells the classes apart; `night` is darker."""
    for d, domain in enumerate(domains):
        for c, name in enumerate(classes):
            folder = root / domain / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                noise = np.random.default_rng([d, c, i]).integers(0, 60, (36, 36, 3))
                Image.fromarray((noise + 100 * c // (d + 1)).astype(np.uint8)).save(
                    folder / f"{i}.png"
                )
    return root
