"""No labels: a classifier teaches itself on the target, and a guard keeps it from harm."""

import lightning
import timm
import torch

from lora_lightning import LoRACallback, TransductiveTask, shift


def pictures(count: int, tint: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with one channel brighter; which one is the class. Replace by your own pictures."""
    labels = torch.arange(count) % 3
    images = torch.randn(count, 3, 32, 32)
    images[torch.arange(count), labels] += 1
    images[:, 0] += tint
    return images, labels


lightning.seed_everything(0)
images, labels = pictures(128, tint=0.0)
target, truth = pictures(64, tint=0.8)  # `truth` is for the last line only

# Replace by your trained model; this one learns the source in a moment.
model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=3)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(6):
    for x, y in zip(images.split(32), labels.split(32), strict=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
model.eval()

print(shift(model, images, target))  # how far is the target, and is adapting worth it?

task = TransductiveTask(model, target, batch_size=32)  # a tensor, a dataset or a loader
trainer = lightning.Trainer(
    max_epochs=4,
    accelerator="cpu",
    # Of a network without BatchNorm; with it `trainable=[]`, the head stays.
    callbacks=[LoRACallback(rank=4, trainable=["head", "norms"], output_dir="adapters")],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
before = model(target).argmax(1)
trainer.fit(task)
after = task.probabilities_.argmax(1)  # answers for exactly these items

print(task.rounds_.termination_condition_)  # why it ended
right = [(guess == truth).float().mean().item() for guess in (before, after)]
print(f"accuracy {right[0]:.2f} before, {right[1]:.2f} after")
