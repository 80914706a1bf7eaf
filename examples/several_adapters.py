"""Several adapters on one model: switch, switch off, combine, and one batch for all of them."""

import copy
from pathlib import Path

import timm
import torch

from lora_lightning import (
    AdapterBank,
    adapters,
    combine,
    disabled,
    inject,
    load_adapter,
    save_adapter,
    set_active,
)

torch.manual_seed(0)
Path("adapters").mkdir(exist_ok=True)
model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=4).eval()
source = copy.deepcopy(model)
images = torch.randn(6, 3, 32, 32)  # replace by a batch of yours
labels = torch.arange(6) % 4

# Two adapters, each trained for a few steps. Replace by your own training, or by load_adapter.
for name, brightness in {"dusk": 0.3, "noon": 3.0}.items():
    inject(model, rank=4, name=name, trainable=[])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(brightness * images), labels).backward()
        optimizer.step()
    save_adapter(model, f"adapters/{name}.safetensors", name=name)
print(adapters(model))

with torch.no_grad():
    set_active(model, "dusk")  # this one answers now, and this one would train
    at_dusk = model(images)
    with disabled(model):  # the source model, exactly
        torch.testing.assert_close(model(images), source(images))
    combine(model, {"dusk": 0.7, "noon": 0.3}, name="both")  # a weighted sum, exactly
    print("both:", model(images).argmax(1).tolist())

# Another adapter for every item of a batch, out of as many files as there are.
bank = AdapterBank(source, "adapters/")
with torch.no_grad(), bank[["dusk", "noon", None, "dusk", "noon", None]]:  # None: the source
    mixed = source(images)
torch.testing.assert_close(mixed[0], at_dusk[0], rtol=1e-4, atol=1e-5)
print("mixed batch:", mixed.argmax(1).tolist())

other = copy.deepcopy(source)  # elsewhere: the same base, and the adapter from its file
load_adapter(other, "adapters/dusk.safetensors")  # a base with other weights is refused
