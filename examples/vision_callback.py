"""Vision: adapt a timm backbone to a labelled target with `LoRACallback`, in a module of yours."""

import copy

import lightning
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoRACallback, load_adapter


def pictures(count: int, contrast: float) -> TensorDataset:
    """Noise with one channel brighter; which one is the class. Replace by your own dataset."""
    labels = torch.arange(count) % 3
    images = torch.randn(count, 3, 32, 32)
    images[torch.arange(count), labels] += 1
    return TensorDataset(contrast * images, labels)


class Task(lightning.LightningModule):
    """Any LightningModule: nothing in it knows of adapters."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        """Cross-entropy."""
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.model(images), labels)

    def validation_step(self, batch, batch_idx):
        """Accuracy."""
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        """The callback has frozen the base by now: only what it trains is left."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)


lightning.seed_everything(0)
tiny = {"img_size": 32, "patch_size": 8}  # in earnest: none of it, and pretrained=True
source = timm.create_model("test_vit", num_classes=3, **tiny)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

lora = LoRACallback(rank=4, backbone="model", output_dir="adapters")  # backbone: Task's attribute
trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", callbacks=[lora], **quiet)
trainer.fit(
    Task(copy.deepcopy(source)),
    DataLoader(pictures(128, contrast=0.3), batch_size=16, shuffle=True),
    DataLoader(pictures(64, contrast=0.3), batch_size=64),
)
print(lora.report_)  # what was adapted, one line a weight
print(f"accuracy {trainer.callback_metrics['accuracy']:.2f}, saved to {lora.adapter_path_}")

fresh = copy.deepcopy(source)  # elsewhere: the same base, and the adapter from its file
load_adapter(fresh, lora.adapter_path_)
