"""Your own training loop, without Lightning: inject, verify, train, save."""

import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import disabled, inject, parameter_groups, save_adapter, verify

torch.manual_seed(0)
model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=4)

# Replace by your own data: anything that gives batches.
images, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 4
data = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)

# Targets are globs over module names; "auto" takes what is usual for the architecture.
report = inject(model, rank=4, target_modules=["attn.qkv", "attn.proj"])
print(report)
verify(model, images[:2])  # raises where an adapter gets no gradient or has no effect

# LoRA+: a larger learning rate for the factors B. Plain AdamW over
# [p for p in model.parameters() if p.requires_grad] works as well.
groups = parameter_groups(model, lr=1e-3, weight_decay=0.01, lora_plus_ratio=4)
optimizer = torch.optim.AdamW(groups)

model.train()
for epoch in range(3):
    total = 0.0
    for x, y in data:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(x)
    print(f"epoch {epoch}: loss {total / len(images):.3f}")

model.eval()
with torch.no_grad():
    adapted = model(images)
    with disabled(model):  # compare with the source model at any time
        source = model(images)
print(f"the adapter moves the logits by {(adapted - source).abs().mean():.3f}")
save_adapter(model, "adapter.safetensors")  # factors and head, not the base
